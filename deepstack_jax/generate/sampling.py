"""Choosing the next token from its scores: greedy, temperature, top-k and nucleus, each row by its own numbers.

All settings are arrays, so that changing one compiles nothing, and a row's noise comes from its own seed and the number of the
token alone, so that a row says the same alone and in any batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepstack_jax.types import HostOrDevice


class Sampling(NamedTuple):
    """How each row of a batch chooses."""

    temperature: Float[HostOrDevice, " B"]  # 0 = the most likely token
    top_p: Float[HostOrDevice, " B"]  # in (0, 1]; 1 = all tokens
    top_k: Int[HostOrDevice, " B"]  # 0 = all tokens
    seed: Int[HostOrDevice, " B"]


def greedy_sampling(rows: int) -> Sampling:
    """The most likely token, in every row."""
    return Sampling(np.zeros(rows, np.float32), np.ones(rows, np.float32), np.zeros(rows, np.int32), np.zeros(rows, np.int32))


def choose(logits: Float[Array, "B V"], sampling: Sampling, step: Int[HostOrDevice, "*B"]) -> Int[Array, " B"]:
    """The next token of every row; `step` counts the tokens of its answer before it, one number for all rows or one each."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature = jnp.asarray(sampling.temperature)

    def draw() -> Array:
        scores = filter_logits(logits / jnp.where(temperature > 0, temperature, 1)[:, None], sampling.top_k, sampling.top_p)
        steps = jnp.broadcast_to(step, temperature.shape)
        keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(jnp.asarray(sampling.seed), steps)
        drawn = jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
        return jnp.where(temperature > 0, drawn, likeliest)

    return jax.lax.cond((temperature > 0).any(), draw, lambda: likeliest)  # sorting 32,000 scores is most of a greedy step


def margin_of(logits: Float[Array, "B V"]) -> Float[Array, " B"]:
    """By how much the likeliest token of every row leads the next one; where it is near 0, rounding may decide."""
    likeliest = jnp.argmax(logits, axis=-1)[:, None]
    others = jnp.where(jnp.arange(logits.shape[-1]) == likeliest, -jnp.inf, logits)
    return (logits.max(axis=-1) - others.max(axis=-1)).astype(jnp.float32)


def filter_logits(
    logits: Float[Array, "B V"], top_k: Int[HostOrDevice, " B"], top_p: Float[HostOrDevice, " B"]
) -> Float[Array, "B V"]:
    """Scores with -inf where a token may not be drawn: first top-k, then the nucleus of what is left, as transformers does.

    The nucleus (Holtzman et al. 2020) is the smallest set of likeliest tokens whose probability reaches `top_p`; the likeliest
    always stays. Tokens exactly as likely as the last one that stays, stay too: no order among equals is made up.
    """
    size = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    kept = jnp.where(jnp.asarray(top_k) > 0, jnp.minimum(jnp.asarray(top_k), size), size)
    floor = jnp.take_along_axis(ordered, kept[:, None] - 1, axis=-1)
    ordered = jnp.where(ordered >= floor, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    nucleus = (before < jnp.asarray(top_p)[:, None]) | (jnp.arange(size) == 0)
    nucleus |= jnp.asarray(top_p)[:, None] >= 1  # rounding of the sum must not cost the unlikeliest token
    floor = jnp.maximum(floor, jnp.min(jnp.where(nucleus, ordered, jnp.inf), axis=-1, keepdims=True))
    return jnp.where(logits >= floor, logits, -jnp.inf)
