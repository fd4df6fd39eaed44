"""Held-out rows of every odd kind: what is asked of them, with which images, and what is known to be wrong before that."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from deepstack_jax.api import LMM
from deepstack_jax.batch import Batch
from deepstack_jax.config import Config, DataConfig, MeshConfig
from deepstack_jax.data.encode.encoder import OverlongError
from deepstack_jax.data.encode.templates import TEMPLATES, get_template
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.data.example import BadExample, Source
from deepstack_jax.data.open import open_files
from deepstack_jax.evaluate.ask import Asked, ask, prepare
from deepstack_jax.evaluate.held_out import HeldOut, RunAnswerer, fill_batch, run_options
from deepstack_jax.evaluate.on_mesh import MeshAnswerer, over_mesh
from deepstack_jax.evaluate.questions import check_questions, check_rows, uninterrupted
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.families.build import build_model
from deepstack_jax.generate.decoding import NO_TOKEN, Greedy
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.printing import printable
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


def given(decode: Callable[[Batch], np.ndarray]) -> Callable[..., Greedy]:
    """Its tokens in place of a model's."""
    return lambda _, batch, **__: Greedy(decode(batch), np.full(len(batch.tokens), np.inf))


def asked_with(
    decode: Callable[[Batch], np.ndarray], source: Source, config: Config
) -> tuple[list[Prediction], list[BadExample]]:
    """What a run with this in place of its model's tokens predicts, and what it could not ask."""
    tokenizer, template = load_tokenizer(config.data.tokenizer), config.data.template
    how: Any = {"decode": given(decode), "likelihood": None}
    answerer = RunAnswerer(build_model(config), {}, config, tokenizer, template, **how)
    found = [one for batch in ask(Task(source), answerer, run_options(config), 4, range(len(source))) for one in batch]
    return [one for one in found if isinstance(one, Prediction)], [one for one in found if isinstance(one, BadExample)]


