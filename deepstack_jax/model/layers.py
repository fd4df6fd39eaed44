"""The small parts that vision tower and decoder share: linear maps, norms, activations, each weight with its logical axes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deepstack_jax.model.cut_weights import Axes, gradient, whole
from deepstack_jax.model.quantised import QuantisedKernel
from deepstack_jax.types import LORA, HostOrDevice

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


Kernel = Array | QuantisedKernel
PRODUCT = "product"  # the name that remat knows a product with weights by
# Largest one-hot matrix, in elements per row of the batch, that stands in for a scatter.
ONE_HOT_LIMIT = 2**22


def take_rows(
    x: Float[HostOrDevice, "B R E"],
    index: Int[HostOrDevice, "B Q"],
    dtype: DTypeLike | None = None,
    axes: tuple[str | None, ...] | None = None,
) -> Float[Array, "B Q E"]:
    """x[b, index[b, q]] in `dtype` (None = that of x); an index may repeat, negative ones give row 0.

    The gradient of a row that was taken often is a long sum: it is added up in float32 and rounded once, to the dtype of x. In
    bfloat16 a sum stands still where it is 256 times its next term, and a frequent token loses a third of its gradient.
    The gradient of a gather is a scatter, one row after the other on a CPU; where R * Q is small it is a matmul here.

    Args:
      axes: logical axes of x as it is read, after its cast.
    """
    return _take_rows(dtype, axes, jnp.asarray(x), jnp.asarray(index))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take_rows(dtype: DTypeLike | None, axes: Axes | None, x: Array, index: Array) -> Array:
    x = x.astype(dtype or x.dtype)
    x = x if axes is None else nn.with_logical_constraint(whole(x, axes), axes)
    return jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1, mode="clip")


def _take_rows_forward(dtype: DTypeLike | None, axes: Axes | None, x: Array, index: Array) -> tuple:
    # Of x the backward pass needs the shape and the dtype alone, which an array without elements carries.
    return _take_rows(dtype, axes, x, index), (index, jnp.zeros((x.shape[1], 0), x.dtype))


def _take_rows_backward(dtype: DTypeLike | None, axes: Axes | None, kept: tuple, cotangent: Array) -> tuple:
    del dtype
    index, like = kept
    rows = like.shape[0]

    def put(taken: Array, cotangent: Array) -> Array:
        if rows * taken.shape[1] > ONE_HOT_LIMIT:
            zeros = jnp.zeros((taken.shape[0], rows, cotangent.shape[-1]), jnp.float32)
            return jax.vmap(lambda out, at, terms: out.at[at].add(terms, mode="clip"))(
                zeros, taken, cotangent.astype(jnp.float32)
            )
        one_hot = jax.nn.one_hot(taken, rows, dtype=cotangent.dtype)
        return jnp.einsum("bqr,bqe->bre", one_hot, cotangent, preferred_element_type=jnp.float32)

    operands = jnp.maximum(index, 0), cotangent
    summed = put(*operands) if axes is None else gradient(put, operands, ((None, "batch"), (None, "batch", *axes[2:])), axes)
    return summed.astype(like.dtype), np.zeros(index.shape, jax.dtypes.float0)


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def as_they_are(x: Kernel, dtype: DTypeLike) -> Array:
    """An operand of a product, in the product's dtype."""
    return x.astype(dtype)


class Rounding(NamedTuple):
    """What the operands of a product are rounded to first: functions of (array, dtype), whose result has this dtype."""

    value: Callable[[Kernel, DTypeLike], Array] = as_they_are  # inputs and kernels
    gradient: Callable[[Array, DTypeLike], Array] = as_they_are  # of results


PLAIN = Rounding()


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def product(rounding: Rounding, inputs: int, out: DTypeLike, axes: Axes, x: Array, kernel: Kernel) -> Array:
    """x[..., *in] @ kernel[*in, *out], multiplied in the dtype of x, in dtype `out`; `axes` are the kernel's logical ones.

    The gradient of the kernel, a sum over all positions, leaves its product in float32: rounded to bfloat16 there, the parts of
    many devices would be added up in bfloat16 too.
    """
    value = rounding.value(x, x.dtype)
    return jnp.tensordot(value, _whole(rounding, kernel, axes, x.dtype), axes=inputs, preferred_element_type=out)


def _whole(rounding: Rounding, kernel: Kernel, axes: Axes, dtype: DTypeLike) -> Array:
    """The kernel as a product takes it. Codes of a quantised one are a half or a quarter of it: they travel, not the kernel."""
    value = rounding.value(kernel, dtype)
    return value if isinstance(kernel, QuantisedKernel) else whole(value, axes)


def _product_forward(
    rounding: Rounding, inputs: int, out: DTypeLike, axes: Axes, x: Array, kernel: Kernel
) -> tuple[Array, tuple[Array, Kernel]]:
    return product(rounding, inputs, out, axes, x, kernel), (x, kernel)


