"""The small parts that vision tower and decoder share: linear maps, norms, activations, each weight with its logical axes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deepstack_jax.types import HostOrDevice

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}


# Largest one-hot matrix, in elements per row of the batch, that stands in for a scatter.
ONE_HOT_LIMIT = 2**22


def take_rows(x: Float[HostOrDevice, "B R E"], index: Int[HostOrDevice, "B Q"]) -> Float[Array, "B Q E"]:
    """x[b, index[b, q]]; an index may repeat, negative ones give row 0.

    The gradient of a gather is a scatter, one row after the other on a CPU; where R * Q is small it is a matmul here.
    """
    x, index = jnp.asarray(x), jnp.asarray(index)
    if x.shape[1] * index.shape[1] > ONE_HOT_LIMIT:
        return _gather(x, index)
    return _take_rows(x.shape[1], x, index)


def _gather(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1, mode="clip")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take_rows(rows: int, x: Array, index: Array) -> Array:
    del rows
    return _gather(x, index)


def _take_rows_forward(rows: int, x: Array, index: Array) -> tuple[Array, Array]:
    return _take_rows(rows, x, index), index


def _take_rows_backward(rows: int, index: Array, cotangent: Array) -> tuple[Array, np.ndarray]:
    one_hot = jax.nn.one_hot(jnp.maximum(index, 0), rows, dtype=cotangent.dtype)
    return jnp.einsum("bqr,bqe->bre", one_hot, cotangent), np.zeros(index.shape, jax.dtypes.float0)


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


class Linear(nn.Module):
    """y[..., *out] = x[..., *in] @ kernel[*in, *out] (+ bias[*out]), the kernel drawn from N(0, scale / fan_in).

    `flax.linen.DenseGeneral` would do, but it reshapes its freshly drawn kernel under the wrong logical axes once axis rules
    are active.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]  # logical axes of the kernel, inputs first
    dtype: DTypeLike  # of the product; the weights are float32
    inputs: int = 1  # trailing axes of x that are contracted
    use_bias: bool = False
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
        shape = (*x.shape[-self.inputs :], *self.features)
        ins, outs = tuple(range(self.inputs)), tuple(range(self.inputs, len(shape)))
        draw = nn.initializers.variance_scaling(self.scale, "fan_in", "normal", in_axis=ins, out_axis=outs)
        kernel = self.param("kernel", nn.with_logical_partitioning(draw, self.axes), shape, jnp.float32)
        y = jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), axes=self.inputs)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[self.inputs :])
            y = y + self.param("bias", zeros, self.features, jnp.float32).astype(self.dtype)
        return y


def linear(
    features: int | tuple[int, ...],
    axes: tuple[str, ...],
    *,
    dtype: DTypeLike,
    name: str,
    inputs: int = 1,
    bias: bool = False,
    scale: float = 1.0,
) -> Linear:
    """A named Linear; `features` may be a plain number."""
    features = (features,) if isinstance(features, int) else features
    return Linear(features, axes, dtype, inputs, bias, scale, name=name)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32: squares of bf16 lose the small channels (LLaMA)."""

    eps: float
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def layer_norm(eps: float, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """LayerNorm of the vision tower; flax computes its statistics in float32."""
    return nn.LayerNorm(
        epsilon=eps,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("vision_embed",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("vision_embed",)),
        name=name,
    )
