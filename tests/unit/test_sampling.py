"""The choice of the next token against the published definitions, written out in numpy."""

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.sampling import Sampling, choose, filter_logits, greedy_sampling

WORDS = 9
pytestmark = pytest.mark.quick

# Distinct scores: which of equal tokens goes first is nobody's definition. Multiples of 1/8 keep sums far from the threshold.
scores = st.lists(st.integers(-40, 40), min_size=WORDS, max_size=WORDS, unique=True).map(lambda v: np.array(v, np.float32) / 8)


def top_k_reference(row: np.ndarray, k: int) -> set[int]:
    """The k likeliest tokens."""
    order = sorted(range(len(row)), key=lambda token: -row[token])
    return set(order[:k] if k else order)


def top_p_reference(row: np.ndarray, allowed: set[int], p: float) -> set[int]:
    """Holtzman et al. 2020, section 3.1: the smallest set of likeliest tokens whose probability is p or more."""
    weights = {token: np.exp(np.float64(row[token])) for token in allowed}
    total, chosen, reached = sum(weights.values()), set(), 0.0
    for token in sorted(allowed, key=lambda token: -row[token]):
        chosen.add(token)
        reached += weights[token] / total
        if reached >= p:
            break
    return chosen


@settings(deadline=None, max_examples=60)
@given(scores, st.integers(0, WORDS + 3), st.floats(0.05, 1.0).map(lambda p: round(p, 2)))
def test_filters_are_the_published_ones(row, k, p):
    ours = np.asarray(jitted_filter(row[None], np.array([k], np.int32), np.array([p], np.float32)))[0]
    allowed = top_p_reference(row, top_k_reference(row, k), p)
    kept = set(np.flatnonzero(np.isfinite(ours)).tolist())
    border = (
        top_p_reference(row, top_k_reference(row, k), p - 1e-5),
        top_p_reference(row, top_k_reference(row, k), min(1, p + 1e-5)),
    )
    assert kept == allowed or kept in border, "a sum within rounding of p may fall on either side"
    np.testing.assert_array_equal(ours[list(kept)], row[list(kept)])


jitted_filter = jax.jit(filter_logits)
jitted_choose = jax.jit(choose)


@settings(deadline=None, max_examples=30)
@given(arrays(np.float32, (3, WORDS), elements=st.integers(-3, 3).map(float)), st.integers(1, WORDS))
def test_equals_stand_or_fall_together(rows, k):
    kept = np.isfinite(np.asarray(jitted_filter(rows, np.full(3, k, np.int32), np.full(3, 0.7, np.float32))))
    for row, mine in zip(rows, kept, strict=True):
        assert mine[row.argmax()]
        assert mine.tolist() == (row >= row[mine].min()).tolist()


def settings_of(rows, temperature=1.0, top_p=1.0, top_k=0, seed=0):
    (sampling,) = Options(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed).sampling(rows, rows)
    return sampling


def test_greedy_is_argmax_in_any_company():
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    mixed = Sampling(*(np.array(field) for field in settings_of(4)))
    mixed.temperature[[0, 2]] = 0
    chosen = jitted_choose(logits, greedy_sampling(4), np.int32(0))
    chex.assert_shape(chosen, (4,))
    np.testing.assert_array_equal(chosen, logits.argmax(axis=1))
    np.testing.assert_array_equal(np.asarray(jitted_choose(logits, mixed, np.int32(3)))[[0, 2]], logits.argmax(axis=1)[[0, 2]])


def test_a_row_draws_the_same_alone_and_in_any_batch():
    logits = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32)
    seeds = [3, 3, 5, 7, 11, 13]
    together = [np.asarray(jitted_choose(logits, settings_of(6, seed=seeds), np.int32(step))) for step in range(8)]
    for row, seed in enumerate(seeds):
        for step in range(8):
            alone = jitted_choose(logits[row : row + 1], settings_of(1, seed=seed), np.int32(step))
            assert int(alone[0]) == together[step][row]
    assert len({tuple(step) for step in together}) == 8, "each token has noise of its own"


def test_frequencies_are_the_softmax_at_the_temperature():
    """4096 draws: each share lies within five standard deviations of its probability."""
    draws, temperature = 4096, 0.7
    row = np.array([1.0, 0.0, -1.0, 0.5], np.float32)
    sampling = settings_of(draws, temperature=temperature, seed=list(range(draws)))
    drawn = np.asarray(jitted_choose(np.tile(row, (draws, 1)), sampling, np.int32(2)))
    expected = np.exp(row / temperature) / np.exp(row / temperature).sum()
    shares = np.bincount(drawn, minlength=4) / draws
    assert (np.abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / draws)).all(), (shares, expected)


def test_only_what_the_filters_leave_is_drawn():
    row = np.array([2.0, 1.5, 1.0, -1.0, -2.0], np.float32)
    sampling = settings_of(500, top_k=2, seed=list(range(500)))
    assert set(np.asarray(jitted_choose(np.tile(row, (500, 1)), sampling, np.int32(0))).tolist()) == {0, 1}
    sampling = settings_of(500, top_p=0.01, seed=list(range(500)))
    assert set(np.asarray(jitted_choose(np.tile(row, (500, 1)), sampling, np.int32(0))).tolist()) == {0}


def test_changing_a_setting_does_not_trace_again():
    traced = jax.jit(chex.assert_max_traces(choose, n=1))
    logits = np.zeros((2, 8), np.float32)
    for sampling in (settings_of(2), settings_of(2, 0.3, 0.5, 4, 9), greedy_sampling(2)):
        traced(logits, sampling, np.int32(1))


BAD = {
    "max_new_tokens": (0, "max_new_tokens got 0, expected a whole number from 1 on"),
    "temperature": (-0.1, "temperature got -0.1, expected 0"),
    "top_p": (0.0, "top_p got 0.0, expected more than 0 and at most 1"),
    "top_k": (-1, "top_k got -1, expected 0"),
    "stop": (["ok", ""], "stop got '', expected strings that are not empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_value_out_of_range_is_refused(name):
    value, message = BAD[name]
    with pytest.raises(RequestError) as caught:
        Options(**{name: value})
    assert message in str(caught.value)


def test_seeds_are_one_or_one_each():
    with pytest.raises(RequestError, match="seed got 2 numbers for 3 prompts; give one, or one per prompt"):
        Options(seed=[1, 2]).sampling(3, 4)
    parts = Options(seed=[5, 6, 7]).sampling(3, 2)
    assert [part.seed.tolist() for part in parts] == [[5, 6], [7, 0]]
    assert Options(stop="###").stops == ("###",)
