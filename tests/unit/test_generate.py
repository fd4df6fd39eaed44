"""Greedy decoding with a cache against the plain model: the full forward run again for every token."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepstack_jax.batch import empty_batch
from deepstack_jax.data.rows import Cursor, place_example
from deepstack_jax.inference.generate import empty_cache, greedy
from deepstack_jax.model.variants import build_model
from tests.unit.tiny import example, model_params, tiny_config

CONFIG = tiny_config()
MODEL = build_model(CONFIG)
PROMPT, NEW, NEVER = 24, 6, -5
GRIDS = ([(2, 2)], [], [(1, 2), (2, 1), (1, 3)], [(2, 1)])


def prompts(rows, length):
    """One prompt per row, of different lengths, right padded to `length`."""
    batch = empty_batch(CONFIG.batch_shape(len(rows), length))
    for at, row in enumerate(rows):
        place_example(batch, at, example(CONFIG, 20 + row, GRIDS[row], words=row + 1, answer=0), Cursor(), 4)
    return batch


@pytest.fixture(scope="module")
def batch():
    return prompts(range(4), PROMPT)


@pytest.fixture(scope="module")
def params(batch):
    return model_params(MODEL, batch)


@pytest.fixture(scope="module")
def next_token(params):
    """(batch, lengths) -> most likely token after each row, and by how much it wins; no cache anywhere."""

    @jax.jit
    def run(batch, lengths):
        hidden = MODEL.apply({"params": params}, batch).hidden
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
        logits = MODEL.apply({"params": params}, last, method="logits")[:, 0]
        best = jnp.sort(logits, axis=-1)
        return jnp.argmax(logits, axis=-1), (best[:, -1] - best[:, -2]).min()

    return run


def by_reforward(next_token, batch, steps):
    batch = type(batch)(*(field.copy() for field in batch))
    lengths = (batch.segment_ids > 0).sum(axis=1)
    answers = []
    rows = np.arange(len(lengths))
    for _ in range(steps):
        token, margin = next_token(batch, lengths)
        assert margin > 1e-4, "a tie would make the comparison a matter of rounding"
        batch.tokens[rows, lengths], batch.segment_ids[rows, lengths] = token, 1
        batch.positions[rows, lengths] = lengths
        lengths = lengths + 1
        answers.append(np.asarray(token))
    return np.stack(answers, axis=1)


@pytest.fixture(scope="module")
def expected(next_token):
    return by_reforward(next_token, prompts(range(4), PROMPT + NEW), NEW)


@pytest.mark.quick
def test_cache_equals_running_the_model_again(batch, params, expected, next_token):
    lengths = (batch.segment_ids > 0).sum(axis=1)
    assert len(set(lengths.tolist())) == 4
    answers = greedy(MODEL, params, batch, max_new_tokens=NEW, stop_id=NEVER)
    chex.assert_shape(answers, (4, NEW))
    np.testing.assert_array_equal(answers, expected)
    assert len(np.unique(expected)) > 6, "answers must tell rows and steps apart"
    blind = prompts(range(4), PROMPT + NEW)
    blind.stack_source[:] = -1
    without = by_reforward(next_token, blind, NEW)
    assert (without != expected).any(axis=1).tolist()[1] is False
    assert (without != expected).any(), "the stack must matter to what is said"


def test_batched_equals_alone(params, expected):
    """Alone, a row has no neighbours and less padding."""
    for row in range(4):
        alone = greedy(MODEL, params, prompts([row], PROMPT - 1), max_new_tokens=NEW, stop_id=NEVER)
        np.testing.assert_array_equal(alone[0], expected[row])


def test_answers_end_at_stop_id(batch, params, expected):
    stop = int(expected[0, 2])
    answers = np.asarray(greedy(MODEL, params, batch, max_new_tokens=NEW, stop_id=stop))
    for ours, free in zip(answers, expected, strict=True):
        hits = np.flatnonzero(free == stop)
        end = hits[0] if hits.size else NEW
        assert ours.tolist() == [*free[:end], *[stop] * (NEW - end)]
    assert (answers[0, :2] == expected[0, :2]).all()
    assert (answers != stop).any(axis=0).sum() > 3, "other rows go on"


def test_the_loop_ends_when_all_rows_have(batch, params, expected):
    """The number of decoding steps is that of the longest answer, not `max_new_tokens`."""
    stop = int(expected[0, 1])
    longest = expected[0].tolist().index(stop)
    calls = []

    class Spy(type(MODEL)):
        def decode(self, tokens, positions, cache):
            jax.debug.callback(lambda: calls.append(1))
            return super().decode(tokens, positions, cache)

    spy = Spy(**{field: getattr(MODEL, field) for field in MODEL.__dataclass_fields__ if field not in ("parent", "name")})
    greedy(spy, params, prompts([0, 0], PROMPT), max_new_tokens=NEW, stop_id=stop).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == longest + 1 < NEW


def test_same_shapes_do_not_trace_again(params):
    once = chex.assert_max_traces(inspect.unwrap(greedy), n=1)
    once = jax.jit(once, static_argnames=("model", "max_new_tokens", "stop_id"))
    run = functools.partial(once, MODEL, params, max_new_tokens=2, stop_id=NEVER)
    first, second = prompts([0, 1], PROMPT), prompts([2, 3], PROMPT)
    assert (np.asarray(run(first)) != np.asarray(run(second))).any()
    with pytest.raises(AssertionError, match="traced"):
        run(prompts([0, 1], PROMPT + 1))


def test_an_empty_row_gives_stop_ids(batch, params):
    blank = empty_batch(CONFIG.batch_shape(4, PROMPT))
    answers = greedy(MODEL, params, blank, max_new_tokens=NEW, stop_id=NEVER)
    assert (np.asarray(answers) == NEVER).all()


@pytest.mark.quick
def test_empty_cache_shapes():
    cache = empty_cache(MODEL, 3, 10)
    chex.assert_shape([cache.keys, cache.values], (5, 3, 10, 2, 8))
    chex.assert_shape(cache.valid, (3, 10))
    assert not cache.valid.any()
    assert int(cache.filled) == 0
