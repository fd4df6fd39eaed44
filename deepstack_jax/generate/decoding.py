"""Decoding on the device: prefill with injection, then one compiled loop over the cache without it.

`prefill` and `advance` compile once per model and batch shape. What a user changes from prompt to prompt (sampling, stop ids,
number of tokens) is an array.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from deepstack_jax.batch import Batch
from deepstack_jax.generate.sampling import Sampling, choose, greedy_sampling, margin_of
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.types import HostOrDevice, KVCache

CHUNK = 16  # most tokens per call of the compiled loop; between calls the host looks for stop strings
STOP_SLOTS = 8  # stop ids are padded to a multiple of this, so that another template compiles nothing
NO_TOKEN = -1  # after the end of an answer


class Decoding(NamedTuple):
    """The state of answers that are being made."""

    token: Int[Array, " B"]  # the newest token of each row, not yet in the cache; NO_TOKEN after its end
    lengths: Int[Array, " B"]  # tokens of each prompt
    done: Bool[Array, " B"]
    made: Int[Array, ""]  # tokens made per row, the same for all
    margin: Float[Array, " B"]  # the smallest `margin_of` of the answer so far, the token that ended it included
    cache: KVCache


class Greedy(NamedTuple):
    """Answers, whole."""

    tokens: Int[HostOrDevice, "B Y"]  # NO_TOKEN from the end of each on
    margin: Float[HostOrDevice, " B"]  # as of `Decoding`; inf in a blank row


def empty_cache(model: DeepStack, rows: int, slots: int) -> KVCache:
    """A cache with room for `slots` tokens per row."""
    cfg = model.decoder
    shape = (cfg.layers, rows, slots, cfg.kv_heads, cfg.head_dim)
    zeros = jnp.zeros(shape, model.dtype)
    return KVCache(zeros, zeros, jnp.zeros((rows, slots), jnp.int32), jnp.zeros((rows, slots), bool), jnp.zeros((), jnp.int32))


def stop_array(ids: Sequence[int]) -> np.ndarray:
    """Stop ids i32[k] padded with NO_TOKEN, which no row makes."""
    padded = np.full(max(1, -(-len(ids) // STOP_SLOTS)) * STOP_SLOTS, NO_TOKEN, np.int32)
    padded[: len(ids)] = ids
    return padded


@partial(jax.jit, static_argnames=("model", "room"))
def prefill(
    model: DeepStack, params: Any, batch: Batch, sampling: Sampling, stop_ids: Int[HostOrDevice, " k"], *, room: int
) -> Decoding:
    """Read the prompts, the stack injected, and make the first token of every answer.

    Args:
      model: its configuration.
      params: the parameter tree.
      batch: right-padded prompts, one segment per row; a blank row is done at once.
      sampling: of each row.
      stop_ids: tokens that end a row; they are not part of its answer.
      room: most tokens that will be made.
    """
    rows, length = batch.tokens.shape
    variables = {"params": params}
    lengths = (jnp.asarray(batch.segment_ids) > 0).sum(axis=1)
    output = model.apply(variables, batch, empty_cache(model, rows, length), method="prefill")
    last = jnp.take_along_axis(output.hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    logits = model.apply(variables, last, method="logits")[:, -1]
    token, done = end(choose(logits, sampling, jnp.zeros((), jnp.int32)), lengths == 0, stop_ids)
    margin = jnp.where(lengths == 0, jnp.inf, margin_of(logits))
    return Decoding(token, lengths, done, jnp.ones((), jnp.int32), margin, _grown(output.cache, room))


@partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames=("state",))
def advance(
    model: DeepStack,
    params: Any,
    state: Decoding,
    sampling: Sampling,
    stop_ids: Int[HostOrDevice, " k"],
    until: Int[HostOrDevice, ""],
    *,
    chunk: int,
) -> tuple[Decoding, Int[Array, "B Y"]]:
    """Make tokens until each row has `until`, all rows are done, or `chunk` (Y) more are made.

    Returns:
      The state, which replaces the one handed in (its memory is reused), and the new tokens i32[B, Y], NO_TOKEN where none.
    """
    first = state.made

    def unfinished(carry: tuple[Decoding, Array]) -> Array:
        made = carry[0].made
        return (made < until) & (made < first + chunk) & ~carry[0].done.all()

    def step(carry: tuple[Decoding, Array]) -> tuple[Decoding, Array]:
        state, made_now = carry
        position = state.lengths + state.made - 1
        token, lead, cache = next_token(model, params, state.token, position, state.cache, sampling, state.made)
        margin = jnp.where(state.done, state.margin, jnp.minimum(state.margin, lead))
        token, done = end(token, state.done, stop_ids)
        made_now = made_now.at[:, state.made - first].set(token)
        return Decoding(token, state.lengths, done, state.made + 1, margin, cache), made_now

    nothing = jnp.full((state.token.shape[0], chunk), NO_TOKEN, jnp.int32)
    return jax.lax.while_loop(unfinished, step, (state, nothing))


def answer_ids(
    model: DeepStack,
    params: Any,
    batch: Batch,
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    room: int,
    every: int = CHUNK,
) -> Iterator[np.ndarray]:
    """The answers as they are made, i32[B, 1 to every] at a time, NO_TOKEN after the end of a row; the first comes alone.

    Args:
      max_new_tokens: per row, at most `room`.
      room: cache slots after the prompt, which decide what is compiled.
      every: tokens per row between two looks by the caller, at most CHUNK; it compiles nothing.
    """
    stops = stop_array(stop_ids)
    state = prefill(model, params, batch, sampling, stops, room=room)
    token, finished = jax.device_get((state.token, state.done.all()))
    yield token[:, None]
    made = 1
    while made < max_new_tokens and not finished:
        until = np.int32(min(max_new_tokens, made + every))
        state, tokens = advance(model, params, state, sampling, stops, until, chunk=CHUNK)
        tokens, finished, now = jax.device_get((tokens, state.done.all(), state.made))
        yield tokens[:, : int(now) - made]
        made = int(now)


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop_ids"))
def greedy(model: DeepStack, params: Any, batch: Batch, *, max_new_tokens: int, stop_ids: tuple[int, ...]) -> Greedy:
    """The most likely continuation of each row's prompt, up to and without a stop id, as one compiled program.

    It compiles once per model, batch shape, `stop_ids` and `max_new_tokens` (Y).
    """
    sampling, stops = greedy_sampling(batch.tokens.shape[0]), stop_array(stop_ids)
    state = prefill(model, params, batch, sampling, stops, room=max_new_tokens)
    first = state.token[:, None]
    state, more = advance(model, params, state, sampling, stops, jnp.int32(max_new_tokens), chunk=max_new_tokens)
    return Greedy(jnp.concatenate([first, more[:, :-1]], axis=1), state.margin)


def next_token(
    model: DeepStack,
    params: Any,
    token: Int[Array, " B"],
    position: Int[Array, " B"],
    cache: KVCache,
    sampling: Sampling,
    made: Int[Array, "*B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"], KVCache]:
    """The token after `token` in every row, its `margin_of`, and the cache with `token` in it.

    `made`: tokens of the answers so far.
    """
    variables = {"params": params}
    output = model.apply(variables, jnp.maximum(token, 0)[:, None], position[:, None], cache, method="decode")
    logits = model.apply(variables, output.hidden, method="logits")[:, -1]
    return choose(logits, sampling, made), margin_of(logits), output.cache


def end(token: Array, done: Array, stop_ids: HostOrDevice) -> tuple[Array, Array]:
    """The token, or NO_TOKEN in a row that has ended, now or before."""
    done = done | (token[:, None] == jnp.asarray(stop_ids)).any(axis=1)
    return jnp.where(done, NO_TOKEN, token), done


def _grown(cache: KVCache, room: int) -> KVCache:
    """The same with `room` more slots; they come after prefill, whose attention would have to pass over them."""
    slots = ((0, 0), (0, room))  # of [B, slots]; keys and values have layers in front, heads and their width after
    keys, values = (jnp.pad(leaf, ((0, 0), *slots, (0, 0), (0, 0))) for leaf in (cache.keys, cache.values))
    positions, valid = (jnp.pad(leaf, slots) for leaf in (cache.positions, cache.valid))
    return cache._replace(keys=keys, values=values, positions=positions, valid=valid)
