"""Which crops an image gets, and the geometry of letterboxing it and of undoing that on features (paper section 3.1).

Grids are `(rows, cols)`; image sizes are `(width, height)`, as in PIL, and named `size_wh`.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

Grid = tuple[int, int]  # (rows, cols)


@lru_cache
def candidate_grids(num_crops: int) -> tuple[Grid, ...]:
    """Every grid of at most `num_crops` cells but 1x1, columns outer, rows inner: `best_grid` lets the first of equals win."""
    if num_crops < 2:
        raise ValueError(
            f"num_crops is {num_crops}, but a crop grid needs at least 2; use mode 'square' for one view per image"
        )
    pairs = ((rows, cols) for cols in range(1, num_crops + 1) for rows in range(1, num_crops // cols + 1))
    return tuple(grid for grid in pairs if grid != (1, 1))


def square_grid(num_crops: int) -> Grid:
    """The largest square grid of at most `num_crops` cells, whatever the image's shape (upstream's `2xsample`)."""
    if num_crops < 1:
        raise ValueError(f"num_crops is {num_crops}, but a square grid needs at least 1")
    return (math.isqrt(num_crops), math.isqrt(num_crops))


def anyres_grids(pinpoints: Sequence[tuple[int, int]], crop_size: int) -> tuple[Grid, ...]:
    """LLaVA-NeXT's list of resolutions as grids, in the order given.

    Args:
        pinpoints: (width, height) in pixels, whole multiples of `crop_size`.
        crop_size: side of a crop in pixels.

    Raises:
        ValueError: no pinpoint, or one that is not made of whole crops; upstream would fill the rest with black cells
            that its own grid does not count.
    """
    if not pinpoints:
        raise ValueError("anyres needs at least one pinpoint (width, height), got none")
    for width, height in pinpoints:
        if min(width, height) < crop_size or width % crop_size or height % crop_size:
            raise ValueError(f"pinpoint {width}x{height} is not a whole number of {crop_size} px crops; use multiples of it")
    return tuple((height // crop_size, width // crop_size) for width, height in pinpoints)


def best_grid(size_wh: tuple[int, int], candidates: Sequence[Grid], crop_size: int) -> Grid:
    """The grid that keeps most pixels of an image fitted into it; among equals the one with least empty area, then the first.

    The float arithmetic is upstream's (`select_best_resolution`): another order of operations decides ties differently.

    Args:
        size_wh: (width, height) of the image in pixels.
        candidates: grids (rows, cols), in order of preference.
        crop_size: side of a crop in pixels.
    """
    width, height = _positive(size_wh)
    if not candidates:
        raise ValueError(f"no candidate grids for an image of {width}x{height}; see candidate_grids and anyres_grids")

    def key(grid: Grid) -> tuple[int, int]:
        grid_height, grid_width = grid[0] * crop_size, grid[1] * crop_size
        scale = min(grid_width / width, grid_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - grid_width * grid_height

    return max(candidates, key=key)  # max keeps the first of equals


def letterbox(size_wh: tuple[int, int], target_wh: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Fit an image into a target keeping its aspect, centred.

    Returns:
        (width, height) of the resized image and the (x, y) of its upper left corner in the target, in pixels.
    """
    (width, height), (target_width, target_height) = _positive(size_wh), target_wh
    scale_w, scale_h = target_width / width, target_height / height
    if scale_w < scale_h:
        new_wh = target_width, min(math.ceil(height * scale_w), target_height)
    else:
        new_wh = min(math.ceil(width * scale_h), target_width), target_height
    return new_wh, ((target_width - new_wh[0]) // 2, (target_height - new_wh[1]) // 2)


def unpad_box(size_wh: tuple[int, int], rows: int, cols: int) -> tuple[slice, slice]:
    """The part of a feature mosaic of a letterboxed image that shows the image (LLaVA-NeXT's `spatial_unpad`).

    An image far thinner than one feature may leave nothing, or one row or column where the mosaic's side is odd: as upstream.

    Args:
        size_wh: (width, height) of the original image in pixels.
        rows, cols: size of the mosaic in features.

    Returns:
        The slices of the mosaic's rows and columns that remain; equal padding is cut on both sides, rounded down.
    """
    width, height = _positive(size_wh)
    if width / height > cols / rows:
        padding = (rows - int(height * (cols / width))) // 2
        return slice(padding, rows - padding), slice(0, cols)
    padding = (cols - int(width * (rows / height))) // 2
    return slice(0, rows), slice(padding, cols - padding)


def _positive(size_wh: tuple[int, int]) -> tuple[int, int]:
    if min(size_wh) < 1:
        raise ValueError(f"image size (width, height) is {tuple(size_wh)}, expected at least 1 pixel each way")
    return size_wh
