"""Held-out rows of every odd kind: what is asked of them, with which images, and what is known to be wrong before that."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepstack_jax.api import LMM
from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.encode.encoder import BadExample, OverlongError
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.data.example import Source
from deepstack_jax.data.open import open_files
from deepstack_jax.evaluate import held_out, runner
from deepstack_jax.evaluate.questions import check_questions, check_rows, uninterrupted
from deepstack_jax.families.build import build_model
from deepstack_jax.generate.decoding import NO_TOKEN
from deepstack_jax.generate.options import Options
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.printing import printable
from deepstack_jax.train.__main__ import make_decode
from tests.unit.tiny import model_params, tiny_config

PICTURES = {"a.png": 10, "b.png": 90, "c.png": 200}  # all of one gray, so that it tells which one a question got
SETTINGS = {
    "data.template": "direct",
    "data.tokenizer": "bytes",
    "data.max_length": 96,
    "data.max_images": 2,
    "decoder.vocab_size": 259,
    "evaluation.examples": 99,
    "evaluation.batch_size": 4,
    "evaluation.max_new_tokens": 5,
}


def row(name: str, images: list[str], *turns: str) -> dict[str, Any]:
    speakers = ("gpt", "human") if turns[0].startswith("(first) ") else ("human", "gpt")
    said = [{"from": speakers[at % 2], "value": text.removeprefix("(first) ")} for at, text in enumerate(turns)]
    return {"id": name, "image": images, "conversations": said}


# Row -> what of it is bad before images are decoded, and the gray of the pictures that each question is given.
ROWS: list[tuple[dict[str, Any], str, list[list[int]]]] = [
    (row("plain", ["a.png"], "<image>\nColour?", "red"), "", [[10]]),
    (row("later", ["b.png"], "Hello there", "hi", "<image>\nWhat?", "cat"), "", [[], [90]]),
    (
        row("two", ["a.png", "c.png"], "<image>\nFirst?", "x", "<image>\nAnd?", "y", "Sure?", "z"),
        "",
        [[10], [10, 200], [10, 200]],
    ),
    (row("both at once", ["c.png", "b.png"], "A <image> B <image>", "x"), "", [[200, 90]]),
    (row("text", [], "2 + 2?", "4"), "", [[]]),
    (row("nothing to say", ["a.png"], "<image>", ""), "", [[10]]),
    (row("begins with an answer", ["a.png"], "(first) Hi", "<image> What?", "cat"), "", [[10]]),
    (row("draws", ["a.png", "b.png"], "Draw", "<image> there", "<image> Same?", "no"), "turn 0: its answer holds", [[10, 90]]),
    (row("asks last", ["a.png"], "<image> What?", "cat", "Sure?"), "ends with 'human'", [[10]]),
    (row("silent", [], "(first) Hi"), "has no human turn", []),
    (row("unnamed", [], "<image> What?", "cat"), "has 1 <image> for 0 images", []),
    (row("gone", ["gone.png"], "<image> What?", "cat"), "gone.png: No such file", []),
    (row("cut", ["cut.png"], "<image> What?", "cat"), "", []),
    (row("many", ["a.png"] * 3, "<image>" * 3, "cat"), "3 images, a row has room for 2", []),
    (row("grows", [], "A?", "b", "C" * 99, "d"), "107 tokens with its images, a row holds 96", [[]]),
    (row("plain", ["b.png"], "<image> The same id?", "yes"), "", [[90]]),
    ({"id": "no turns", "conversations": []}, "no conversations", []),
    ({"id": r"\ud800", "conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "b"}]}, "", [[]]),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("rows")
    for name, gray in PICTURES.items():
        Image.new("L", (20, 30), gray).save(folder / name)
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:48])
    return write(folder / "val.json", [given for given, _, _ in ROWS])


def silence(batch: Batch) -> np.ndarray:
    return np.full((len(batch.tokens), 1), NO_TOKEN)


def write(file: Path, rows: list[dict[str, Any]]) -> Source:
    file.write_text(json.dumps(rows))
    return open_files(str(file), str(file.parent))


def asked_of(source: Source, config: Config) -> tuple[dict[int, list[list[int]]], list[BadExample]]:
    """For each row the gray of the pictures that stand in the batch for each of its questions; and what could not be asked."""
    seen: dict[int, list[list[int]]] = {}

    def decode(batch: Batch) -> np.ndarray:
        for number, pixels, tokens in zip(batch.example_id[:, 0].tolist(), batch.pixels, batch.token_source, strict=True):
            views = dict.fromkeys((tokens[tokens >= 0] // config.layout.patches).tolist())
            if number >= 0:
                seen.setdefault(number, []).append([int(pixels[view, 0, 0, 0]) for view in views])
        return silence(batch)

    answers, bad = runner.ask(source, config, decode, len(source), make_mesh(config.mesh))
    assert [(answer.id, answer.prediction) for answer in answers] == [
        (printable(ROWS[number][0]["id"]), "") for number, asked in sorted(seen.items()) for _ in asked
    ]
    return seen, bad


def test_every_question_gets_the_images_up_to_its_turn(source):
    seen, bad = asked_of(source, tiny_config(SETTINGS))
    assert seen == {number: asked for number, (_, _, asked) in enumerate(ROWS) if asked}
    reasons = {example.index: (example.name, example.reason) for example in bad}
    unasked = {number for number, (given, why, asked) in enumerate(ROWS) if not asked or why.startswith("turn 0")}
    assert unasked <= reasons.keys()
    assert {reasons[number][0] for number in unasked} == {ROWS[number][0]["id"] for number in unasked}
    assert "cut.png" in reasons[12][1]
    assert "turn 1: a prompt of 105 tokens with its images, expected 96 at most" in reasons[14][1]


def test_what_is_wrong_shows_before_an_image_is_decoded(source):
    bad = {example.index: example for example in check_rows(source, tiny_config(SETTINGS))}
    assert bad.keys() == {number for number, (_, why, _) in enumerate(ROWS) if why}
    for number, example in bad.items():
        assert ROWS[number][1] in example.reason
        assert example.name == ROWS[number][0]["id"]


def test_before_a_model_is_loaded_only_what_no_model_can_be_asked(source):
    bad = {example.index: example.name for example in check_questions(source, range(len(source)))}
    assert [*bad.values()] == ["silent", "unnamed", "gone", "no turns"]


def test_the_answer_has_to_fit_behind_the_prompt(tmp_path):
    source = write(tmp_path / "val.json", [row("x", [], "A" * 40, "b")])
    assert not check_rows(source, tiny_config(SETTINGS))
    (bad,) = check_rows(source, tiny_config(SETTINGS | {"decoder.max_positions": 45}))
    assert "turn 0: a prompt of 41 tokens with its images, expected 40 at most" in bad.reason


def test_too_long_stops_the_start_and_not_what_has_begun(source):
    config = tiny_config(SETTINGS | {"data.overlong": "error"})
    with pytest.raises(OverlongError, match="107 tokens"):
        check_rows(source, config)
    assert 14 in {example.index for example in check_rows(source, uninterrupted(config))}


def test_names_of_questions_in_a_strangers_row_are_taken_only_where_they_are_names(tmp_path):
    given = [row("x", [], "A?", "b") | {"kinds": kinds} for kinds in (5, "fine", [None], ["fine"], [["fine"]], [], {})]
    source, config = write(tmp_path / "val.json", given), tiny_config(SETTINGS)
    answers, bad = runner.ask(source, config, silence, 9, make_mesh(config.mesh))
    assert [answer.kind for answer in answers] == ["all", "all", "all", "fine", "all", "all", "all"]
    assert not bad


def test_an_answer_ends_before_the_templates_end_of_turn(tmp_path):
    """Under "v0" that is "###", which is no token of its own."""
    source = write(tmp_path / "val.json", [row("x", [], "A?", "red")])
    config = tiny_config(SETTINGS | {"data.template": "v0", "data.max_length": 400})
    said = load_tokenizer("bytes").encode(" red\n### Human: and")[0]
    answers, _ = runner.ask(source, config, lambda batch: np.tile(said, (len(batch.tokens), 1)), 9, make_mesh(config.mesh))
    assert [(answer.prediction, answer.score) for answer in answers] == [("red", 1.0)]


def test_both_evaluators_give_the_same_answers(source):
    """That of a training run and that of the verb, which asks any model: the same questions, images and words said."""
    config = tiny_config(SETTINGS | {"data.template": "v0", "data.max_length": 400})
    tokenizer, mesh, model = load_tokenizer("bytes"), make_mesh(config.mesh), build_model(config)
    batch = runner._collate([], 4, config).batch
    params = model_params(model, batch)
    ours, ours_bad = runner.HeldOut(source, config, lambda *_: None, make_decode(model, config, tokenizer), mesh).answers(
        params, len(source)
    )
    answerer = LMM(config, params, tokenizer, "v0").answerer
    options = Options(max_new_tokens=config.evaluation.max_new_tokens)
    results = list(held_out.ask(answerer, source, options, 4, range(len(source))))
    theirs = [one for part in results for one in ([part] if isinstance(part, BadExample) else part)]
    said = {(one.question.name, one.question.row, one.question.turn): one for one in theirs if not isinstance(one, BadExample)}
    del said["many", 13, 0]  # a row of the run has no room for its images
    assert {(one.id, one.index, one.turn): one.prediction for one in ours} == {at: one.text for at, one in said.items()}
    assert [one.score for one in ours] == [one.scores["exact_match"] for one in said.values()]
    assert len({one.prediction for one in ours}) > 3, "answers that are all alike would show nothing"
    assert {one.name for one in theirs if isinstance(one, BadExample)} <= {one.name for one in ours_bad}
