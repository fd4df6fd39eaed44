"""Variants of the model against the plain loops that define them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepstack_jax.config import RopeConfig
from deepstack_jax.errors import ConfigError, WeightsError
from deepstack_jax.families.ablations import ablations_to
from deepstack_jax.families.build import build_model
from deepstack_jax.model.attention import causal_segment_mask, dot_product, last_positions, rotary_angles, rotary_table
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.model.variants import AddedDeepStack, DeepStackV, HighResDeepStack, PooledDeepStack
from deepstack_jax.model.vision import EncoderLayer, _bicubic, interpolate_positions
from deepstack_jax.weights.names import NameTable
from tests.unit.tiny import example, make_batch, model_params, tiny_config, tower_schedule

SQUARE = {"image.grid": "square"}
VISION = SQUARE | {"deepstack.into": "vision"}


def build(changes, grids=((2, 2), (2, 2))):
    """Model, parameters and a batch: a row with text alone, a row with two images, a packed row of two examples."""
    config = tiny_config(changes)
    packed = [example(config, 2, grids[:1]), example(config, 3, grids[:1])]
    batch = make_batch(
        config, [[example(config, 0)], [example(config, 1, grids)], packed], length=max(48, config.data.max_length)
    )
    model = build_model(config)
    return config, model, model_params(model, batch), batch


def apply(model, params, *args, method=None):
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method))(params, *args)


def plain_tower(config, params, images):
    """Hidden states before every layer, one image at a time; `images` are normalised f32[n, y, x, 3]."""
    tower, cfg = params["vision_tower"], config.vision
    side, patch = config.patch_side, cfg.patch_size
    patches = images.reshape(-1, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(images), side**2, -1)
    tokens = patches @ tower["patch_embed"]["kernel"]
    x = jnp.concatenate([jnp.tile(tower["cls"], (len(images), 1, 1)), tokens], axis=1) + tower["positions"]
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    normed = (x - mean) / jnp.sqrt(variance + cfg.norm_eps)
    return normed * tower["pre_norm"]["scale"] + tower["pre_norm"]["bias"]


def run_layer(config, params, number, x):
    layer = EncoderLayer(config.vision, dot_product, jnp.dtype(jnp.float32))
    block = jax.tree.map(lambda leaf: leaf[number], params["vision_tower"]["layers"]["block"])
    return layer.apply({"params": block}, x)


@pytest.mark.parametrize(
    ("start", "post", "enters"),
    [(0, 0, [0, 1, 2]), (1, 0, [1, 2]), (-1, 0, [1, 2]), (2, 0, [2]), (3, 3, [3, 4, 5]), (4, 2, [4])],
)
def test_deepstack_v_equals_a_loop_over_layers_and_images(start, post, enters):
    """One image at a time: all five views up to layer k, then the dilated crops' tokens onto the global view's."""
    config, model, params, batch = build(VISION | {"deepstack.vision_start": start, "vision.post_layers": post})
    assert isinstance(model, DeepStackV)
    assert [layer for layer, group in enumerate(tower_schedule(config)) if group >= 0] == enters
    features = apply(model, params, batch, method="visual_tokens")[0]
    scaled = batch.pixels.astype(np.float32) * (1 / 255)
    pixels = (scaled - np.array(config.image.mean, np.float32)) / np.array(config.image.std, np.float32)
    total, side = config.vision.layers + post, config.patch_side
    last = total if post else total - 1  # the feature is the input of the last layer, or the output of the last post layer
    for row, image in ((1, 0), (1, 1), (2, 0), (2, 1)):
        x = plain_tower(config, params, pixels[row, 5 * image : 5 * image + 5])
        for layer in range(total + 1):
            if layer == enters[0]:
                crops = x[1:, 1:].reshape(2, 2, side, side, -1).transpose(0, 2, 1, 3, 4).reshape(2 * side, 2 * side, -1)
                maps = [crops[i::2, j::2].reshape(side**2, -1) for i in range(2) for j in range(2)]
                x = x[:1]
            if layer in enters:
                x = x.at[0, 1:].add(maps[layer - enters[0]])
            if layer == last:
                break
            x = run_layer(config, params, layer, x)
        projector = params["projector"]
        hidden = jax.nn.gelu(x[0, 1:] @ projector["fc1"]["kernel"] + projector["fc1"]["bias"], approximate=False)
        expected = hidden @ projector["fc2"]["kernel"] + projector["fc2"]["bias"]
        m = side**2 * image
        np.testing.assert_allclose(features[row, m : m + side**2], expected, atol=2e-4)


def test_deepstack_v_injects_nothing_into_the_decoder_and_a_text_row_stays_as_it_is():
    _, model, params, batch = build(VISION)
    assert apply(model, params, batch, method="visual_tokens")[1] is None
    assert set(model.layers.schedule) == {-1}
    noise = batch._replace(pixels=np.random.default_rng(9).integers(0, 256, batch.pixels.shape, dtype=np.uint8))
    ours, theirs = (apply(model, params, b).hidden for b in (batch, noise))
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert np.abs(np.asarray(ours[1:] - theirs[1:])).max() > 1e-2


@pytest.mark.parametrize("changes", [VISION, {}, {"image.mode": "hd", "image.merge": "spatial_unpad", "data.max_length": 160}])
def test_only_the_first_crop_of_an_image_changed_changes_that_image_alone(changes):
    config, model, params, batch = build(changes)
    pixels = batch.pixels.copy()
    pixels[1, 1] = 255 - pixels[1, 1]
    ours, theirs = (apply(model, params, b).hidden for b in (batch, batch._replace(pixels=pixels)))
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_array_equal(ours[[0, 2]], theirs[[0, 2]])
    first = int(np.flatnonzero(batch.visual_index[1] >= 0)[0])
    np.testing.assert_array_equal(ours[1, :first], theirs[1, :first])
    assert np.abs(ours[1, first:] - theirs[1, first:]).max() > 1e-3
    assert config.image.newline == ("image_newline" in params)


def test_pooled_tokens_by_their_definition():
    """2x2 squares of projected tokens averaged, an odd last row and column dropped, then dealt as ever."""
    changes = {"image.size": 20, "deepstack.pool": 2}
    config, model, params, batch = build(changes)
    assert isinstance(model, PooledDeepStack)
    assert (config.patch_side, config.layout.side, config.layout.max_tokens) == (5, 2, 4)
    (features,) = apply(model, params, batch.pixels, method="encode")
    projected = np.asarray(apply(model, params, features, method=lambda model, x: model.projector(x)))
    squares = projected.reshape(3, -1, 5, 5, 32)[:, :, :4, :4].reshape(3, -1, 2, 2, 2, 2, 32).mean(axis=(3, 5))
    visual, stack = apply(model, params, batch, method="visual_tokens")
    np.testing.assert_allclose(visual[1, :4], squares[1, 0].reshape(4, -1), atol=1e-5)
    mosaic = squares[1, 1:5].reshape(2, 2, 2, 2, 32).transpose(0, 2, 1, 3, 4).reshape(4, 4, 32)
    for group in range(4):
        np.testing.assert_allclose(stack[group, 1, :4], mosaic[group // 2 :: 2, group % 2 :: 2].reshape(4, -1), atol=1e-5)


def test_groups_summed_at_the_input_are_the_groups_that_layers_would_get():
    _, model, params, batch = build({"deepstack.into": "input"})
    assert isinstance(model, AddedDeepStack)
    assert set(model.layers.schedule) == {-1}
    visual, stack = apply(model, params, batch, method="visual_tokens")
    assert stack is None
    tokens, groups = apply(build_model(tiny_config({})), params, batch, method="visual_tokens")  # the same parameters
    np.testing.assert_allclose(visual, tokens + groups.sum(0), atol=1e-5)
    # One group at layer 0 is that group at the input: the place is the one that DeepStack-L has.
    one = {"image.mode": "stretch", "deepstack.stack": "global"}
    summed, injected = (build(one | more, grids=(None, None)) for more in ({"deepstack.into": "input"}, {"deepstack.start": 0}))
    hidden = [apply(model, summed[2], summed[3]).hidden for model in (summed[1], injected[1])]
    np.testing.assert_allclose(*hidden, atol=1e-5)


def test_groups_joined_along_channels_by_their_definition():
    config, model, params, batch = build({"deepstack.into": "channels"})
    assert params["projector"]["fc1"]["kernel"].shape == (5 * config.vision.width, config.decoder.width)
    assert config.projected == 5 * config.vision.width
    visual, stack = apply(model, params, batch, method="visual_tokens")
    assert stack is None
    (features,) = apply(model, params, batch.pixels, method="encode")
    side, features = config.patch_side, np.asarray(features)
    views = features[1].reshape(3, 5, side, side, -1)[0]  # the first image of the row with two, of three slots
    mosaic = views[1:].reshape(2, 2, side, side, -1).transpose(0, 2, 1, 3, 4).reshape(2 * side, 2 * side, -1)
    joined = np.concatenate([views[0], *(mosaic[y::2, x::2] for y in range(2) for x in range(2))], axis=-1)
    expected = apply(model, params, joined.reshape(side**2, -1), method=lambda model, x: model.projector(x))
    np.testing.assert_allclose(visual[1, : side**2], expected, atol=1e-5)
    assert NameTable(config).leaves["projector/fc1/kernel"].layer_shape == params["projector"]["fc1"]["kernel"].shape


@pytest.mark.parametrize("into", ["input", "channels"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"deepstack.stack": "none"}, "gives no groups, set it to 'crops'"),
        ({"deepstack.schedule": (0, -1, -1, -1, -1)}, "schedule is"),
        ({"deepstack.pool": 2, "image.size": 16}, "pool is 2, set it to 1"),
        ({"deepstack.start": 2}, "start is 2, set it to 1"),
        ({"deepstack.interval": 2}, "interval is 2, set it to 1"),
        ({"deepstack.vision_start": 3}, "vision_start is 3, set it to -1"),
    ],
)
def test_fusing_at_the_input_refuses_what_it_does_not_mean(into, changes, said):
    with pytest.raises(ConfigError, match=said):
        tiny_config({"deepstack.into": into} | changes)


def test_fusing_at_the_input_has_no_official_form():
    for into in ("input", "channels"):
        with pytest.raises(WeightsError, match="has no official form"):
            ablations_to(tiny_config({"deepstack.into": into}))


def test_high_res_view_sees_the_crops_as_one_picture():
    """Against the plain tower run on the joined picture under the same interpolated positions."""
    _, model, params, batch = build(SQUARE | {"deepstack.high_res": "view"})
    assert isinstance(model, HighResDeepStack)
    features = apply(model, params, batch.pixels, method="encode")[0].reshape(3, 3, 5, 4, -1)
    large = tiny_config({"image.size": 16, "image.mode": "pad", "deepstack.stack": "none", "data.max_length": 64})
    joined = batch.pixels[1, 1:5].reshape(2, 2, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(1, 1, 16, 16, 3)
    positions = interpolate_positions(params["vision_tower"]["positions"], 4)
    tower = dict(params["vision_tower"], positions=positions)
    whole = apply(build_model(large), dict(params, vision_tower=tower), joined, method="encode")[0]
    crop_major = np.asarray(whole).reshape(2, 2, 2, 2, -1).transpose(0, 2, 1, 3, 4).reshape(4, 4, -1)
    np.testing.assert_allclose(features[1, 0, 1:], crop_major, atol=1e-5)
    plain = apply(build_model(tiny_config(SQUARE)), params, batch.pixels, method="encode")[0].reshape(3, 3, 5, 4, -1)
    np.testing.assert_allclose(features[:, :, 0], plain[:, :, 0], atol=1e-5)
    assert np.abs(features[1, 0, 1:] - plain[1, 0, 1:]).max() > 1e-2


def test_interpolated_positions_follow_the_bicubic_definition():
    """Rows sum to 1, a constant and (inside) a ramp survive, doubling has Keys' taps for a = -0.75 at 1/4 and 3/4."""
    weights = _bicubic(24, 48)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    row = weights[21]  # lies at 10.25
    assert np.flatnonzero(row).tolist() == [9, 10, 11, 12]
    np.testing.assert_allclose(row[[9, 12]], [-0.75 * 0.25 * 0.75**2, -0.75 * 0.75 * 0.25**2], atol=1e-6)
    np.testing.assert_allclose(row[10], 1.25 * 0.25**3 - 2.25 * 0.25**2 + 1, atol=1e-6)
    assert weights[0, 0] > 1, "the edge is repeated, not reflected"
    table = jnp.asarray(np.random.default_rng(0).normal(size=(17, 3)), jnp.float32)
    np.testing.assert_array_equal(interpolate_positions(table, 4), table)
    np.testing.assert_array_equal(interpolate_positions(table, 8)[0], table[0])


