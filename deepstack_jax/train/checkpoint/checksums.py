"""Checksums of a state's arrays, on the device and on disk, and how two sets of arrays differ.

The sum over all elements of weight(row) * weight(place in the row) * mixed bits, modulo 2**32; weights are odd numbers that
look random. It does not depend on how the array is split over devices. A flipped bit always changes it; a missing chunk, one
of zeros, and two that changed places do but for one chance in some 2**31. It cannot see another change that happens to give
the same sum. Names, shapes and dtypes are compared by `mismatches`.
"""

import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from deepstack_jax.printing import some
from deepstack_jax.types import PyTree

_READ_AT_ONCE = 2**28  # bytes of host memory that reading back may take
_ALGORITHM = "algorithm"  # the key of the sums that says how they were made; those from before there was a second have none


def named(tree: PyTree) -> dict[str, Any]:
    """Leaves by the name under which Orbax stores them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def algorithm_of(sums: dict[str, int]) -> int:
    """How stored checksums were made, as the functions below take it: 2 = as said above, 1 = the plain sum of all bits."""
    return sums.get(_ALGORITHM, 1)


def checksums(state: PyTree, algorithm: int = 2) -> dict[str, int]:
    """Checksum of every array, computed where it lies; only the sums come to the host."""
    sums = jax.device_get(_sums(named(state), algorithm))
    return _labelled({name: int(total) for name, total in sums.items()}, algorithm)


def base_checksum(arrays: Mapping[str, Any]) -> Any:
    """One checksum, u32[], of arrays of jax by name, traced or not: of their values in bfloat16, whatever they are kept in.

    Those of parts of the arrays add up to that of all.
    """
    return _joined(_sums({name: array.astype(jnp.bfloat16) for name, array in arrays.items()}, 2))


def base_checksum_in_memory(arrays: Mapping[str, Any]) -> int:
    """The same of numpy arrays, or of what gives one when asked for all of its elements; one is there after the other."""
    sums = {}
    for name, array in arrays.items():
        whole = array[tuple(slice(None) for _ in array.shape)]
        sums[name] = np.full(1, _sum(whole.astype("bfloat16")), np.uint32)  # no scalar, which would warn of overflow
    return int(_joined(sums)[0])


def _joined(sums: Mapping[str, Any]) -> Any:
    return sum((sums[name] * np.uint32(zlib.crc32(name.encode()) | 1) for name in sums), np.uint32(0))


def checksums_in_memory(arrays: PyTree, algorithm: int = 2) -> dict[str, int]:
    """The same of numpy arrays."""
    return _labelled({name: _sum(array, algorithm) for name, array in named(arrays).items()}, algorithm)


def checksums_on_disk(folder: Path, algorithm: int = 2) -> dict[str, int]:
    """The same of the arrays that Orbax wrote, every byte read; in the host's memory is a part of one array at a time.

    Raises:
      ValueError, OSError: a file is missing, cut or not what it should be.
    """
    store = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/"}
    keys = tensorstore.KvStore.open(store).result().list().result()
    names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
    specs = {name: {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}} for name in names}
    return _labelled({name: _sum_on_disk(spec, algorithm) for name, spec in specs.items()}, algorithm)


def _labelled(sums: dict[str, int], algorithm: int) -> dict[str, int]:
    return sums if algorithm == 1 else {_ALGORITHM: algorithm, **sums}


def _sum_on_disk(spec: dict[str, Any], algorithm: int) -> int:
    array = tensorstore.open(spec, read=True).result()
    if array.rank == 0:
        return _sum(array.read().result(), algorithm)
    per_row = max(1, int(np.prod(array.shape[1:])) * array.dtype.numpy_dtype.itemsize)
    rows = max(1, _READ_AT_ONCE // per_row)
    parts = (
        _sum(array[first : min(first + rows, array.shape[0])].read().result(), algorithm, first)
        for first in range(0, array.shape[0], rows)
    )
    return sum(parts) % 2**32


@partial(jax.jit, static_argnums=1)
def _sums(arrays: dict[str, jax.Array], algorithm: int) -> dict[str, jax.Array]:
    def total(array: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(jnp.atleast_1d(array), jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
        bits = bits.astype(jnp.uint32)
        if algorithm == 1:
            return jnp.sum(bits, dtype=jnp.uint32)
        # Index by index, since a reshape would gather an array that is cut over devices.
        places = jnp.zeros((), jnp.uint32)
        for axis in range(1, bits.ndim):
            places = places * np.uint32(bits.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        weights = _weights(jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 0), _ROWS) * _weights(places, _PLACES)
        return jnp.sum((bits ^ (bits >> 16)) * weights, dtype=jnp.uint32)

    return jax.tree.map(total, arrays)


def _sum(array: np.ndarray, algorithm: int = 2, first: int = 0) -> int:
    """Of an array, or of its rows from `first` on."""
    rows = array.shape[0] if array.ndim else 1
    kind = f"u{min(array.dtype.itemsize, 4)}"
    bits = np.ascontiguousarray(array).reshape(-1).view(kind).astype(np.uint32, copy=False)
    if algorithm == 1:
        return int(bits.sum(dtype=np.uint64)) % 2**32
    bits = (bits ^ (bits >> np.uint32(16))).reshape(rows, -1)
    bits *= _weights(np.arange(bits.shape[1], dtype=np.uint32), _PLACES)
    by_row = bits.sum(axis=1, dtype=np.uint32) * _weights(np.arange(first, first + rows).astype(np.uint32), _ROWS)
    return int(by_row.sum(dtype=np.uint32))


_ROWS, _PLACES = np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15)  # so that rows and places do not weigh alike


def _weights(index: Any, salt: np.uint32) -> Any:
    """Odd numbers by index: the mixing of MurmurHash3 (`fmix32`); numpy or jax, u32 in and out."""
    x = index ^ salt
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)) | np.uint32(1)


def damage(expected: dict[str, int], found: dict[str, int]) -> str:
    """Which arrays are not what was saved, as one line; "" if all are."""
    lost = [name for name in expected if name not in found]
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    parts = [f"{len(names)} arrays {what}: {some(names)}" for what, names in (("missing", lost), ("changed", changed)) if names]
    return "; ".join(parts)


def mismatches(stored: PyTree, wanted: PyTree) -> list[str]:
    """A line for every array that is stored and not wanted, wanted and not stored, or of another shape or dtype."""
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
