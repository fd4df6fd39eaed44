"""Greedy decoding: prefill with injection, then one compiled loop over the cache without it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from deepstack_jax.batch import Batch
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.types import KVCache


def empty_cache(model: DeepStack, rows: int, slots: int) -> KVCache:
    """A cache with room for `slots` tokens per row."""
    cfg = model.decoder
    shape = (cfg.layers, rows, slots, cfg.kv_heads, cfg.head_dim)
    zeros = jnp.zeros(shape, model.dtype)
    return KVCache(zeros, zeros, jnp.zeros((rows, slots), jnp.int32), jnp.zeros((rows, slots), bool), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop_id"))
def greedy(model: DeepStack, params: Any, batch: Batch, *, max_new_tokens: int, stop_id: int) -> Int[Array, "B Y"]:
    """The most likely continuation of each row's prompt, up to and without `stop_id`.

    Args:
      model: its configuration; decoding compiles once per model, batch shape and max_new_tokens.
      params: the parameter tree.
      batch: right-padded prompts, one segment per row.
      max_new_tokens: Y, the most tokens per row.
      stop_id: ends a row; the loop ends when all rows have.

    Returns:
      i32[B, Y] tokens, `stop_id` from the end of each answer on.
    """
    rows, length = batch.tokens.shape
    variables = {"params": params}
    lengths = (batch.segment_ids > 0).sum(axis=1)
    prefilled = model.apply(variables, batch, empty_cache(model, rows, length + max_new_tokens), method="prefill")
    last = jnp.take_along_axis(prefilled.hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)

    def choose(hidden: Array) -> Array:
        return jnp.argmax(model.apply(variables, hidden, method="logits")[:, -1], axis=-1).astype(jnp.int32)

    def unfinished(carry: tuple) -> Array:
        step, _, done, _, _ = carry
        return (step < max_new_tokens) & ~done.all()

    def advance(carry: tuple) -> tuple:
        step, token, done, answers, cache = carry
        answers = answers.at[:, step].set(jnp.where(done, stop_id, token))
        done |= token == stop_id
        output = model.apply(variables, token[:, None], (lengths + step)[:, None], cache, method="decode")
        return step + 1, choose(output.hidden), done, answers, output.cache

    answers = jnp.full((rows, max_new_tokens), stop_id, jnp.int32)
    start = (jnp.zeros((), jnp.int32), choose(last), lengths == 0, answers, prefilled.cache)
    return jax.lax.while_loop(unfinished, advance, start)[3]
