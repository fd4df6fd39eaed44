"""The whole model: what each row sees, what the stack changes, what padding and packing do not, and its full-size shapes."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from deepstack_jax.batch import NEWLINE, ZERO
from deepstack_jax.families.build import build_model
from deepstack_jax.model import layers
from deepstack_jax.model.attention import causal_segment_mask
from deepstack_jax.parallel.rules import RULES
from tests.unit.tiny import example, make_batch, model_params, only_rows, tiny_config

CONFIG = tiny_config()
SIDE, P = 2, 4
MODEL = build_model(CONFIG)
GRIDS = {1: [(2, 2)], 3: [(1, 2), (2, 1), (1, 3)], 5: [(1, 2)]}  # rows with images; the others are text only


@pytest.fixture(scope="module")
def rows():
    packed = [example(CONFIG, 7, [(2, 1)], words=1), example(CONFIG, 8, [(1, 2)], words=2, answer=2)]
    single = [[example(CONFIG, row, GRIDS.get(row, []))] for row in range(7)]
    return [*single, packed]


@pytest.fixture(scope="module")
def batch(rows):
    return make_batch(CONFIG, rows)


@pytest.fixture(scope="module")
def params(batch):
    return model_params(MODEL, batch)


@pytest.fixture(scope="module")
def forward():
    @jax.jit
    def hidden(params, batch):
        return MODEL.apply({"params": params}, batch).hidden

    return hidden


@pytest.fixture(scope="module")
def tokens_of(params, batch):
    """Visual tokens [B, M, D], stack [J, B, M, D] and input embeddings [B, T, D] of the batch."""

    @jax.jit
    def run(params, batch):
        visual, stack = MODEL.apply({"params": params}, batch, method="visual_tokens")
        return visual, stack, MODEL.apply({"params": params}, batch, method="inputs")[0]

    return jax.device_get(run(params, batch))


def close(a, b, batch, tolerance=1e-5):
    """Equal where there is a token; what is in the padding is nobody's business."""
    real = np.asarray(batch.segment_ids) > 0
    assert real.any()
    np.testing.assert_allclose(np.asarray(a)[real], np.asarray(b)[real], atol=tolerance)


def test_shapes(batch, forward, params, tokens_of):
    chex.assert_shape(forward(params, batch), (8, 32, 32))
    visual, stack, embeddings = tokens_of
    chex.assert_shape([visual, stack, embeddings], [(8, 12, 32), (4, 8, 12, 32), (8, 32, 32)])


def test_every_visual_token_is_the_patch_that_the_paper_names(rows, batch, params, tokens_of):
    """Each view encoded by itself; its patches looked up by their place in the picture, not by index tables."""
    visual, stack, embeddings = tokens_of
    views = np.concatenate([pixels for row in rows for one in row for pixels in one.pixels])
    features = jax.jit(lambda pixels: MODEL.apply({"params": params}, pixels, method="encode"))(views[None])[0][0]
    projected = MODEL.apply({"params": params}, features[None], jnp.arange(len(features))[None], method="gather_project")
    projected = np.asarray(projected).reshape(len(views), SIDE, SIDE, -1)
    view = 0
    for row, examples in enumerate(rows):
        grids = [GRIDS.get(row, [])] if row < 7 else [[(2, 1)], [(1, 2)]]
        slot, start = 0, 0
        for one, own in zip(examples, grids, strict=True):
            position = start
            for height, width in own:
                position = int(np.flatnonzero(batch.visual_index[row, position:] >= 0)[0]) + position
                overview = projected[view].reshape(P, -1)
                np.testing.assert_allclose(visual[row, slot : slot + P], overview, atol=1e-5)
                np.testing.assert_allclose(embeddings[row, position : position + P], overview, atol=1e-5)
                crops = projected[view + 1 : view + 1 + height * width].reshape(height, width, SIDE, SIDE, -1)
                picture = crops.transpose(0, 2, 1, 3, 4).reshape(height * SIDE, width * SIDE, -1)
                for group in range(4):
                    expected = np.zeros_like(overview)
                    if group < height * width:
                        i, j = divmod(group, width)
                        expected = picture[i::height, j::width].reshape(P, -1)
                    np.testing.assert_allclose(stack[group, row, slot : slot + P], expected, atol=1e-5)
                view, slot, position = view + 1 + height * width, slot + P, position + P
            start += one.length
        assert not visual[row, slot:].any()
        assert not stack[:, row, slot:].any()
    assert view == len(views)
    text = (batch.visual_index < 0) & (batch.segment_ids > 0)
    np.testing.assert_allclose(embeddings[text], params["embed"]["embedding"][batch.tokens[text]], atol=1e-6)


