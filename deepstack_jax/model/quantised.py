"""Kernels kept quantised, weight-only, by qwix: a code for every element and a float32 scale for every block of inputs."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

BLOCK = 64  # inputs that share a scale, as in QLoRA (arXiv 2305.14314); fewer where an axis is not a multiple of it


@struct.dataclass
class QuantisedKernel:
    """A kernel in place of an array: `astype` gives the array, computed where it is used, layer by layer inside the scan.

    Attributes:
      codes: int8, or for nf4 uint8 below 16, of the kernel's shape but for what is packed.
      scales: f32, of the kernel's shape but for the last input axis, which counts blocks.
      kind: int8 | nf4.
      packed: the axis, counted from the end, on which two neighbours share a byte, the first in its lower half; None = none.
    """

    codes: Any
    scales: Any
    kind: str = struct.field(pytree_node=False)
    packed: int | None = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        axis = None if self.packed is None else self.ndim + self.packed
        return tuple(size * (1 + (at == axis)) for at, size in enumerate(self.codes.shape))

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dtype(self) -> np.dtype:
        """Of what it is made from."""
        return np.dtype(jnp.bfloat16)

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """The kernel as an array, multiplied in float32 and rounded once."""
        import qwix  # here, since an extra installs it

        codes = self.codes if self.packed is None else unpack(self.codes, self.packed)
        return qwix.dequantize(qwix.QArray(codes, self.scales, None, self.kind)).astype(dtype)

    def no_gradient(self) -> QuantisedKernel:
        """What a derivative has in its place."""
        nothing = np.zeros(self.codes.shape, jax.dtypes.float0)
        return QuantisedKernel(nothing, jnp.zeros_like(self.scales), self.kind, self.packed)


def pack(codes: jax.Array, axis: int) -> jax.Array:
    """Codes below 16, two neighbours of an even `axis` in a byte.

    jax has uint4, but 0.10 refuses arrays of it as arguments of a step that was compiled beforehand.
    """
    first, second = (jax.lax.slice_in_dim(codes, start, None, 2, axis) for start in (0, 1))
    return first | second << 4


def unpack(codes: jax.Array, axis: int) -> jax.Array:
    """The inverse of `pack`. Neighbours stay on one device where the axis is cut over several."""
    shape = [size * (1 + (at == axis % codes.ndim)) for at, size in enumerate(codes.shape)]
    return jnp.stack([codes & 15, codes >> 4], axis % codes.ndim + 1).reshape(shape)


def quantise(kernels: jax.Array, inputs: int, kind: str, *, packed: bool) -> QuantisedKernel:
    """Kernels [L, *in, *out] of all layers, one layer at a time.

    Args:
      inputs: axes that are contracted.
      packed: codes of nf4 lie two to a byte along the last of them, which is even.
    """
    import qwix

    axis = inputs - kernels.ndim if packed and kind == "nf4" else None

    def one(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        tile = {inputs - 1: math.gcd(BLOCK, kernel.shape[inputs - 1])}
        others = [axis for axis in range(kernel.ndim) if axis not in tile]
        found = qwix.quantize(kernel.astype(jnp.float32), kind, tiled_axes=tile, channelwise_axes=others)
        codes = found.qvalue.astype(jnp.uint8 if kind == "nf4" else jnp.int8)
        return codes if axis is None else pack(codes, axis), found.scale

    codes, scales = jax.lax.map(one, kernels)
    return QuantisedKernel(codes, scales, kind, axis)


def boxed_quantised(boxed: Any, inputs: int, kind: str, *, packed: bool) -> QuantisedKernel:
    """The abstract quantised kernels of abstract kernels [L, *in, *out] with their logical axes.

    Scales are whole along the axis of their blocks, which are too few to be cut by every mesh.
    """
    shapes = jax.eval_shape(lambda kernels: quantise(kernels, inputs, kind, packed=packed), boxed.value)
    names = tuple(None if axis == inputs else name for axis, name in enumerate(boxed.names))
    codes, scales = boxed.replace(value=shapes.codes), boxed.replace(value=shapes.scales, names=names)
    return QuantisedKernel(codes, scales, kind, shapes.packed)
