"""The same answers whatever the batch and the devices; letters by likelihood; questions of like length together."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from deepstack_jax.config import Config, DataConfig, LimitsConfig, MeshConfig
from deepstack_jax.data.encode.templates import get_template
from deepstack_jax.data.example import Example, Message, SourceError
from deepstack_jax.evaluate.batches import batches_of
from deepstack_jax.evaluate.checkpoint import EvalCheckpoint
from deepstack_jax.evaluate.on_mesh import MeshAnswerer, near_length, over_mesh, share_of
from deepstack_jax.evaluate.questions import Question, answered_turns
from deepstack_jax.evaluate.results import NEAR, protocol_of, summarise
from deepstack_jax.evaluate.runner import EvaluationRequest, ask_all, checkpoint_digest, open_task
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.generate.options import Options
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.printing import Console
from tests.unit.made_benchmarks import MADE
from tests.unit.made_examples import MadeExamples, draw
from tests.unit.talker import talker

OPTIONS = Options(max_new_tokens=8)
LETTERS = "ABCDEFGHIJKL"


class Asked(list):
    """Rows of one question each, with one picture."""

    def __init__(self, words: Sequence[str]) -> None:
        texts = [(Message("human", f"<image>\n{text}"), Message("gpt", "a")) for text in words]
        super().__init__(Example(row, f"row{row}", (draw(row),), said) for row, said in enumerate(texts))


@pytest.fixture(scope="module")
def lmm():
    return talker()


def over(lmm: Any, devices: int, **mesh: int) -> MeshAnswerer:
    return over_mesh(lmm.answerer, make_mesh(MeshConfig(**mesh), jax.devices()[:devices]))


def request(task: Task, batch_size: int) -> EvaluationRequest:
    config = Config(data=DataConfig(max_bad_fraction=1.0))
    return EvaluationRequest(task, config, "made", {}, len(task.source), OPTIONS, batch_size)


def predictions(answerer: MeshAnswerer, task: Task, batch_size: int) -> list[Prediction]:
    console = Console(file=io.StringIO(), width=200)
    return ask_all(answerer, request(task, batch_size), EvalCheckpoint(None, None), console)[0]


def assert_same(ours: Sequence[Prediction], theirs: Sequence[Prediction]) -> None:
    """The same in every row that was no near tie in either; the margins are the same but for rounding."""
    assert [(one.row, one.turn, one.prompt) for one in ours] == [(one.row, one.turn, one.prompt) for one in theirs]
    sure = [(a, b) for a, b in zip(ours, theirs, strict=True) if (a.margin or 0) > NEAR and (b.margin or 0) > NEAR]
    assert len(sure) >= len(ours) - 2, "too many near ties to compare: draw other weights"
    assert [a.prediction for a, _ in sure] == [b.prediction for _, b in sure]
    assert [a.margin for a, _ in sure] == pytest.approx([b.margin for _, b in sure], rel=1e-3, abs=1e-4)


def test_answers_do_not_depend_on_the_batch_or_the_devices(lmm):
    source: Any = Asked(["What?", "Who is it", "?", "How many are there", "So", "And"])
    together = predictions(over(lmm, 4), Task(source), 8)
    assert len({one.prediction for one in together}) > 2
    assert_same(predictions(over(lmm, 1), Task(source), 1), together)


@pytest.fixture(scope="module")
def even():
    """Of a size that two devices can cut."""
    return talker(260)


def test_nor_on_how_the_parameters_are_cut(even):
    source: Any = Asked(["What?", "Who is it", "?", "How many are there"])
    whole, cut = over(even, 1), over(even, 2, tensor=2)
    assert {leaf.size // leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(cut.params)} == {1, 2}
    assert checkpoint_digest(cut) == checkpoint_digest(whole), "or a resumed evaluation would begin again on another mesh"
    assert_same(predictions(cut, Task(source), 4), predictions(whole, Task(source), 4))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2}, {"tensor": 2}, {"fsdp": 2, "tensor": 2}])
def test_nor_with_images_of_all_numbers_and_parameters_that_are_cut(mesh, even):
    task = Task(MadeExamples(16))
    assert_same(predictions(over(even, 4, **mesh), task, 8), predictions(over(even, 1), task, 3))


@pytest.mark.slow
def test_the_likeliest_letter_does_not_depend_on_how_the_parameters_are_cut(even):
    source: Any = Asked(["A. red\nB. blue", "Which of the letters", "Choose"])
    task = Task(source, with_options, by_likelihood=True)
    assert_same(predictions(over(even, 4, tensor=2), task, 4), predictions(over(even, 1), task, 3))


def with_options(example: Example, images: Sequence[Any], template: Any) -> list[Question]:
    return [replace(one, options=tuple("abcdefghijkl")) for one in answered_turns(example, images, template)]


def test_the_likeliest_letter_is_that_of_the_logits(lmm):
    words = ["A. red\nB. blue", "Which of the letters", "Choose"]
    source: Any = Asked(words)
    found = predictions(over(lmm, 4), Task(source, with_options, by_likelihood=True), 4)
    for row, one in enumerate(found):
        before, after = one.prompt.split("<image>")
        ids = [lmm.tokenizer.bos_id] if lmm.tokenizer.bos_id is not None else []
        ids += [*lmm.tokenizer.encode(before)[0], -200, *lmm.tokenizer.encode(after + get_template(lmm.template).lead)[0]]
        said = [lmm.tokenizer.encode(letter)[0].tolist() for letter in LETTERS]
        assert {len(letter) for letter in said} == {1}
        scores = lmm.logits(np.array([ids]), [[draw(row)]])[0, -1]
        letters = scores[[letter[0] for letter in said]]
        assert one.prediction == LETTERS[int(letters.argmax())]
        assert one.margin == pytest.approx(letters.max() - np.sort(letters)[-2], rel=1e-3, abs=1e-4)
    assert len({one.prediction for one in found}) > 1


def test_questions_of_like_length_are_asked_together(lmm):
    source = MadeExamples(20, refused=(3,), broken=(5,))
    batches, bad = batches_of(Task(source), lmm.answerer, OPTIONS, range(20), 4)
    assert [one.index for one in bad] == [3]
    images = [(0, 1, 0, 2)[place.row % 4] for batch in batches for place in batch]
    assert [len(batch) for batch in batches] == [4] * 4 + [3]
    assert images == sorted(images, reverse=True)
    assert sorted(place for batch in batches for place in batch) == [(row, 0) for row in range(20) if row != 3]


class Grouped(MadeExamples):
    """Read five rows at once."""

    def group(self, index: int) -> int:
        return index // 5


def test_questions_that_are_read_together_are_asked_together(lmm):
    batches, _ = batches_of(Task(Grouped(20, refused=(3, 7))), lmm.answerer, OPTIONS, range(20), 4)
    places = [place for batch in batches for place in batch]
    groups, images = [place.row // 5 for place in places], [(0, 1, 0, 2)[place.row % 4] for place in places]
    assert len(groups) == 18
    assert [group for at, group in enumerate(groups) if not at or group != groups[at - 1]] == list(dict.fromkeys(groups))
    for group in range(4):
        mine = [count for count, held in zip(images, groups, strict=True) if held == group]
        assert mine == sorted(mine, reverse=True)
    largest = [
        max(count for count, held in zip(images, groups, strict=True) if held == group) for group in dict.fromkeys(groups)
    ]
    assert largest == sorted(largest, reverse=True)


def test_a_task_is_told_from_another_by_its_files_and_read_within_the_limits(tmp_path):
    MADE["docvqa", "parquet"](tmp_path / "docvqa")
    given: Any = (Console(file=io.StringIO()),)
    opened = open_task("docvqa", str(tmp_path), Config(), *given, most_rows=2, options=OPTIONS, batch_size=4)
    assert (opened.rows, list(opened.origin["files"])) == (2, ["DocVQA/validation-00000-of-00001.parquet"])
    tight = Config(data=DataConfig(limits=LimitsConfig(group_bytes=10)))
    with pytest.raises(SourceError, match=r"config\.data\.limits\.group_bytes=10"):
        open_task("docvqa", str(tmp_path), tight, *given, most_rows=2, options=OPTIONS, batch_size=4)


def test_lengths_are_near():
    lengths = (1, 32, 33, 512, 577, 640, 1025, 2880)
    assert [near_length(length) for length in lengths] == [32, 32, 64, 512, 640, 640, 1152, 3072]


def test_a_batch_splits_over_the_mesh(lmm):
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:4])
    assert [share_of(mesh, size) for size in (1, 4, 5, 8)] == [4, 4, 8, 8]


def test_near_ties_are_counted_and_the_protocol_says_all_that_scores_depend_on(lmm):
    source: Any = Asked(["What?"])
    task = Task(source, name="made", protocol="own", suffix="\nOne word.")
    one = Prediction("a", 0, 0, "all", "What?", ["a"], "a", 1, {"exact_match": 1.0}, margin=5e-4)
    protocol = protocol_of(lmm.config, OPTIONS, "direct", task, "0123")
    results = summarise(task, "made", 2, [one, replace(one, margin=0.5), replace(one, margin=None)], (), protocol)
    assert results["near_ties"] == 1
    assert (protocol["template"], protocol["suffix"], protocol["checkpoint"]) == ("direct", "\nOne word.", "0123")
    assert protocol["image"]["size"] == lmm.config.image.size
    assert protocol["versions"]["jax"] == jax.__version__
    assert protocol["scorers"].keys() == task.scorers.keys()
    assert "open_suffix" not in protocol
    mmmu = protocol_of(lmm.config, OPTIONS, "direct", replace(task, open_suffix="\nIn a word."))
    assert mmmu["open_suffix"] == "\nIn a word."