@pytest.mark.quick
def test_a_stack_of_zeros_is_the_same_model_without_injection(batch, params, forward):
    zero = forward(params, batch._replace(stack_source=np.full_like(batch.stack_source, ZERO)))
    no_layer = dataclasses.replace(MODEL.layers, schedule=(-1,) * CONFIG.decoder.layers)
    schedule_off = dataclasses.replace(MODEL, layers=no_layer)
    off = jax.jit(schedule_off.apply)({"params": params}, batch).hidden
    chex.assert_trees_all_close(zero, off, atol=1e-6)
    on = np.asarray(forward(params, batch))
    changed = np.abs(on - np.asarray(off)).max(axis=(1, 2))
    has_image = (batch.visual_index >= 0).any(axis=1)
    assert (changed[has_image] > 0.01).all()
    assert (changed[~has_image] == 0).all()


def test_a_model_without_a_stack_is_the_baseline(batch, params, forward):
    """J = 0, as LLaVA-1.5 is configured: the same numbers as J = 4 groups of zeros."""
    config = tiny_config({"deepstack.stack": "none"})
    assert config.layout.groups == 0
    baseline = jax.jit(build_model(config).apply)({"params": params}, batch._replace(stack_source=batch.stack_source[:, :0]))
    zero = forward(params, batch._replace(stack_source=np.full_like(batch.stack_source, ZERO)))
    chex.assert_trees_all_close(baseline.hidden, zero, atol=1e-6)


@pytest.fixture(scope="module")
def gradients(batch, params):
    """d(loss of row r) / d(pixels) [B, B, C, y, x, 3] and d(loss of row r) / d(stack) [B, J, B, M, D], r first."""

    def losses(pixels, added):
        def run(model):
            x, stack, index = model.inputs(batch._replace(pixels=pixels))
            mask = causal_segment_mask(jnp.asarray(batch.segment_ids), jnp.asarray(batch.positions))
            rotary = model.layers.rotary(batch.positions, batch.segment_ids)
            return model.logits(model.layers(x, rotary, mask, stack + added, index).hidden)

        scores = jax.nn.log_softmax(MODEL.apply({"params": params}, method=run))
        picked = jnp.take_along_axis(scores, batch.targets[..., None], -1)[..., 0]
        return -(picked * batch.loss_weights).sum(axis=1)

    added = jnp.zeros((4, 8, 12, 32))
    return jax.device_get(jax.jit(jax.jacrev(losses, argnums=(0, 1)))(batch.pixels.astype(np.float32), added))


def test_the_loss_of_a_row_depends_on_its_own_crops_only(batch, gradients):
    by_crop = np.abs(gradients[0]).max(axis=(3, 4, 5))
    used = batch.pixels.any(axis=(2, 3, 4))
    assert used.sum(axis=1).tolist() == [0, 5, 0, 10, 0, 3, 0, 6]
    for row in range(8):
        expected = np.zeros_like(used)
        expected[row] = used[row]
        np.testing.assert_array_equal(by_crop[row] > 0, expected)


def test_the_gradient_of_the_stack_reaches_every_group_of_the_row_and_no_other(batch, gradients):
    by_token = np.abs(gradients[1]).max(axis=-1)
    for row in range(8):
        placed = np.zeros((8, 12), bool)
        placed[row, batch.visual_index[row][batch.visual_index[row] >= 0]] = True
        for group in range(4):
            np.testing.assert_array_equal(by_token[row, group] > 0, placed)


@pytest.mark.quick
def test_a_row_is_not_changed_by_its_neighbours(batch, params, forward):
    """Text-only rows come before, between and after rows with images: upstream would shift their stacks."""
    together = forward(params, batch)
    for row in range(8):
        alone = only_rows(batch, row)
        close(forward(params, alone), together, alone, 1e-6)


@pytest.mark.quick
def test_a_packed_row_equals_its_examples_alone(rows, batch, params, forward):
    packed = np.asarray(forward(params, batch))[7]
    apart = make_batch(CONFIG, [*rows[:6], *([one] for one in rows[7])])
    alone = np.asarray(forward(params, apart))
    a, b = (one.length for one in rows[7])
    np.testing.assert_allclose(packed[:a], alone[6, :a], atol=1e-5)
    np.testing.assert_allclose(packed[a : a + b], alone[7, :b], atol=1e-5)


