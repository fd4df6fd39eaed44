"""Where every visual token goes: sampling tables, the layer schedule, one image's layout, and rows of several images."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepstack_jax.batch import NEWLINE, TEXT, ZERO, Batch, BatchShape, check_batch, empty_batch
from deepstack_jax.data.encode.batch_rows import Cursor, EncodedExample, ExampleSize, fill, place_example
from deepstack_jax.data.encode.labels import IMAGE_TOKEN
from deepstack_jax.data.example import BadExample
from deepstack_jax.layout.grid import candidate_grids, unpad_box
from deepstack_jax.layout.sequence import SEQUENCES, STACKS, LayoutSpec, VisualLayout
from deepstack_jax.layout.stack import SAMPLINGS, layer_schedule
from tests.unit.tiny import example, make_batch, tiny_config

pytestmark = pytest.mark.quick

SIDE, PATCHES, CROPS = 2, 4, 4
GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


def by_hand(sampling: str, rows: int, cols: int, side: int) -> list[list[int]]:
    """The groups by their definition, token by token: where (y, x) of the mosaic goes, and which crop it comes from."""
    groups: list[list[int]] = [[] for _ in range(rows * cols)]
    for y in range(rows * side):
        for x in range(cols * side):
            crop = (y // side) * cols + x // side
            token = crop * side**2 + (y % side) * side + x % side
            place = {"2d": (y % rows) * cols + x % cols, "1d": (y * cols * side + x) % (rows * cols), "grid": crop}
            groups[place[sampling]].append(token)
    return groups


@pytest.mark.parametrize("sampling", SAMPLINGS)
@given(GRIDS)
def test_sampling_is_a_permutation_of_the_mosaic(sampling, grid):
    table = SAMPLINGS[sampling](*grid)
    rows, cols, side = grid
    assert table.shape == (rows * cols, side**2)
    np.testing.assert_array_equal(np.sort(table.ravel()), np.arange(rows * cols * side**2))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@given(GRIDS)
def test_sampling_equals_its_definition(sampling, grid):
    np.testing.assert_array_equal(SAMPLINGS[sampling](*grid), by_hand(sampling, *grid))


def test_samplings_differ():
    tables = [SAMPLINGS[name](2, 3, 4).tolist() for name in SAMPLINGS]
    assert tables[0] != tables[1] != tables[2] != tables[0]


@given(st.integers(1, 40), st.integers(0, 20), st.integers(0, 40), st.integers(1, 7))
def test_schedule_places_groups_and_drops_those_past_the_last_layer(layers, groups, start, interval):
    schedule = layer_schedule(layers, groups, start, interval)
    wanted = {start + k * interval: k for k in range(groups) if start + k * interval < layers}
    assert schedule == tuple(wanted.get(layer, -1) for layer in range(layers))


def test_schedule_examples():
    assert layer_schedule(6, 4, 1, 1) == (-1, 0, 1, 2, 3, -1)
    assert layer_schedule(6, 4, 3, 2) == (-1, -1, -1, 0, -1, 1)
    assert layer_schedule(3, 0, 1, 1) == (-1, -1, -1)


@pytest.mark.parametrize(("start", "interval"), [(-1, 1), (0, 0), (0, -2)])
def test_schedule_refuses(start, interval):
    with pytest.raises(ValueError, match=f"start {start} and interval {interval}"):
        layer_schedule(4, 2, start, interval)


def spec_of(**changes) -> LayoutSpec:
    """DeepStack-L with four crops of 2 x 2 tokens, some of it changed."""
    plain = LayoutSpec("deepstack", SIDE, CROPS, candidate_grids(CROPS), "2d", "global", "crops", "flat")
    return replace(plain, **changes)


def fits(sequence: str, stack: str) -> bool:
    return "crops" not in sequence or stack == "none"


SIZE = (64, 48)  # of an image whose size does not matter


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("grid", [(1, 2), (2, 2)])
def test_every_variant_of_sequence_and_stack(sequence, stack, grid):
    spec = spec_of(sequence=sequence, stack=stack)
    if not fits(sequence, stack):
        with pytest.raises(ValueError, match="tokens per group"):
            spec.layout(grid, SIZE)
        return
    layout = spec.layout(grid, SIZE)
    cells = grid[0] * grid[1]
    assert layout.views == 1 + cells
    assert layout.tokens.shape == (spec.max_tokens,) == (spec.token_count(grid, SIZE),)
    assert layout.stack.shape == (spec.groups, layout.tokens.size)
    assert layout.tokens.dtype == layout.stack.dtype == np.int32

    overview, zeros = list(range(PATCHES)), [ZERO] * PATCHES
    crops = [[PATCHES + token for token in group] for group in by_hand("2d", grid[0], grid[1], SIDE)] + [zeros] * (
        CROPS - cells
    )
    flat = [token for group in crops for token in group]
    assert (
        layout.tokens.tolist() == {"global": overview, "zero": zeros, "crops": flat, "global_crops": overview + flat}[sequence]
    )
    groups = {"none": [], "crops": crops, "dummy": [overview] * CROPS, "global": [overview], "global_crops": [overview, *crops]}
    assert layout.stack.tolist() == groups[stack]


def test_without_crops():
    layout = spec_of(mode="pad", num_crops=0, grids=(), stack="none").layout(None, SIZE)
    assert (layout.views, layout.tokens.tolist(), layout.stack.shape) == (1, [0, 1, 2, 3], (0, 4))


@pytest.mark.parametrize(("sequence", "stack"), [("global", "crops"), ("crops", "none"), ("global", "global_crops")])
def test_a_variant_that_needs_crops_says_so(sequence, stack):
    with pytest.raises(ValueError, match=r"needs crops, but image mode 'pad' gives the global view alone"):
        spec_of(mode="pad", grids=(), sequence=sequence, stack=stack).layout(None, SIZE)


def test_a_grid_that_the_mode_does_not_cut_is_refused():
    with pytest.raises(ValueError, match="grid 2x3 is none of the 7"):
        spec_of().layout((2, 3), SIZE)


def mosaic_by_hand(grid, side, cell_token):
    """cell_token(cell, y, x) for every place of the picture, rows ended by the newline."""
    rows, cols = grid
    lines = []
    for y in range(rows * side):
        line = [cell_token((y // side) * cols + x // side, y % side, x % side) for x in range(cols * side)]
        lines.append([*line, NEWLINE])
    return lines


@pytest.mark.parametrize("crops", [4, 6, 9])
@pytest.mark.parametrize("grid", [(2, 2), (1, 3), (4, 1)])
def test_hd_by_its_definition(grid, crops):
    """576 global tokens, then each row of the cells' mosaic and a newline; every group likewise from each cell's own crops."""
    up, cells = math.isqrt(crops), grid[0] * grid[1]
    spec = spec_of(mode="hd", num_crops=crops, grids=candidate_grids(crops))
    layout = spec.layout(grid, SIZE)
    assert layout.views == spec.views(grid) == (1 + cells) * (1 + up**2)
    flat = [token for line in mosaic_by_hand(grid, SIDE, lambda c, y, x: (1 + c) * PATCHES + y * SIDE + x) for token in line]
    assert layout.tokens.tolist() == list(range(PATCHES)) + flat
    assert layout.stack.shape == (spec.groups, layout.tokens.size) == (up**2, spec.token_count(grid))
    assert layout.tokens.size == PATCHES + grid[0] * SIDE * (grid[1] * SIDE + 1)

    def stacked(group: int, view: int, y: int, x: int) -> int:
        y, x = y * up + group // up, x * up + group % up  # where the token is in the view's own upsampled picture
        crop = (1 + cells) + view * up**2 + (y // SIDE) * up + x // SIDE
        return crop * PATCHES + (y % SIDE) * SIDE + x % SIDE

    for group in range(up**2):
        overview = [stacked(group, 0, y, x) for y in range(SIDE) for x in range(SIDE)]
        lines = mosaic_by_hand(grid, SIDE, lambda cell, y, x, group=group: stacked(group, 1 + cell, y, x))
        assert layout.stack[group].tolist() == overview + [token for line in lines for token in line]


def test_hd_context_lengths_of_the_paper():
    spec = spec_of(mode="hd", side=24)
    lengths = {grid: spec.token_count(grid) for grid in spec.grids if grid[0] * grid[1] == 4}
    assert lengths == {(1, 4): 2904, (2, 2): 2928, (4, 1): 2976}
    assert (spec.max_tokens, spec.max_views) == (2976, 25)


PINPOINTS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@given(st.sampled_from(PINPOINTS), st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_anyres_by_its_definition(merge, grid, size_wh):
    side = 4
    spec = spec_of(mode="anyres", side=side, num_crops=0, grids=PINPOINTS, stack="none", merge=merge)
    layout = spec.layout(grid, size_wh)
    assert layout.views == spec.views(grid) == 1 + grid[0] * grid[1]
    assert layout.stack.shape == (0, layout.tokens.size)
    assert layout.tokens.size == spec.token_count(grid, size_wh) <= spec.token_count(grid) <= spec.max_tokens
    whole = list(range(side**2))
    lines = mosaic_by_hand(grid, side, lambda cell, y, x: (1 + cell) * side**2 + y * side + x)
    if merge == "flat":
        expected = range(layout.views * side**2)
    elif merge == "spatial":
        expected = whole + [token for line in lines for token in line[:-1]]
    else:
        rows, cols = unpad_box(size_wh, grid[0] * side, grid[1] * side)
        expected = whole + [token for line in lines[rows] for token in [*line[:-1][cols], NEWLINE]]
    assert layout.tokens.tolist() == list(expected)


@given(st.integers(0, 9), st.integers(1, 9))
def test_place_shifts_tokens_and_keeps_sentinels(slot, patches):
    layout = VisualLayout(np.array([0, ZERO, 3, NEWLINE], np.int32), np.array([[NEWLINE, 5, ZERO, 1]], np.int32), 2)
    placed = layout.place(slot, patches)
    shift = slot * patches
    assert placed.tokens.tolist() == [shift, ZERO, 3 + shift, NEWLINE]
    assert placed.stack.tolist() == [[NEWLINE, 5 + shift, ZERO, 1 + shift]]
    assert placed.views == 2
    assert layout.tokens.tolist() == [0, ZERO, 3, NEWLINE], "place must not change its argument"


@pytest.fixture(scope="module")
def config():
    return tiny_config()


def words(one: EncodedExample) -> np.ndarray:
    return one.ids[one.ids != IMAGE_TOKEN]


def test_two_images_in_one_row(config):
    one = example(config, 0, [(2, 2), (1, 2)])
    batch = make_batch(config, [[one]])
    n = one.length
    assert n == one.ids.size - 2 + 2 * PATCHES
    assert batch.segment_ids[0].tolist() == [1] * n + [0] * (32 - n)
    assert batch.positions[0, :n].tolist() == list(range(n))
    # BOS, a word, 4 tokens of the first image, a word, 4 tokens of the second, the rest of the text.
    assert batch.visual_index[0, :12].tolist() == [TEXT, TEXT, 0, 1, 2, 3, TEXT, 4, 5, 6, 7, TEXT]
    assert batch.tokens[0, :n][batch.visual_index[0, :n] == TEXT].tolist() == words(one).tolist()
    assert not batch.tokens[0][batch.visual_index[0] >= 0].any()
    # Slots: global view and 4 crops of the first image, global view and 2 crops of the second.
    np.testing.assert_array_equal(batch.pixels[0, :8], np.concatenate(one.pixels))
    assert not batch.pixels[0, 8:].any()
    assert batch.token_source[0].tolist() == [0, 1, 2, 3, 20, 21, 22, 23] + [ZERO] * 4
    first, second = by_hand("2d", 2, 2, SIDE), by_hand("2d", 1, 2, SIDE)
    for group in range(4):
        ours = batch.stack_source[0, group].tolist()
        assert ours[:4] == [PATCHES + token for token in first[group]]
        assert ours[4:8] == ([6 * PATCHES + token for token in second[group]] if group < 2 else [ZERO] * 4)
        assert ours[8:] == [ZERO] * 4
    assert batch.example_id[0].tolist() == [100, -1]


def test_text_only_row_keeps_fixed_shapes(config):
    one = example(config, 1)
    batch = make_batch(config, [[one], [example(config, 2, [(2, 2)])]])
    assert batch.tokens[0, : one.length].tolist() == one.ids.tolist()
    assert (batch.visual_index[0] == TEXT).all()
    assert (batch.token_source[0] == ZERO).all()
    assert (batch.stack_source[0] == ZERO).all()
    assert not batch.pixels[0].any()


def test_several_examples_in_a_row_are_segments_of_their_own(config):
    parts = [example(config, 3, [(1, 2)]), example(config, 4, [(2, 1)])]
    batch = make_batch(config, [parts])
    a, b = parts[0].length, parts[1].length
    assert batch.segment_ids[0].tolist() == [1] * a + [2] * b + [0] * (32 - a - b)
    assert batch.positions[0].tolist() == [*range(a), *range(b), *[0] * (32 - a - b)]
    assert batch.example_id[0].tolist() == [103, 104]
    placed = batch.visual_index[0]
    assert placed[:a][placed[:a] >= 0].tolist() == [0, 1, 2, 3]
    assert placed[a : a + b][placed[a : a + b] >= 0].tolist() == [4, 5, 6, 7]
    assert batch.token_source[0, 4:8].tolist() == [12, 13, 14, 15], "the second image begins in crop slot 3"
    alone = make_batch(config, [[parts[1]]])
    for field in ("tokens", "targets", "loss_weights", "positions"):
        np.testing.assert_array_equal(getattr(batch, field)[0, a : a + b], getattr(alone, field)[0, :b], err_msg=field)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=2))
def test_targets_and_weights_stay_in_their_segment(parts):
    config = tiny_config()
    examples = [example(config, seed, [(1, 2)] * images, words, answer) for seed, (images, words, answer) in enumerate(parts)]
    batch = make_batch(config, [examples], length=40)
    start = 0
    for one in examples:
        tokens, supervised = [], []
        for token, asked in zip(one.ids, one.supervised, strict=True):
            tokens += [0] * PATCHES if token == IMAGE_TOKEN else [token]
            supervised += [False] * PATCHES if token == IMAGE_TOKEN else [asked]
        span = slice(start, start + one.length)
        assert batch.targets[0, span].tolist() == [*tokens[1:], 0], "the last position predicts nothing"
        assert batch.loss_weights[0, span].tolist() == [*(float(asked) for asked in supervised[1:]), 0.0]
        start += one.length
    assert not batch.loss_weights[0, start:].any()
    assert batch.loss_weights.sum() == sum(one.supervised[1:].sum() for one in examples)


def test_blank_example_keeps_only_its_id(config):
    shape, bad = config.data_spec.batch_shape(1, 16), BadExample(77, "seventy-seven", "broken")
    batch = fill(shape, [[(bad, ExampleSize())]], config.layout.patches).batch
    untouched = empty_batch(config.data_spec.batch_shape(1, 16))
    assert batch.example_id.tolist() == [[77]]
    for name, ours, theirs in zip(Batch._fields[:-1], batch, untouched, strict=False):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def too_long(config):
    return example(config, 5, [(1, 2)], words=40), Cursor()


def too_many_images(config):
    return example(config, 5, [(2, 2)]), Cursor(crop=11)


def too_many_visual(config):
    return example(config, 5, [(1, 2)]), Cursor(visual=9)


def too_many_examples(config):
    return example(config, 5), Cursor(segment=2)


def one_image_short(config):
    whole = example(config, 5, [(1, 2), (1, 2)])
    return EncodedExample(5, whole.ids, whole.supervised, whole.pixels[:1], whole.layouts[:1]), Cursor()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (too_long, "tokens do not fit: 0 of 32 are used"),
        (too_many_images, "5 crop slots do not fit: 11 of 15 are used"),
        (too_many_visual, "4 visual tokens do not fit: 9 of 12 are used"),
        (too_many_examples, "1 examples do not fit: 2 of 2 are used"),
        (one_image_short, "2 image placeholders but 1 images"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(config, make, message):
    shape = config.data_spec.batch_shape(1, 32)._replace(examples=2)
    batch = empty_batch(shape)
    one, cursor = make(config)
    with pytest.raises(ValueError, match=message):
        place_example(batch, 0, one, cursor, PATCHES)
    for name, ours, blank in zip(Batch._fields, batch, empty_batch(shape), strict=True):
        np.testing.assert_array_equal(ours, blank, err_msg=name)


def one_view(whole):
    return (whole.pixels[0][:1],), whole.layouts


def no_pixels(whole):
    return (), whole.layouts


def one_group(whole):
    layout = whole.layouts[0]
    return whole.pixels, (VisualLayout(layout.tokens, layout.stack[:1], layout.views),)


@pytest.mark.parametrize(("change", "message"), [(one_view, "views"), (no_pixels, "views"), (one_group, "groups")])
def test_pixels_and_groups_that_contradict_the_layout_are_refused(config, change, message):
    """Numpy would broadcast one view over all slots of the image, or one group over all layers, without a word."""
    whole = example(config, 5, [(1, 2)])
    batch = empty_batch(config.data_spec.batch_shape(1, 32))
    with pytest.raises(ValueError, match=message):
        place_example(batch, 0, EncodedExample(5, whole.ids, whole.supervised, *change(whole)), Cursor(), PATCHES)


def test_check_batch_accepts_good_batches(config):
    check_batch(make_batch(config, [[example(config, 0, [(2, 2), (1, 2)])], [example(config, 1)]]), PATCHES)
    check_batch(empty_batch(BatchShape(2, 8, 1, 8, 4, 0, 1)), PATCHES)


@pytest.mark.parametrize(
    ("field", "at", "value", "message"),
    [
        ("token_source", (0, 0), 15 * PATCHES, r"token_source spans -1\.\.60, expected -2\.\.59"),
        ("token_source", (0, 0), -3, "token_source spans -3"),
        ("stack_source", (0, 1, 2), 15 * PATCHES, "stack_source spans"),
        ("stack_source", (0, 1, 2), -3, "stack_source spans -3"),
        ("visual_index", (0, 2), 12, r"visual_index reaches 12, expected -1\.\.11"),
        ("visual_index", (0, 2), -2, "visual_index"),
        ("visual_index", (0, 2), 3, "row 0: a visual token is at two positions"),
        ("loss_weights", (0, 31), 1.0, "loss_weights are not zero in the padding"),
    ],
)
def test_check_batch_catches(config, field, at, value, message):
    batch = make_batch(config, [[example(config, 0, [(2, 2)])]])
    check_batch(batch, PATCHES)
    getattr(batch, field)[at] = value
    with pytest.raises(ValueError, match=message):
        check_batch(batch, PATCHES)


@pytest.mark.parametrize(
    "limits", [{"token_source": 15 * PATCHES - 1}, {"token_source": NEWLINE}, {"stack_source": NEWLINE}, {"visual_index": 11}]
)
def test_check_batch_accepts_the_limits_themselves(config, limits):
    batch = make_batch(config, [[example(config, 0, [(2, 2)])]])
    for field, value in limits.items():
        getattr(batch, field)[(0,) * getattr(batch, field).ndim] = value
    check_batch(batch, PATCHES)
