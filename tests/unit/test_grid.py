"""Grids and their geometry: the official tables, and the properties that hold for every image size."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepstack_jax.layout.grid import anyres_grids, best_grid, candidate_grids, letterbox, square_grid, unpad_box

GOLDEN = Path(__file__).parents[1] / "golden" / "preprocess"
SIZES = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000))


def read(name):
    return json.loads((GOLDEN / name).read_text())


def swap(pairs):
    return [(second, first) for first, second in pairs]


@pytest.mark.parametrize("index", range(18))
def test_best_grid_equals_official_table(index):
    golden = read("bestgrid.json")
    assert len(golden["tables"]) == 18
    table = golden["tables"][index]
    crop = table["crop"]
    if "pinpoints" in table:
        candidates = anyres_grids([(w * crop, h * crop) for w, h in table["pinpoints"]], crop)
        assert list(candidates) == swap(table["pinpoints"])
    else:
        candidates = candidate_grids(table["num_crops"])
        assert list(candidates) == swap(table["possible_grids_wh"])
    assert [best_grid(size, candidates, crop) for size in golden["sizes_wh"]] == swap(table["bestgrid_wh"])


def test_letterbox_equals_official_table():
    for case in read("resize_and_pad.json"):
        (width, height), (x, y) = letterbox(case["size_wh"], case["target_wh"])
        assert [x, y, x + width, y + height] == case["bbox_ltrb"], case


def test_unpad_box_equals_official_table():
    cases = read("unpad.json")
    assert len(cases) == 1200
    for case in cases:
        cols, rows = (cells * case["side"] for cells in case["grid_wh"])
        mosaic = np.arange(rows * cols).reshape(rows, cols)
        left = mosaic[unpad_box(case["size_wh"], rows, cols)]
        assert list(left.shape) == case["out_hw"], case
        if left.size:
            assert left[0, 0] == case["top"] * cols + case["left"], case


@given(SIZES, st.integers(2, 36), st.sampled_from([28, 224, 336]))
def test_best_grid_is_a_candidate_within_the_budget(size_wh, num_crops, crop):
    rows, cols = best_grid(size_wh, candidate_grids(num_crops), crop)
    assert (rows, cols) in candidate_grids(num_crops)
    assert 2 <= rows * cols <= num_crops


@given(SIZES, st.integers(2, 16), st.sampled_from([28, 336]))
def test_best_grid_is_not_beaten(size_wh, num_crops, crop):
    def value(grid):
        height, width = grid[0] * crop, grid[1] * crop
        scale = min(width / size_wh[0], height / size_wh[1])
        effective = min(int(size_wh[0] * scale) * int(size_wh[1] * scale), size_wh[0] * size_wh[1])
        return effective, effective - width * height

    grids = candidate_grids(num_crops)
    best = best_grid(size_wh, grids, crop)
    assert all(value(grid) < value(best) for grid in grids[: grids.index(best)])  # the first of equals wins
    assert all(value(grid) <= value(best) for grid in grids)


@given(SIZES, st.tuples(st.integers(1, 8), st.integers(1, 8)), st.sampled_from([28, 336]))
def test_letterbox_touches_one_pair_of_sides_and_centres(size_wh, grid, crop):
    target = grid[1] * crop, grid[0] * crop
    new_wh, offset = letterbox(size_wh, target)
    assert any(new == full for new, full in zip(new_wh, target, strict=True))
    for new, full, start in zip(new_wh, target, offset, strict=True):
        assert 1 <= new <= full
        assert start == (full - new) // 2


@given(SIZES, st.integers(1, 96), st.integers(1, 96))
def test_unpad_box_keeps_one_axis_whole_and_stays_inside(size_wh, rows, cols):
    kept = unpad_box(size_wh, rows, cols)
    assert slice(0, rows) == kept[0] or slice(0, cols) == kept[1]
    for part, whole in zip(kept, (rows, cols), strict=True):
        assert 0 <= part.start <= part.stop <= whole
        assert part.start == whole - part.stop


@pytest.mark.parametrize(("num_crops", "side"), [(1, 1), (2, 1), (4, 2), (6, 2), (9, 3), (15, 3), (16, 4)])
def test_square_grid(num_crops, side):
    assert square_grid(num_crops) == (side, side)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: candidate_grids(1), "num_crops is 1"),
        (lambda: square_grid(0), "num_crops is 0"),
        (lambda: anyres_grids([], 336), "at least one pinpoint"),
        (lambda: anyres_grids([(672, 336), (672, 500)], 336), "672x500 is not a whole number of 336 px"),
        (lambda: anyres_grids([(0, 336)], 336), "0x336"),
        (lambda: best_grid((0, 5), candidate_grids(4), 336), r"\(0, 5\), expected at least 1 pixel"),
        (lambda: best_grid((5, 5), (), 336), "no candidate grids"),
        (lambda: letterbox((5, 0), (28, 28)), "at least 1 pixel"),
        (lambda: unpad_box((5, 0), 4, 4), "at least 1 pixel"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