def _product_backward(
    rounding: Rounding, inputs: int, out: DTypeLike, axes: Axes, kept: tuple[Array, Kernel], cotangent: Array
) -> tuple[Array, Kernel]:
    del out
    x, kernel = kept
    cotangent = rounding.gradient(cotangent, x.dtype)
    positions = tuple(range(x.ndim - inputs))
    outs = tuple(range(len(positions), cotangent.ndim))
    to_x = ((outs, tuple(range(inputs, kernel.ndim))), ((), ()))
    to_kernel = ((positions, positions), ((), ()))
    to_input = jax.lax.dot_general(cotangent, _whole(rounding, kernel, axes, x.dtype), to_x)
    if isinstance(kernel, QuantisedKernel):
        return to_input, kernel.no_gradient()

    def of_rows(x: Array, cotangent: Array) -> Array:
        return jax.lax.dot_general(x, cotangent, to_kernel, preferred_element_type=jnp.float32)

    operands = rounding.value(x, x.dtype), cotangent
    rows = ("batch", *[None] * (len(positions) - 1))
    taken = (*rows, *axes[:inputs]), (*rows, *axes[inputs:])
    return to_input, gradient(of_rows, operands, taken, axes).astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)

_TABLE = ("vocab", "embed")


@jax.custom_vjp
def by_rows(x: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """x @ table.T, multiplied in the dtype of x, in float32; the gradient of the table, too, is added up in float32.

    `product` with a turned table would do, but a CPU has no product of bfloat16 in the layout that its gradient then gets.
    """
    return jnp.einsum("btd,vd->btv", x, whole(table.astype(x.dtype), _TABLE), preferred_element_type=jnp.float32)


def _by_rows_forward(x: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return by_rows(x, table), (x, table)


def _by_rows_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, table = kept
    cotangent = cotangent.astype(x.dtype)

    def of_rows(cotangent: Array, x: Array) -> Array:
        return jnp.einsum("btv,btd->vd", cotangent, x, preferred_element_type=jnp.float32)

    to_table = gradient(of_rows, (cotangent, x), (("batch", None, "vocab"), ("batch", None, "embed")), _TABLE).astype(
        table.dtype
    )
    return jnp.einsum("btv,vd->btd", cotangent, whole(table.astype(x.dtype), _TABLE)), to_table


by_rows.defvjp(_by_rows_forward, _by_rows_backward)


class Linear(nn.Module):
    """y[..., *out] = x[..., *in] @ kernel[*in, *out] (+ bias[*out]), the kernel drawn from N(0, scale / fan_in).

    Where the parameters have an adapter beside the kernel (LoRA), it is added: lora_scale * (x @ lora_a[*in, r]) @
    lora_b[r, *out]. Parameters that are drawn here have none.

    `flax.linen.DenseGeneral` would do, but it reshapes its freshly drawn kernel under the wrong logical axes once axis rules
    are active, and it adds up the gradients of kernel and bias in the dtype of the product.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]  # logical axes of the kernel, inputs first
    dtype: DTypeLike  # of the product; the weights are float32
    inputs: int = 1  # trailing axes of x that are contracted
    use_bias: bool = False
    scale: float = 1.0
    std: float | None = None  # of the freshly drawn kernel, in place of `scale`
    out: DTypeLike | None = None  # dtype of y; None = that of the product
    rounding: Rounding = PLAIN  # of the product with the kernel; an adapter's are made in `dtype`

    @nn.compact
    def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
        shape = (*x.shape[-self.inputs :], *self.features)
        ins, outs = tuple(range(self.inputs)), tuple(range(self.inputs, len(shape)))
        draw = nn.initializers.variance_scaling(self.scale, "fan_in", "normal", in_axis=ins, out_axis=outs)
        draw = draw if self.std is None else nn.initializers.normal(self.std)
        if self.has_variable("params", "kernel") and isinstance(self.get_variable("params", "kernel"), QuantisedKernel):
            kernel = self.get_variable("params", "kernel")  # `param` would want its codes, packed or not, in the kernel's shape
        else:
            kernel = self.param("kernel", nn.with_logical_partitioning(draw, self.axes), shape, jnp.float32)
        x, out = x.astype(self.dtype), self.out or self.dtype
        y: Array = product(self.rounding, self.inputs, out, self.axes, x, kernel)
        if self.has_variable("params", LORA[0]):
            a, b, scale = (self.get_variable("params", name) for name in LORA)
            ins, outs = (*self.axes[: self.inputs], "rank"), ("rank", *self.axes[self.inputs :])
            low = checkpoint_name(product(PLAIN, self.inputs, self.dtype, ins, x, a), PRODUCT)
            added: Array = product(PLAIN, 1, out, outs, low, b)
            y = (y.astype(jnp.float32) + scale * added.astype(jnp.float32)).astype(out)
        y = checkpoint_name(y, PRODUCT)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[self.inputs :])
            bias = self.param("bias", zeros, self.features, jnp.float32)
            y = (y.astype(jnp.float32) + bias).astype(y.dtype)  # in float32, and so is then the bias's gradient
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
    rounding: Rounding = PLAIN,
) -> Linear:
    """A named Linear; `features` may be a plain number."""
    features = (features,) if isinstance(features, int) else features
    return Linear(features, axes, dtype, inputs, bias, scale, rounding=rounding, name=name)


def scaled(x: Float[Array, "*B"], factor: float) -> Float[Array, "*B"]:
    """x * factor, multiplied in float32 and rounded once: a factor rounded to bfloat16 is up to 0.4% off."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


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