def asked_of(source: Source, config: Config) -> tuple[dict[int, list[list[int]]], list[BadExample]]:
    """For each row the gray of the pictures that are in the batch for each of its questions; and what could not be asked."""
    seen: list[list[int]] = []

    def decode(batch: Batch) -> np.ndarray:
        for blank, pixels, tokens in zip(batch.segment_ids.max(axis=1) == 0, batch.pixels, batch.token_source, strict=True):
            views = dict.fromkeys((tokens[tokens >= 0] // config.layout.patches).tolist())
            if not blank:
                seen.append([int(pixels[view, 0, 0, 0]) for view in views])
        return silence(batch)

    predictions, bad = asked_with(decode, source, config)
    assert len(seen) == len(predictions)
    by_row: dict[int, list[list[int]]] = {}
    for one, grays in zip(predictions, seen, strict=True):
        assert (one.id, one.prediction) == (printable(ROWS[one.row][0]["id"]), "")
        by_row.setdefault(one.row, []).append(grays)
    return by_row, bad


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
    bad = {example.index: example.name for example in check_questions(source, range(len(source)), DataConfig())}
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
    predictions, bad = asked_with(silence, source, config)
    assert [one.kind for one in predictions] == ["all", "all", "all", "fine", "all", "all", "all"]
    assert not bad


ENDS = {"v0": " red\n### Human: and", "plain": " red\nand", "v1": " red", "chatml": "red<|im_end|>and"}


@pytest.mark.parametrize("template", ENDS)
def test_an_answer_ends_before_the_templates_end_of_turn(template, source):
    """Under "v0" that is "###" and under "chatml" "<|im_end|>", which are not a token of their own here."""
    config = tiny_config(SETTINGS | {"data.template": template, "data.max_length": 512})
    said = load_tokenizer("bytes").encode(ENDS[template])[0]
    predictions, _ = asked_with(lambda batch: np.tile(said, (len(batch.tokens), 1)), source, config)
    assert {one.prediction for one in predictions} == {"red"}
    right = [one.references == ["red"] for one in predictions]
    assert [one.scores["exact_match"] for one in predictions] == right


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("few")
    Image.new("L", (20, 30), 90).save(folder / "b.png")
    rows = [row("one", ["b.png"], "<image> What?", "cat", "Sure?", "yes"), row("two", [], "What?", "cat")]
    return write(folder / "val.json", rows)


def told(batch: Batch, template: str) -> np.ndarray:
    """In place of a model: every row's tokens and pixels as a word, the template's end of turn, and more words."""
    chosen, tokenizer = get_template(template), load_tokenizer("bytes")
    said = []
    for row in range(len(batch.tokens)):
        real, views = batch.segment_ids[row] > 0, batch.token_source[row]
        seen = [batch.tokens[row][real].tolist(), (batch.visual_index[row][real] >= 0).tolist(), views[views >= 0].tolist()]
        word = hashlib.sha256(json.dumps([*seen, batch.pixels[row].sum().tolist()]).encode()).hexdigest()[:8]
        said.append(tokenizer.encode(f" {word}{(chosen.prompting or chosen).end} USER: and")[0])
    out = np.full((len(said), max(map(len, said))), NO_TOKEN)
    for row, ids in enumerate(said):
        end = np.flatnonzero(ids == tokenizer.eos_id)
        out[row, : (end[0] if end.size else ids.size)] = ids[: end[0] if end.size else ids.size]
    return out


def verbs(lmm: LMM) -> MeshAnswerer:
    """What the verb asks: the model over a mesh, here of one device."""
    return over_mesh(lmm.answerer, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_run_and_the_verb_predict_the_same_for_the_same_tokens(template, few):
    """One path from row to score, whatever the template: prompts, images, ends of turn, scores."""
    config = tiny_config(SETTINGS | {"data.template": template, "data.max_length": 1024, "decoder.max_positions": 2048})
    ours, bad = asked_with(lambda batch: told(batch, template), few, config)
    decode = given(lambda batch: told(batch, template))
    answerer = replace(verbs(LMM(config, {}, load_tokenizer("bytes"), template)), decode=decode)
    assert ours == [one for batch in ask(Task(few), answerer, run_options(config), 2, range(len(few))) for one in batch]
    assert len({one.prediction for one in ours}) == len(ours) == 3
    assert all(len(one.prediction) == 8 or not get_template(template).end for one in ours)
    assert not bad


@pytest.mark.parametrize("template", ["v0", "plain"])
def test_a_run_and_the_verb_predict_the_same(template, few):
    """By a model, compiled in the shapes of the run's batches and in those of prompts."""
    config = tiny_config(SETTINGS | {"data.template": template, "data.max_length": 512, "decoder.max_positions": 1024})
    model = build_model(config)
    params = model_params(model, fill_batch([], 4, config).batch)
    ours, bad = HeldOut(few, config, lambda *_: None, model, make_mesh(config.mesh)).predictions(params, len(few))
    answerer = verbs(LMM(config, params, load_tokenizer("bytes"), template))
    batches = ask(Task(few), answerer, run_options(config), 4, range(len(few)))
    theirs: list[Any] = [one for batch in batches for one in batch]
    assert [replace(one, margin=None) for one in ours] == [replace(one, margin=None) for one in theirs]
    assert [one.margin for one in ours] == pytest.approx([one.margin for one in theirs], rel=1e-3, abs=1e-4)
    assert len(ours) == 3
    assert not bad
    assert len({one.prediction for one in ours}) > 1, "answers that are all alike would show nothing"


def test_a_run_and_the_verb_leave_out_the_same(source):
    """But for what does not fit into a row of the run, which the verb asks all the same."""
    config = tiny_config(SETTINGS | {"data.template": "v0", "data.max_length": 400})
    ours, ours_bad = asked_with(silence, source, config)
    answerer = LMM(config, {}, load_tokenizer("bytes"), "v0").answerer
    found = list(prepare(Task(source), answerer, run_options(config), range(len(source))))
    asked = {(one.question.row, one.question.turn) for one in found if isinstance(one, Asked)}
    assert asked - {(one.row, one.turn) for one in ours} == {(13, 0)}
    assert {one.name for one in found if isinstance(one, BadExample)} <= {one.name for one in ours_bad}
