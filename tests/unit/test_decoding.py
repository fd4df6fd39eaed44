"""Decoding with a cache against the plain model: the full forward run again for every token."""

import functools
import inspect
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # its check of cuDNN's version has no public name

from deepstack_jax.batch import empty_batch
from deepstack_jax.config import MeshConfig
from deepstack_jax.data.encode.batch_rows import Cursor, place_example
from deepstack_jax.families.build import build_model
from deepstack_jax.generate.decoding import CHUNK, NO_TOKEN, answer_ids, empty_cache, greedy, prefill, stop_array
from deepstack_jax.generate.options import Options
from deepstack_jax.generate.sampling import greedy_sampling
from deepstack_jax.parallel.kernels import CudnnAttention
from deepstack_jax.parallel.mesh import make_mesh
from tests.unit.tiny import example, model_params, tiny_config

CONFIG = tiny_config()
MODEL = build_model(CONFIG)
PROMPT, NEW, NEVER = 24, 6, -5
GRIDS = ([(2, 2)], [], [(1, 2), (2, 1), (1, 3)], [(2, 1)])


def prompts(rows, length):
    """One prompt per row, of different lengths, right padded to `length`."""
    batch = empty_batch(CONFIG.data_spec.batch_shape(len(rows), length))
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
    answers = greedy(MODEL, params, batch, max_new_tokens=NEW, stop_ids=(NEVER,)).tokens
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
        alone = greedy(MODEL, params, prompts([row], PROMPT - 1), max_new_tokens=NEW, stop_ids=(NEVER,)).tokens
        np.testing.assert_array_equal(alone[0], expected[row])


def test_the_margin_is_that_of_the_closest_choice(batch, params, next_token):
    made = greedy(MODEL, params, batch, max_new_tokens=NEW, stop_ids=(NEVER,))
    for row in (0, 2):
        closest = min(margins_of(next_token, row, np.asarray(made.tokens[row])))
        assert float(made.margin[row]) == pytest.approx(closest, rel=1e-3, abs=1e-4)


def test_one_token_is_an_answer(batch, params, expected):
    answers = greedy(MODEL, params, batch, max_new_tokens=1, stop_ids=(NEVER,)).tokens
    np.testing.assert_array_equal(answers, expected[:, :1])


def test_answers_end_at_stop_id(batch, params, expected):
    stop = int(expected[0, 2])
    answers = np.asarray(greedy(MODEL, params, batch, max_new_tokens=NEW, stop_ids=(stop,)).tokens)
    for ours, free in zip(answers, expected, strict=True):
        hits = np.flatnonzero(free == stop)
        end = hits[0] if hits.size else NEW
        assert ours.tolist() == [*free[:end], *[NO_TOKEN] * (NEW - end)]
    assert (answers[0, :2] == expected[0, :2]).all()
    assert (answers != NO_TOKEN).any(axis=0).sum() > 3, "other rows go on"
    both = np.asarray(greedy(MODEL, params, batch, max_new_tokens=NEW, stop_ids=(NEVER, stop)).tokens)
    np.testing.assert_array_equal(both, answers)


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
    greedy(spy, params, prompts([0, 0], PROMPT), max_new_tokens=NEW, stop_ids=(stop,)).tokens.block_until_ready()
    jax.effects_barrier()
    assert len(calls) == longest < NEW, "the last token is not read again"


def test_same_shapes_do_not_trace_again(params):
    once = chex.assert_max_traces(inspect.unwrap(greedy), n=1)
    once = jax.jit(once, static_argnames=("model", "max_new_tokens", "stop_ids"))
    run = functools.partial(once, MODEL, params, max_new_tokens=2, stop_ids=(NEVER,))
    first, second = prompts([0, 1], PROMPT), prompts([2, 3], PROMPT)
    assert (np.asarray(run(first).tokens) != np.asarray(run(second).tokens)).any()
    with pytest.raises(AssertionError, match="traced"):
        run(prompts([0, 1], PROMPT + 1))


LONG = CHUNK + 5
BLIND_MARGIN = 1e-3  # below it two float32 programs may rank the two likeliest tokens differently


def decoded(params, batch, sampling=None, **changes):
    """All tokens of `answer_ids`, i32[B, Y]."""
    settings = {"stop_ids": [NEVER], "max_new_tokens": LONG, "room": 32} | changes
    return np.concatenate(list(answer_ids(MODEL, params, batch, sampling or greedy_sampling(4), **settings)), axis=1)


@pytest.fixture(scope="module")
def long_answers(batch, params):
    return decoded(params, batch)


def test_chunks_join_to_the_one_loop(batch, params, long_answers, expected):
    chex.assert_shape(long_answers, (4, LONG))
    np.testing.assert_array_equal(long_answers[:, :NEW], expected)
    np.testing.assert_array_equal(decoded(params, batch, every=3), long_answers)
    sizes = [piece.shape[1] for piece in pieces_of(params, batch, 4)]
    assert sizes == [1, 4, 4, 4, 4, 4]


def pieces_of(params, batch, every):
    sampling = greedy_sampling(4)
    return list(answer_ids(MODEL, params, batch, sampling, stop_ids=[NEVER], max_new_tokens=LONG, room=32, every=every))