def test_sliding_window():
    """A token sees itself and the `window` before it, in its own segment."""
    segments, positions = np.array([[1, 1, 1, 1, 2, 2, 0]]), np.array([[0, 1, 2, 3, 0, 1, 0]])
    mask = causal_segment_mask(segments, positions, 2)[0, 0]
    for t in range(7):
        for s in range(7):
            same = segments[0, s] == segments[0, t]
            assert mask[t, s] == (s <= t and same and positions[0, t] - positions[0, s] <= 2)


def test_a_window_changes_only_tokens_that_look_further_back():
    config, model, params, batch = build({"decoder.sliding_window": 8})
    plain = apply(build_model(tiny_config()), params, batch).hidden
    windowed = apply(model, params, batch).hidden
    assert config.decoder.sliding_window == 8
    near = batch.positions[1] <= 8
    np.testing.assert_allclose(windowed[1][near], plain[1][near], atol=1e-5)
    assert np.abs(np.asarray(windowed - plain))[1][~near & (batch.segment_ids[1] > 0)].max() > 1e-3


def test_last_positions_by_hand():
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]])
    assert last_positions(positions, segments).tolist() == [[2, 2, 2, 1, 1, 0], [0, 0, 3, 3, 3, 3]]


HALF = 4
SHORT, LONG = (1.0, 1.1, 1.5, 2.0), (1.0, 3.0, 9.0, 30.0)


