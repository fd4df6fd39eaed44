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
      codes: int8, or for nf4 uint8 below 16, of the kernel's shape.
      scales: f32, of that shape but for the last input axis, which counts blocks.
      kind: int8 | nf4.
    """

    codes: Any
    scales: Any
    kind: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

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

        return qwix.dequantize(qwix.QArray(self.codes, self.scales, None, self.kind)).astype(dtype)

    def no_gradient(self) -> QuantisedKernel:
        """What a derivative has in its place."""
        return QuantisedKernel(np.zeros(self.codes.shape, jax.dtypes.float0), jnp.zeros_like(self.scales), self.kind)


def quantise(kernels: jax.Array, inputs: int, kind: str) -> QuantisedKernel:
    """Kernels [L, *in, *out] of all layers, one layer at a time; `inputs` axes are contracted."""
    import qwix

    def one(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        tile = {inputs - 1: math.gcd(BLOCK, kernel.shape[inputs - 1])}
        others = [axis for axis in range(kernel.ndim) if axis not in tile]
        found = qwix.quantize(kernel.astype(jnp.float32), kind, tiled_axes=tile, channelwise_axes=others)
        # One code of nf4 to a byte: jax 0.10 refuses arrays of uint4 as arguments of a step that was compiled beforehand.
        return found.qvalue.astype(jnp.uint8 if kind == "nf4" else jnp.int8), found.scale

    codes, scales = jax.lax.map(one, kernels)
    return QuantisedKernel(codes, scales, kind)


def boxed_quantised(boxed: Any, inputs: int, kind: str) -> QuantisedKernel:
    """The abstract quantised kernels of abstract kernels [L, *in, *out] with their logical axes.

    Scales are whole along the axis of their blocks, which are too few to be cut by every mesh.
    """
    shapes = jax.eval_shape(lambda kernels: quantise(kernels, inputs, kind), boxed.value)
    names = tuple(None if axis == inputs else name for axis, name in enumerate(boxed.names))
    return QuantisedKernel(boxed.replace(value=shapes.codes), boxed.replace(value=shapes.scales, names=names), kind)
