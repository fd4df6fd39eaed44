"""Rotary positions, masks, and the attention kernel's signature. The kernel itself is a callable handed in."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepstack_jax.types import HostOrDevice


@runtime_checkable
class AttentionFn(Protocol):
    """softmax(q k^T / sqrt(H)) v with grouped key/value heads; softmax in float32."""

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: Bool[Array, "B 1 T S"] | None,
    ) -> Float[Array, "B T N H"]: ...


def dot_product(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """The portable kernel: XLA's own fusion on every backend."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def causal_segment_mask(segment_ids: Int[HostOrDevice, "B T"]) -> Bool[Array, "B 1 T T"]:
    """True where t may attend to s: same segment, and s not after t. Padding (segment 0) sees padding, so no row is empty."""
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tri(length, dtype=bool)
    return (same & causal)[:, None]


def rotary(x: Float[Array, "B T N H"], positions: Int[HostOrDevice, "B T"], theta: float) -> Float[Array, "B T N H"]:
    """Rotate the two halves of each head by position * theta**(-2i/H) (RoFormer; halves as in the Hugging Face LLaMA).

    Angles are float32: bf16 cannot tell position 257 from 256.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