def angles(config, max_positions, position, last):
    table = rotary_table(config, 2 * HALF, max_positions)
    rotary = rotary_angles(table, jnp.array([[position]]), jnp.array([[last]]))
    return np.asarray(rotary.cos)[0, 0], np.asarray(rotary.sin)[0, 0]


@pytest.mark.parametrize("scaling", ["longrope", "yarn"])
@pytest.mark.parametrize(("last", "factors"), [(15, SHORT), (16, LONG)])
def test_longrope_takes_the_factors_of_the_sequence(scaling, last, factors):
    """Sequences longer than the original context take the long factors for all their tokens; both are scaled alike."""
    config = RopeConfig(100.0, scaling, original_positions=16, short_factor=SHORT, long_factor=LONG)
    cos, sin = angles(config, 128, 7, last)
    scale = {"longrope": np.sqrt(1 + np.log(8) / np.log(16)), "yarn": 0.1 * np.log(8) + 1}[scaling]
    expected = 7 / (np.array(factors) * 100.0 ** (np.arange(HALF) / HALF))
    np.testing.assert_allclose(cos, np.cos(expected) * scale, atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(expected) * scale, atol=1e-5)


def test_linear_and_llama3_scaling():
    plain = 100.0 ** -(np.arange(HALF) / HALF)
    cos, _ = angles(RopeConfig(100.0, "linear", factor=4.0), 64, 7, 7)
    np.testing.assert_allclose(cos, np.cos(7 / 4 * plain), atol=1e-5)
    config = RopeConfig(100.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=32)
    expected = []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 32 / 4.0:
            expected.append(frequency)
        elif wavelength > 32 / 1.0:
            expected.append(frequency / 8)
        else:
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    cos, sin = angles(config, 256, 7, 7)
    np.testing.assert_allclose(cos, np.cos(7 * np.array(expected)), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(7 * np.array(expected)), atol=1e-5)


