"""Answers of several conversations that begin and end at their own times, in the rows of one cache (continuous batching).

The cache is a ring of columns: a step writes one column for all rows, and a new prompt lies in the columns just before it.
Where a key lies does not matter to attention: its rotary angle is in it, and `valid` tells which columns a row sees.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from deepstack_jax.generate.decoding import NO_TOKEN, Decoding, empty_cache, end, next_token
from deepstack_jax.generate.sampling import Sampling, greedy_sampling
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.types import HostOrDevice, KVCache


class Slots(NamedTuple):
    """The state of all rows; a row is free where `left` is 0."""

    token: Int[Array, " B"]  # the newest of each row, not yet in the cache
    position: Int[Array, " B"]  # of that token
    made: Int[Array, " B"]  # tokens of the answer so far
    left: Int[Array, " B"]  # tokens that may still be made
    sampling: Sampling
    cache: KVCache  # `filled` is the column that is written next


@partial(jax.jit, static_argnames=("model", "rows", "context"))
def empty_slots(model: DeepStack, *, rows: int, context: int) -> Slots:
    """Free rows with room for `context` tokens each, prompt and answer together."""
    nothing = jnp.zeros(rows, jnp.int32)
    sampling = jax.tree.map(jnp.asarray, greedy_sampling(rows))
    return Slots(nothing, nothing, nothing, nothing, sampling, empty_cache(model, rows, context))


@partial(jax.jit, donate_argnames=("slots",))
def put(slots: Slots, row: Int[HostOrDevice, ""], prompt: Decoding, sampling: Sampling, most: Int[HostOrDevice, ""]) -> Slots:
    """The slots with a prompt in one row; it has its first token and compiles once per length of its padding.

    Args:
      row: a free one; what is in it is gone.
      prompt: of `prefill`, one row, not longer than the ring.
      sampling: of that row.
      most: tokens of the answer, the first included; with the prompt at most the ring.
    """
    cache, length, size = slots.cache, prompt.lengths[0], prompt.cache.valid.shape[1]
    context = cache.valid.shape[1]
    columns = (cache.filled - length + jnp.arange(size)) % context  # what is padding falls on those that are written next
    keys = cache.keys.at[:, row, columns].set(prompt.cache.keys[:, 0])
    values = cache.values.at[:, row, columns].set(prompt.cache.values[:, 0])
    positions = cache.positions.at[row, columns].set(prompt.cache.positions[0])
    valid = cache.valid.at[row].set(jnp.zeros(context, bool).at[columns].set(prompt.cache.valid[0]))
    return Slots(
        token=slots.token.at[row].set(prompt.token[0]),
        position=slots.position.at[row].set(length),
        made=slots.made.at[row].set(1),
        left=slots.left.at[row].set(jnp.where(prompt.done[0], 0, most - 1)),
        sampling=jax.tree.map(lambda rows, one: rows.at[row].set(one[0]), slots.sampling, sampling),
        cache=KVCache(keys, values, positions, valid, cache.filled),
    )


@partial(jax.jit, static_argnames=("model", "steps"), donate_argnames=("slots",))
def go_on(
    model: DeepStack,
    params: Any,
    slots: Slots,
    wanted: Bool[HostOrDevice, " B"],
    stop_ids: Int[HostOrDevice, " k"],
    *,
    steps: int,
) -> tuple[Slots, Int[Array, "B Y"], Int[Array, " B"]]:
    """Make `steps` (Y) more tokens in every row that is not done.

    Args:
      wanted: rows whose answer somebody waits for; the others are free from now on.
      stop_ids: tokens that end a row; they are not part of its answer.

    Returns:
      The slots, which replace those handed in; the new tokens i32[B, Y], NO_TOKEN where none; and `left` of every row.
    """

    def step(number: Int[Array, ""], carry: tuple[Slots, Array]) -> tuple[Slots, Array]:
        slots, made_now = carry
        live = slots.left > 0
        sampling = slots.sampling._replace(temperature=jnp.where(live, slots.sampling.temperature, 0))
        token, _, cache = next_token(model, params, slots.token, slots.position, slots.cache, sampling, slots.made)
        token, done = end(token, ~live, stop_ids)
        cache = cache._replace(filled=cache.filled % cache.valid.shape[1])
        more = (~done).astype(jnp.int32)
        left = jnp.where(done, 0, slots.left - 1)
        slots = Slots(token, slots.position + more, slots.made + more, left, slots.sampling, cache)
        return slots, made_now.at[:, number].set(token)

    slots = slots._replace(left=jnp.where(wanted, slots.left, 0))
    nothing = jnp.full((slots.token.shape[0], steps), NO_TOKEN, jnp.int32)
    slots, tokens = jax.lax.fori_loop(0, steps, step, (slots, nothing))
    return slots, tokens, slots.left
