"""Many answers at once: each is what `generate` says alone, whoever comes and goes, and nothing is compiled after the start."""

import queue
from dataclasses import replace

import jax
import numpy as np
import pytest

from deepstack_jax.api import Options, RequestError
from deepstack_jax.data.encode.image import ImageError
from deepstack_jax.generate.prompts import PromptShape, Turn
from deepstack_jax.serve.engine import DEFECT, STOPPING, Busy, Engine, Failed, Limits, compilations, prompt_shapes
from tests.unit.talker import LIMITS, picture, started, talker

TIMEOUT = 120


@pytest.fixture(scope="module")
def lmm():
    return talker()


@pytest.fixture(scope="module")
def engine(lmm):
    with started(lmm) as engine:
        yield engine


class Asked:
    """One request; `answer` waits for the whole of it."""

    def __init__(self, engine: Engine, words: str, images=(), turns=(), **options):
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.ticket = engine.enter()
        whole = "max_new_tokens" not in options
        prompt, chosen = engine.encode([*turns, Turn("human", words, list(images))], Options(**options), whole=whole)
        engine.submit(self.ticket, prompt, chosen, self.events.put)

    def next(self):
        return self.events.get(timeout=TIMEOUT)

    def answer(self):
        """(text, last piece)"""
        said = []
        while True:
            piece = self.next()
            if isinstance(piece, Failed):
                raise piece
            said.append(piece.text)
            if piece.reason:
                return "".join(said), piece


def jobs(count: int) -> list[dict]:
    """Requests of mixed lengths, with no, one or two images, a stop string now and then, every third drawn."""
    rng, made = np.random.default_rng(5), []
    for number in range(count):
        images = [picture(10 * number + k, 8 + number % 20, 12) for k in range(number % 3)]
        words = "".join(map(chr, rng.integers(97, 123, int(rng.integers(1, 30 - 8 * len(images))))))
        job = {"words": words, "images": images, "max_new_tokens": int(rng.integers(1, 32))}
        if number % 3 == 1:
            job |= {"temperature": 1.3, "seed": number, "top_p": 0.95, "top_k": 20}
        if number % 5 == 2:
            job["stop"] = ["e", "Qx"]
        made.append(job)
    return made


def alone(lmm, job) -> tuple[str, int]:
    options = Options(**{name: value for name, value in job.items() if name not in ("words", "images")})
    return tuple(lmm.answers([(job["images"], job["words"])], options)[0])


def test_each_answer_is_that_of_generate_and_nothing_is_compiled(lmm, engine):
    """Thirty requests through three slots, more tokens than the ring has columns many times over."""
    counter = compilations()
    wanted = jobs(30)
    before = counter.count
    asked = [Asked(engine, **job) for job in wanted]
    answers = [one.answer() for one in asked]
    assert counter.count == before, "a request compiled something"
    expected = [alone(lmm, job) for job in wanted]
    before = counter.count
    jax.jit(lambda x: x + 2)(np.arange(79))
    assert counter.count > before, "the count must see a compilation"
    assert [(text, last.tokens) for text, last in answers] == expected
    assert len({text for text, _ in expected}) > 20
    for (_, last), job in zip(answers, wanted, strict=True):
        assert last.reason == ("length" if last.tokens == job["max_new_tokens"] and "stop" not in job else last.reason)
    assert {last.reason for _, last in answers} == {"length", "stop"}
    assert engine.load == (0, 0)


def test_a_conversation_and_a_limit_that_nobody_named(lmm, engine):
    turns = [Turn("human", "hi", [picture(1)]), Turn("gpt", "yes")]
    text, last = Asked(engine, "why?", turns=turns).answer()
    assert text == "".join(lmm.answerer.stream([*turns, Turn("human", "why?")], Options(max_new_tokens=LIMITS.answer)))
    assert (last.tokens, last.reason) == (20, "length")
    assert Asked(engine, "x" * 50).answer()[1].tokens == 64 - 51, "what the context leaves"


@pytest.mark.slow
def test_in_bfloat16_too_answers_are_those_of_generate(lmm):
    """Prompts alone; other padding may round otherwise, so two answers may part where the two likeliest tokens nearly tie."""
    config = replace(lmm.config, train=replace(lmm.config.train, compute_dtype="bfloat16"))
    half = replace(lmm, config=config, params=jax.tree.map(lambda leaf: leaf.astype("bfloat16"), lmm.params))
    engine = Engine(half.answerer, LIMITS._replace(images=0))
    wanted = [job | {"images": []} for job in jobs(30) if not {"temperature", "stop"} & job.keys()]
    asked = [Asked(engine, **job) for job in wanted]
    engine.start()
    answers, expected = [one.answer()[0] for one in asked], [alone(half, job)[0] for job in wanted]
    engine.close()
    other = [number for number, pair in enumerate(zip(answers, expected, strict=True)) if pair[0] != pair[1]]
    assert len(other) < len(wanted) / 4
    for number in other:
        said, theirs = answers[number], expected[number]
        same = next(at for at in range(len(theirs) + 1) if not said.startswith(theirs[: at + 1]))  # a token is a byte
        ids = half.answerer.encode([Turn("human", wanted[number]["words"])], Options()).ids
        likeliest = np.sort(half.logits([[*ids, *half.tokenizer.encode(theirs[:same])[0]]])[0, -1])
        assert likeliest[-1] - likeliest[-2] < 0.02 * abs(likeliest[-1]), wanted[number]
    assert expected != [alone(lmm, job)[0] for job in wanted], "of float32 it would be no test"