def test_a_long_segment_does_not_change_a_short_one_in_the_same_row():
    rope = {
        "decoder.rope.scaling": "longrope",
        "decoder.rope.original_positions": 12,
        "decoder.rope.short_factor": (1.0, 1.0, 1.0, 1.0),
        "decoder.rope.long_factor": LONG,
    }
    config = tiny_config(rope)
    short, long = example(config, 0, words=2, answer=2), example(config, 1, [(2, 2)], words=8)
    together, alone = make_batch(config, [[short, long]]), make_batch(config, [[short]])
    model = build_model(config)
    params = model_params(model, together)
    n = short.length
    ours, theirs = (apply(model, params, b).hidden[0, :n] for b in (together, alone))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    plain = apply(build_model(tiny_config()), params, together).hidden
    assert np.abs(np.asarray(apply(model, params, together).hidden - plain))[0, n : n + long.length].max() > 1e-3


def test_plain_configurations_build_the_plain_model():
    for changes in ({}, {"image.mode": "hd"}, {"image.mode": "pad", "deepstack.stack": "none"}):
        assert type(build_model(tiny_config(changes | {"data.max_length": 160}))) is DeepStack


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepstack.into": "vision"}, r"image\.grid is 'best', set it to 'square'"),
        (VISION | {"deepstack.sampling": "1d"}, "set it to '2d'"),
        (VISION | {"image.num_crops": 5}, r"num_crops is 5, set it to 4"),
        (VISION | {"deepstack.vision_start": 3}, r"after the tower's 3 layers; lower it, or add layers with .*post_layers=5"),
        (VISION | {"deepstack.vision_start": 9, "vision.post_layers": 5}, "beyond the last layer 7; lower it"),
        ({"deepstack.high_res": "view"}, r"set config\.image\.mode='deepstack' and config\.image\.grid='square'"),
        ({"image.mode": "hd", "deepstack.pool": 2}, "averages the tokens of single crops"),
        ({"deepstack.pool": 3}, "larger than the 2 tokens"),
        ({"image.mode": "anyres", "deepstack.stack": "global"}, "LLaVA-NeXT, which injects nothing"),
        ({"image.mode": "anyres", "deepstack.stack": "none"}, r"pinpoints: anyres needs at least one pinpoint"),
        (
            {"image.mode": "hd", "deepstack.sequence": "crops", "deepstack.stack": "none"},
            "whose cells are there already",
        ),
        ({"decoder.rope.scaling": "longrope"}, r"short_factor has 0 entries, expected head_dim / 2 = 4"),
        ({"decoder.rope.scaling": "llama3"}, "original_positions is 0"),
        ({"decoder.rope.scaling": "linear", "decoder.rope.factor": 0.5}, "shortens the context"),
    ],
)
def test_what_cannot_be_built_says_so(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(changes)
