"""The paper's sampling: how the tokens of a crop grid are dealt into groups, and which layer gets which group.

A group is the set of P high-resolution tokens that is added to the P global tokens at one layer (paper section 3.2). Every
sampling is a permutation of the mosaic, so it is one index table per grid. Tokens are counted crop-major: crop * P + patch.
"""

from collections.abc import Callable

import numpy as np


def dilated_2d(rows: int, cols: int, side: int) -> np.ndarray:
    """Group (r, c) takes every rows-th row and cols-th column of the mosaic, from (r, c) on: i32[rows * cols, side**2]."""
    mosaic = _mosaic(rows, cols, side)
    return np.stack([mosaic[r::rows, c::cols].ravel() for r in range(rows) for c in range(cols)])


def strided_1d(rows: int, cols: int, side: int) -> np.ndarray:
    """Group k takes every (rows * cols)-th token of the row-major mosaic, from k on: i32[rows * cols, side**2]."""
    tokens = _mosaic(rows, cols, side).ravel()
    return np.stack([tokens[k :: rows * cols] for k in range(rows * cols)])


def blocks(rows: int, cols: int, side: int) -> np.ndarray:
    """Group k is crop k whole: i32[rows * cols, side**2]."""
    return np.arange(rows * cols * side**2, dtype=np.int32).reshape(rows * cols, side**2)


def _mosaic(rows: int, cols: int, side: int) -> np.ndarray:
    """Crop-major index of every token of the whole picture: i32[rows * side, cols * side]."""
    crop_major = np.arange(rows * cols * side**2, dtype=np.int32).reshape(rows, cols, side, side)
    return crop_major.transpose(0, 2, 1, 3).reshape(rows * side, cols * side)


SAMPLINGS: dict[str, Callable[[int, int, int], np.ndarray]] = {"2d": dilated_2d, "1d": strided_1d, "grid": blocks}


def layer_schedule(layers: int, groups: int, start: int, interval: int) -> tuple[int, ...]:
    """The group that is added at the input of each layer, or -1: group k at layer start + k * interval.

    Groups past the last layer drop out, as upstream (its `custom_llama.py`); `config` warns of them.
    """
    if start < 0 or interval < 1:
        raise ValueError(f"start {start} and interval {interval}: expected start >= 0 and interval >= 1")
    schedule = [-1] * layers
    for group, layer in zip(range(groups), range(start, layers, interval), strict=False):
        schedule[layer] = group
    return tuple(schedule)