@pytest.mark.quick
def test_left_padding_equals_right_padding(rows, batch, params, forward):
    left = make_batch(CONFIG, [*rows[:7], [rows[7][0]]], pad_left=3)
    right = make_batch(CONFIG, [*rows[:7], [rows[7][0]]])
    assert not left.segment_ids[:, :3].any()
    ours, theirs = forward(params, left), forward(params, right)
    close(np.roll(ours, -3, axis=1), theirs, right)


def test_sentinels_are_exact(batch, params):
    model = dataclasses.replace(MODEL, newline=True)
    with_newline = model_params(model, batch)
    features = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
    source = np.array([[0, ZERO, NEWLINE, 7], [NEWLINE, NEWLINE, ZERO, 3]])
    tokens = model.apply({"params": with_newline}, features, source, method="gather_project")
    assert not np.asarray(tokens)[source == ZERO].any()
    newline = np.asarray(with_newline["image_newline"])
    assert newline.any()
    np.testing.assert_array_equal(np.asarray(tokens)[source == NEWLINE], np.tile(newline, (3, 1)))
    projected = model.apply(
        {"params": with_newline}, np.zeros((1, 1, 16), np.float32), np.zeros((1, 1), int), method="gather_project"
    )
    assert np.abs(projected).min() > 0, "projector(0) is not 0: the sentinel is not the projection of nothing"
    real = np.asarray(tokens)[source >= 0]
    assert (np.abs(real).max(axis=1) > 0).all()
    without = MODEL.apply({"params": params}, features, np.where(source == NEWLINE, ZERO, source), method="gather_project")
    assert not np.asarray(without)[source == NEWLINE].any()


def test_compute_dtype_is_bfloat16_with_float32_logits(batch, params):
    model = build_model(tiny_config({"train.compute_dtype": "bfloat16"}))
    output = jax.eval_shape(model.apply, {"params": params}, batch)
    logits = jax.eval_shape(lambda hidden: model.apply({"params": params}, hidden, method="logits"), output.hidden)
    assert output.hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), batch))} == {
        jnp.dtype("float32")
    }


@pytest.mark.quick
def test_every_parameter_carries_logical_axes_that_the_rules_know(batch):
    model = dataclasses.replace(MODEL, newline=True)
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    specs = traverse_util.flatten_dict(nn.get_partition_spec(boxed), sep="/")
    shapes = traverse_util.flatten_dict(nn.unbox(boxed), sep="/")
    assert set(specs) == set(shapes)
    unnamed = [path for path, spec in specs.items() if spec is None or not any(spec) or len(spec) != shapes[path].ndim]
    assert not unnamed
    used = {name for spec in specs.values() for name in spec if name}
    assert used <= dict(RULES).keys()


@pytest.mark.quick
def test_activations_carry_logical_axes_that_the_rules_know(batch, params, monkeypatch):
    seen = set()
    constrain = nn.with_logical_constraint

    def recording(x, axes, *args, **kwargs):
        assert x.ndim == len(axes), f"{axes} on an array of shape {x.shape}"
        seen.add(tuple(axes))
        return constrain(x, axes, *args, **kwargs)

    monkeypatch.setattr(nn, "with_logical_constraint", recording)
    jax.eval_shape(MODEL.apply, {"params": params}, batch)
    assert seen == {
        ("crops", None, None, None),
        ("crops", None, "vision_embed"),
        ("crops", None, "vision_heads", "head_dim"),
        ("crops", None, "vision_mlp"),
        ("batch", "crop_slots", None, None),
        ("batch", None, None, "stack_embed"),
        ("batch", "visual_tokens", None),
        (None, "vocab", "embed"),
        (None, "batch", None, "stack_embed"),
        ("batch", None, "stack_embed"),
        ("batch", None, "embed"),
        ("batch", "sequence", "embed"),
        ("batch", "sequence", "heads", "head_dim"),
        ("batch", "sequence", "mlp"),
    }
    assert {name for axes in seen for name in axes if name} <= dict(RULES).keys()


@pytest.mark.quick
def test_take_rows_has_the_gradient_of_a_gather(monkeypatch):
    """Repeated and negative indices included; the one-hot matmul and the scatter agree."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    index = jnp.array([[0, 4, 4, -1], [2, -2, 2, 2]])
    weights = jax.random.normal(jax.random.key(1), (2, 4, 3))

    def loss(x):
        return (layers.take_rows(x, index) * weights * (index >= 0)[..., None]).sum()

    by_matmul = jax.grad(loss)(x)
    monkeypatch.setattr(layers, "ONE_HOT_LIMIT", 0)
    chex.assert_trees_all_close(by_matmul, jax.grad(loss)(x), atol=1e-6)
    assert not np.any(by_matmul[0, 1:4]), "rows that nobody asked for"
