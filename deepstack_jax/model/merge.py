"""Visual tokens into the sequence and into the layers, both by the one `visual_index`.

Upstream adds a group with a slice per sample (`custom_llama.py`); here the add is a gather over the sequence. Its transpose is
written as a gather too: a visual token is at one position at most, so no scatter is needed in either direction.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepstack_jax.types import HostOrDevice

# Of the stack [J, B, M, D]: cut over the batch, and along the tensor axis over its width. Never over J or M: a layer takes one
# group at a time, and its tokens go to any position.
STACK_AXES = (None, "batch", None, "stack_embed")


class VisualIndex(NamedTuple):
    """Where visual tokens are, read both ways."""

    tokens: Int[Array, "B T"]  # which visual token is at t, -1 = text
    positions: Int[Array, "B M"]  # where visual token m is, -1 = nowhere


def invert_visual_index(visual_index: Int[HostOrDevice, "B T"], visual: int) -> VisualIndex:
    """Invert `visual_index` once per step; both directions are then gathers. `visual` is M."""
    rows, length = visual_index.shape
    visual_index = jnp.asarray(visual_index)
    slots = jnp.where(visual_index >= 0, visual_index, visual)
    nowhere = jnp.full((rows, visual + 1), -1, jnp.int32)
    # Row by row, so that rows on different devices stay there.
    where = jax.vmap(lambda row, slots: row.at[slots].set(jnp.arange(length, dtype=jnp.int32)))(nowhere, slots)
    return VisualIndex(visual_index, where[:, :visual])


@jax.custom_vjp
def spread(tokens: Float[Array, "B M D"], index: VisualIndex) -> Float[Array, "B T D"]:
    """Visual tokens at their positions, zero at the text."""
    return _gather_or_zero(tokens, index.tokens)


def _gather_or_zero(x: Array, index: Array) -> Array:
    rows = jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1, mode="clip")
    return jnp.where((index >= 0)[..., None], rows, jnp.zeros((), x.dtype))


def _spread_forward(tokens: Array, index: VisualIndex) -> tuple[Array, VisualIndex]:
    return spread(tokens, index), index


def _spread_backward(index: VisualIndex, cotangent: Array) -> tuple[Array, VisualIndex]:
    no_gradient = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), index)
    return _gather_or_zero(cotangent, index.positions), no_gradient


spread.defvjp(_spread_forward, _spread_backward)


def merge(text: Float[Array, "B T D"], visual: Float[Array, "B M D"], index: VisualIndex) -> Float[Array, "B T D"]:
    """The input embeddings: the visual token where there is one, the text embedding elsewhere."""
    return jnp.where((index.tokens >= 0)[..., None], spread(visual, index).astype(text.dtype), text)


def inject(
    x: Float[Array, "B T D"], layer_inject: Float[Array, "J B M D"], group: Int[Array, ""], index: VisualIndex
) -> Float[Array, "B T D"]:
    """Add one group of the stack to the hidden states at the visual positions (paper equation 2); group -1 adds nothing."""

    def add(x: Array) -> Array:
        tokens = jax.lax.dynamic_index_in_dim(layer_inject, group, 0, keepdims=False)
        # Cut as the stack is, then whole: so this one group is what is gathered, here and in the gradient, under the condition.
        tokens = nn.with_logical_constraint(tokens, STACK_AXES[1:])
        tokens = nn.with_logical_constraint(tokens, ("batch", None, "embed"))
        return x + spread(tokens, index).astype(x.dtype)

    return jax.lax.cond(group >= 0, add, lambda x: x, x)
