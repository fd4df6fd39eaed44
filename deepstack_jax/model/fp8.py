"""Operands of matrix products in 8 bits: each array with one scale, found anew every time it is used.

They are rounded and written back in the product's own dtype, which holds these values exactly: a backend that multiplies 8 bits
(cuBLASLt's, into whose calls XLA rewrites this very pattern) takes the codes and the scales instead, others compute the same in
their own way. Nothing is remembered from step to step, and weights and their gradients stay float32.
"""

import math
from functools import partial

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from deepstack_jax.model.layers import Kernel, Rounding

_LEAST = -100  # exponent of a scale, so that neither it nor its inverse leaves the range of bfloat16


def rounded(code: DTypeLike, x: Kernel, dtype: DTypeLike) -> Array:
    """x as numbers of the 8-bit dtype `code` times one scale, in `dtype`; what is not finite makes the result so.

    The scale is a power of two, by which the largest element comes to 29 to 57% of the largest code: to multiply by it rounds
    nothing, in bfloat16 either. A number far smaller than the largest is left with fewer bits, or none.
    """
    x = x.astype(jnp.promote_types(x.dtype, dtype))  # a kernel is rounded once, from its float32
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    top = math.frexp(float(jnp.finfo(code).max))[1] - 1
    exponent = jnp.maximum(jnp.frexp(largest)[1] - top, _LEAST)
    one = jnp.ones((), jnp.float32)
    codes = (x * jnp.ldexp(one, -exponent).astype(x.dtype)).astype(code)
    return codes.astype(dtype) * jnp.ldexp(one, exponent).astype(dtype)


# Three bits of mantissa for what is multiplied, two and a wider range for gradients (arXiv 2209.05433).
FP8 = Rounding(partial(rounded, jnp.float8_e4m3fn), partial(rounded, jnp.float8_e5m2))
