"""Checksums of a state's arrays, on the device and on disk, and how two sets of arrays differ.

The sum of an array's bits as whole numbers, modulo 2**32: it does not depend on how the array is split over devices, and a
flipped bit, a missing chunk or one of zeros changes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from deepstack_jax.types import PyTree

_READ_AT_ONCE = 2**28  # bytes of host memory that reading back may take
_SHOWN = 8


def named(tree: PyTree) -> dict[str, Any]:
    """Leaves by the name under which Orbax stores them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def checksums(state: PyTree) -> dict[str, int]:
    """Checksum of every array, computed where it lies; only the sums come to the host."""
    return {name: int(total) for name, total in jax.device_get(_sums(named(state))).items()}


def checksums_in_memory(arrays: PyTree) -> dict[str, int]:
    """The same of numpy arrays."""
    return {name: _sum(array) for name, array in named(arrays).items()}


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(array: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(total, arrays)


def checksums_on_disk(folder: Path) -> dict[str, int]:
    """The same of the arrays that Orbax wrote, every byte read; in the host's memory is a part of one array at a time.

    Raises:
      ValueError, OSError: a file is missing, cut or not what it should be.
    """
    store = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/"}
    keys = tensorstore.KvStore.open(store).result().list().result()
    names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
    return {name: _sum_on_disk({"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}) for name in names}


def _sum_on_disk(spec: dict[str, Any]) -> int:
    array = tensorstore.open(spec, read=True).result()
    if array.rank == 0:
        return _sum(array.read().result())
    per_row = max(1, int(np.prod(array.shape[1:])) * array.dtype.numpy_dtype.itemsize)
    rows = max(1, _READ_AT_ONCE // per_row)
    parts = (_sum(array[first : min(first + rows, array.shape[0])].read().result()) for first in range(0, array.shape[0], rows))
    return sum(parts) % 2**32


def _sum(array: np.ndarray) -> int:
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    return int(bits.sum(dtype=np.uint64)) % 2**32


def damage(expected: dict[str, int], found: dict[str, int]) -> str:
    """Which arrays are not what was saved, as one line; "" if all are."""
    lost = [name for name in expected if name not in found]
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    parts = [
        f"{len(names)} arrays {what}: {_some(names)}" for what, names in (("missing", lost), ("changed", changed)) if names
    ]
    return "; ".join(parts)


def mismatches(stored: PyTree, wanted: PyTree) -> list[str]:
    """Every array that is stored and not wanted, wanted and not stored, or of another shape or dtype; one line each.

    Args:
      stored, wanted: trees whose leaves have shape and dtype.
    """
    there, here = named(stored), named(wanted)
    lines = [f"{name} is missing" for name in here if name not in there]
    lines += [f"{name} is unknown" for name in there if name not in here]
    for name in here:
        ours, theirs = here[name], there.get(name)
        if theirs is None:
            continue
        if tuple(theirs.shape) != tuple(ours.shape):
            lines.append(f"{name} has the shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}")
        elif np.dtype(theirs.dtype) != np.dtype(ours.dtype):
            lines.append(f"{name} is {theirs.dtype}, expected {ours.dtype}")
    return lines


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
