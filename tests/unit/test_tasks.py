"""A task of another kind than held-out rows: its own words, references, scorers and numbers, through the same code."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deepstack_jax.data.encode.templates import Template
from deepstack_jax.data.example import Example
from deepstack_jax.evaluate.ask import ask
from deepstack_jax.evaluate.questions import Question, answered_turns
from deepstack_jax.evaluate.results import flat_scores, summarise
from deepstack_jax.evaluate.scorers.texts import Scorer
from deepstack_jax.evaluate.tasks import Prediction, Task, mean_by_kind
from deepstack_jax.generate.options import Options
from tests.unit.test_held_out import Echo, Rows, row

SUFFIX = "\nAnswer yes or no."


def with_suffix(example: Example, images: Sequence[Any], template: Template) -> list[Question]:
    """What a benchmark does to rows: a suffix, and any of several right answers."""
    found = []
    for question in answered_turns(example, images, template):
        asked = question.turns[-1]._replace(words=question.turns[-1].words + SUFFIX)
        references = tuple(question.references[0].split("|"))
        found.append(replace(question, turns=(*question.turns[:-1], asked), references=references))
    return found


def balanced(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """Every kind counts as much as any other."""
    means = mean_by_kind(predictions)
    return {name: entry | {"score": float(np.mean([*entry["by_kind"].values()]))} for name, entry in means.items()}


@pytest.fixture
def task() -> Task:
    rows = [row(0, "A?", "no|1 turns 0 images", "B?", "no"), row(1, "C?", "nothing")]
    rows = [replace(one, info={"kinds": kinds}) for one, kinds in zip(rows, (["easy", "hard"], ["hard"]), strict=True)]
    source: Any = Rows(rows)
    scorers = {"among": Scorer(lambda said, references: float(said in references), "share of answers among the right ones")}
    return Task(source, with_suffix, scorers, balanced)


def test_its_questions_scores_and_numbers_are_its_own(task):
    answerer: Any = Echo()
    predictions: list[Any] = [one for batch in ask(task, answerer, Options(), 2, range(2)) for one in batch]
    assert [one.question for one in predictions] == [f"{letter}?{SUFFIX}" for letter in "ABC"]
    assert [one.scores for one in predictions] == [{"among": 1.0}, {"among": 0.0}, {"among": 0.0}]
    assert predictions[0].references == ["no", "1 turns 0 images"]
    results = summarise(task, "mine", 2, predictions, (), {"decoding": "greedy"})
    assert results["scores"]["among"]["protocol"] == "share of answers among the right ones"
    assert flat_scores(results) == {"among": 0.5, "easy_among": 1.0, "hard_among": 0.0}
    assert mean_by_kind(predictions)["among"]["score"] == pytest.approx(1 / 3)
    assert mean_by_kind([]) == {}