def test_an_end_token_ends_an_answer(lmm):
    free = lmm.answers([([], "hello")], Options(max_new_tokens=12))[0]
    (third,) = lmm.tokenizer.encode(free.text)[0][2:3].tolist()
    engine = Engine(replace(lmm, ends=(third,)).answerer, LIMITS._replace(images=0))
    engine.start()
    text, last = Asked(engine, "hello", max_new_tokens=12).answer()
    engine.close()
    assert last.reason == "stop"
    assert text == free.text[: free.text.index(free.text[2])].strip()


def test_who_leaves_frees_slot_and_place(lmm):
    """Three long answers take all slots, two wait; one of each kind leaves, the other two are answered."""
    engine = Engine(lmm.answerer, LIMITS._replace(images=0))
    long = [Asked(engine, "tell me more", max_new_tokens=45) for _ in range(3)]
    behind = [Asked(engine, "short", max_new_tokens=2) for _ in range(2)]
    engine._fill()
    engine._decode()
    assert engine.load == (3, 2)
    for one in (long[0], behind[1], behind[1]):
        one.ticket.leave()
    assert engine.load == (3, 1)
    engine.start()
    assert behind[0].answer()[1].reason == "length"
    assert [one.answer()[1].tokens for one in long[1:]] == [45, 45]
    tickets = [engine.enter() for _ in range(LIMITS.slots + LIMITS.waiting)]
    with pytest.raises(Busy, match="the server is full: 43 requests"):
        engine.enter()
    for ticket in tickets:
        ticket.leave()
    assert behind[1].events.empty()
    assert engine.load == (0, 0)
    engine.close()


@pytest.mark.parametrize(
    ("turns", "options", "error", "expected"),
    [
        ([Turn("human", "x" * 200)], {"max_new_tokens": 3}, RequestError, "takes 201 tokens .* context of this server is 64;"),
        ([Turn("human", "x" * 300)], {"max_new_tokens": 3}, RequestError, "takes 301 tokens .* context of this model is 256;"),
        ([Turn("human", "?", [b"no image"])], {}, ImageError, "cannot read image <8 bytes>: not in any image format"),
        ([Turn("human", "?", [picture(1)] * 3)], {}, RequestError, "3 images in a request, expected at most 2"),
        ([Turn("human", "<image> <image>", [picture(1)])], {}, RequestError, "2 <image> placeholders for 1 image"),
    ],
)
def test_what_cannot_be_asked_is_said_as_generate_says_it(turns, options, error, expected, engine):
    with pytest.raises(error, match=expected):
        engine.encode(turns, Options(**options), whole=not options)


def test_a_failure_of_the_device_is_told_and_the_next_is_answered(lmm, caplog, monkeypatch):
    engine = Engine(lmm.answerer, LIMITS._replace(images=0))
    real, calls = engine._decode, []

    def fails_once():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the device is gone")
        real()

    monkeypatch.setattr(engine, "_decode", fails_once)
    *lost, waiting = (Asked(engine, "hi", max_new_tokens=5) for _ in range(4))
    engine.start()
    for one in lost:
        with pytest.raises(Failed, match=DEFECT):
            one.answer()
    assert waiting.answer()[0] == alone(lmm, {"words": "hi", "images": [], "max_new_tokens": 5})[0]
    assert "the device is gone" in caplog.text
    engine.close()


def test_a_failure_of_one_answer_leaves_the_others(lmm, caplog):
    engine = Engine(lmm.answerer, LIMITS._replace(images=0))
    bad, good = Asked(engine, "hi", max_new_tokens=5), Asked(engine, "ho", max_new_tokens=5)
    bad.ticket.text.feed = lambda ids: 1 / 0
    engine.start()
    with pytest.raises(Failed, match=DEFECT):
        bad.answer()
    assert good.answer()[1].tokens == 5
    engine.close()


def test_who_waits_when_it_stops_is_told(lmm):
    engine = Engine(lmm.answerer, LIMITS._replace(images=0))
    asked = [Asked(engine, "hi", max_new_tokens=9) for _ in range(2)]
    engine.close()
    engine.start()
    for one in asked:
        with pytest.raises(Failed, match=STOPPING):
            one.answer()
    with pytest.raises(Failed, match=STOPPING):
        engine.enter()


def test_shapes_of_prompts_are_few_and_hold_every_prompt():
    limits = Limits(context=4096, images=4)
    shapes = prompt_shapes(limits, 576)
    assert shapes[:7] == tuple(PromptShape(64 << power, 0) for power in range(7))
    assert shapes[7:] == tuple(
        PromptShape(*pair) for pair in [(1024, 1), (2048, 1), (4096, 1), (2048, 2), (4096, 2), (2048, 4), (4096, 4)]
    )
    assert prompt_shapes(Limits(context=100, images=0), 4) == (PromptShape(64, 0), PromptShape(100, 0))