def test_greedy_rows_do_not_depend_on_their_batch(params, long_answers, next_token, record_property):
    """0, 1 and 3 images, prompts of four lengths. Where the two likeliest tokens are nearer than 1e-3, rows may part."""
    near = 0
    for row in range(4):
        alone = decoded(params, prompts([row], PROMPT), greedy_sampling(1))[0]
        margins = margins_of(next_token, row, alone)
        first = next((at for at, margin in enumerate(margins) if margin < BLIND_MARGIN), LONG)
        near += sum(margin < BLIND_MARGIN for margin in margins)
        assert alone[:first].tolist() == long_answers[row, :first].tolist()
        assert first > NEW
    record_property("tokens", 4 * LONG)
    record_property("margins_below_1e-3", near)
    assert near <= 2, f"{near} of {4 * LONG} margins are too small to compare: draw other weights"


def margins_of(next_token, row, answer):
    """By how much each token of a row's answer won, by the full forward."""
    batch, margins = prompts([row], PROMPT + LONG), []
    length = int((batch.segment_ids > 0).sum())
    for token in answer:
        best, margin = next_token(batch, np.array([length]))
        margins.append(float(margin))
        assert int(best[0]) == token or margin < BLIND_MARGIN
        batch.tokens[0, length], batch.segment_ids[0, length], batch.positions[0, length] = token, 1, length
        length += 1
    return margins


def test_drawn_rows_do_not_depend_on_their_batch(batch, params):
    seeds = [7, 7, 8, 9]
    (together,) = Options(temperature=1.3, top_k=20, seed=seeds).sampling(4, 4)
    answers = decoded(params, batch, together)
    again = decoded(params, batch, together)
    np.testing.assert_array_equal(answers, again)
    for row, seed in enumerate(seeds):
        (alone,) = Options(temperature=1.3, top_k=20, seed=seed).sampling(1, 1)
        np.testing.assert_array_equal(decoded(params, prompts([row], PROMPT), alone)[0], answers[row])
    (other,) = Options(temperature=1.3, top_k=20, seed=[1, 2, 3, 4]).sampling(4, 4)
    assert (decoded(params, batch, other) != answers).any(axis=1).all()


def test_several_stop_ids_end_rows_and_are_no_part_of_them(batch, params, long_answers):
    stops = [int(long_answers[0, 2]), int(long_answers[2, 4])]
    answers = decoded(params, batch, stop_ids=stops)
    for ours, free in zip(answers, long_answers, strict=True):
        hits = np.flatnonzero(np.isin(free, stops))
        end = hits[0] if hits.size else LONG
        assert ours[:end].tolist() == free[: min(end, answers.shape[1])].tolist()
        assert (ours[end:] == NO_TOKEN).all()


def test_a_second_prompt_of_the_same_bucket_compiles_nothing(params):
    """Other words, images, sampling, stop ids and lengths of the answer; counted by jax itself."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    decoded(params, prompts([0, 1, 2, 3], PROMPT))
    before = len(compiled)
    (drawing,) = Options(temperature=0.8, top_p=0.9, top_k=5, seed=4).sampling(4, 4)
    decoded(params, prompts([3, 2, 1, 0], PROMPT), drawing, stop_ids=[5, 6, 7], max_new_tokens=9, every=2)
    assert len(compiled) == before
    jax.jit(lambda x: x + 1)(np.arange(77))
    assert len(compiled) > before, "the count must see a compilation"


def test_stop_ids_are_padded(batch, params):
    assert stop_array([3]).tolist() == [3] + [NO_TOKEN] * 7
    assert stop_array(range(9)).size == 16
    state = prefill(MODEL, params, batch, greedy_sampling(4), stop_array([]), room=8)
    assert not state.done.any()


def test_an_empty_row_gives_no_token(batch, params):
    blank = empty_batch(CONFIG.data_spec.batch_shape(4, PROMPT))
    answers = greedy(MODEL, params, blank, max_new_tokens=NEW, stop_ids=(NEVER,)).tokens
    assert (np.asarray(answers) == NO_TOKEN).all()


@pytest.fixture
def with_cudnn():
    """(what stands for cuDNN) -> the model as it is on a GPU."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def build(implementation, **changes):
        attend = CudnnAttention(mesh, implementation=implementation)
        return build_model(tiny_config(changes), attend, attend)

    return build


def test_prefill_with_a_gpus_attention_equals_that_with_the_portable_one(batch, params, with_cudnn):
    model = with_cudnn("xla")
    cache = empty_cache(model, 4, PROMPT)
    ours, theirs = (jax.jit(partial(one.apply, method="prefill"))({"params": params}, batch, cache) for one in (model, MODEL))
    real = (np.asarray(batch.segment_ids) > 0)[..., None]
    np.testing.assert_allclose(ours.hidden * real, theirs.hidden * real, atol=1e-4)
    np.testing.assert_allclose(ours.cache.keys[:, real[..., 0]], theirs.cache.keys[:, real[..., 0]], atol=1e-4)


def test_prefill_lowers_for_cuda_with_the_kernels_and_without_a_mask(batch, params, with_cudnn, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    model = with_cudnn("cudnn", **{"train.compute_dtype": "bfloat16"})
    traced = jax.jit(partial(model.apply, method="prefill")).trace({"params": params}, batch, empty_cache(model, 4, PROMPT))
    text = traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')
    calls = re.findall(r'@__cudnn\$(\w+)\(.*?"mask_type": "(\w+)', text)
    assert calls == [("fmhaSoftmax", "PADDING"), ("fmhaSoftmax", "CAUSAL")], "the tower, its five tokens made even; the prompt"


@pytest.mark.quick
def test_empty_cache_shapes():
    cache = empty_cache(MODEL, 3, 10)
    chex.assert_shape([cache.keys, cache.values], (5, 3, 10, 2, 8))
    chex.assert_shape(cache.valid, (3, 10))
    assert not cache.valid.any()
    assert int(cache.filled) == 0
