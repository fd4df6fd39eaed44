"""Tensors on disk: which there are in a safetensors file, without reading them, and each one's bytes when asked for.

A tensor is mapped into memory when it is read and let go with the array, so that a checkpoint is never in memory whole.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from deepstack_jax.errors import WeightsError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),  # buffers of older transformers, which are left out
}

BEYOND_FILE = "deepstack_jax.json"  # in a folder that we wrote: what the official files cannot say


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `read` gives it as an array over the file's bytes; nothing is read before its elements are."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __post_init__(self) -> None:
        """Raises WeightsError on sizes that no array can have, even where another size is 0."""
        if math.prod(max(size, 1) for size in self.shape) > 2**48:
            raise WeightsError(
                f"{self.file} has a tensor of {str(list(self.shape))[:100]}, which fits no model; download it again"
            )

    def part(self, number: int, parts: int) -> "StoredTensor":
        """One of so many equal parts of its rows."""
        if parts == 1:
            return self
        rows = self.shape[0] // parts if self.shape else 0
        if not rows or self.shape[0] % parts:
            raise WeightsError(f"{self.file} has a tensor of {list(self.shape)} that is {parts} in one; download it again")
        of_part = (rows, *self.shape[1:])
        return StoredTensor(self.file, self.dtype, of_part, lambda: self.read()[number * rows : (number + 1) * rows])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def map_bytes(file: Path, offset: int, dtype: np.dtype, count: int) -> np.ndarray:
    """`count` elements of a file as a flat read-only array."""
    if count == 0:
        return np.empty(0, dtype)
    raw = np.memmap(file, np.uint8, mode="r", offset=offset, shape=(count * dtype.itemsize,))
    return raw.view(np.ndarray).view(dtype)


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name; WeightsError where it is not a whole one, of numbers that are read here."""
    try:
        with safe_open(file, "numpy"):  # checks that shapes and places fit each other and the file, without gap or overlap
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length), object_pairs_hook=_once)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{file} is not a whole safetensors file ({' '.join(str(error).split())[:200]}); copy or download it again"
        ) from error
    header.pop("__metadata__", None)
    return {name: _described(file, name, entry, 8 + length) for name, entry in header.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys must all differ: of two tensors under one name neither can be trusted."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _described(file: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise WeightsError(
            f"{file}: {name[:200]} is stored as {entry['dtype']}, expected one of {', '.join(DTYPES)}; quantised weights are "
            "not read: give the folder of the full-precision model"
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    first = start + entry["data_offsets"][0]
    return StoredTensor(file, dtype, shape, lambda: map_bytes(file, first, dtype, math.prod(shape)).reshape(shape))


def copy_into(out: np.ndarray, part: np.ndarray) -> None:
    """`out[...] = part`, in strips: the plain copy of a large transposed matrix misses the cache at every element."""
    strip = 128  # columns: so many lines of `part` stay in the cache until they are used up
    if part.ndim < 2 or part.strides[-1] == min(part.strides):
        out[...] = part
    elif part.ndim == 3 and part.shape[2] <= strip and part.strides[0] == min(part.strides):
        for middle in range(part.shape[1]):
            out[:, middle] = part[:, middle]
    else:
        for at in range(0, part.shape[-1], strip):
            out[..., at : at + strip] = part[..., at : at + strip]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Like np.empty, at an address that jax on a CPU takes over as it is instead of copying."""
    nbytes, alignment = math.prod(shape) * dtype.itemsize, 64
    raw = np.empty(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes].view(dtype).reshape(shape)
