"""A task: where its questions come from, how they are put, and how answers become numbers. Held-out rows are the first.

The field's benchmarks are in `evaluate/benchmarks/registry.py`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepstack_jax.data.encode.templates import AnyTemplate
from deepstack_jax.data.example import Example, Source
from deepstack_jax.evaluate.questions import Question, answered_turns
from deepstack_jax.evaluate.scorers.texts import ANLS, EXACT_MATCH, Scorer

SCORERS = {"exact_match": EXACT_MATCH, "anls": ANLS}  # of one's own rows


@dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl: a question (see `Question`), what a model said to it, and every score of that."""

    id: str
    row: int
    turn: int
    kind: str
    question: str  # its words without images
    references: list[str]
    prediction: str  # the answer
    tokens: int  # how many the model made for it, end of turn not counted
    scores: dict[str, float]  # scorer -> 0..1
    parsed: Any = None  # what of the answer was scored, as JSON has it
    details: dict[str, Any] = field(default_factory=dict)  # of its question
    margin: float | None = None  # by how much the closest choice of its tokens, or letters, was won; None where nobody looked
    prompt: str = ""  # all that the model read


def mean_by_kind(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """Scorer -> {"score": mean over all, "by_kind": {kind: mean}}; "by_kind" only where questions have kinds."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in predictions:
        for name, score in one.scores.items():
            found[name]["all"].append(score)
            if one.kind != "all":
                found[name][one.kind].append(score)
    aggregates: dict[str, dict[str, Any]] = {}
    for name, scores in found.items():
        means = {kind: float(np.mean(values)) for kind, values in sorted(scores.items())}
        aggregates[name] = {"score": means.pop("all")} | ({"by_kind": means} if means else {})
    return aggregates


def stripped(_question: Question, answer: str) -> str:
    """An answer without white space at its ends, which is what most benchmarks score."""
    return answer.strip()


def of_answer(read: Callable[[str], str]) -> Callable[[Question, str], str]:
    """The same of an answer whatever the question was."""
    return lambda _question, answer: read(answer.strip())


@dataclass(frozen=True)
class Task:
    """Questions with all that it takes to score their answers."""

    source: Source  # of the rows
    # (row, its images, template) -> its questions; a benchmark adds its suffix and its references here
    questions: Callable[[Example, Sequence[Any], AnyTemplate], list[Question]] = answered_turns
    # Every answer gets the score of each; none where the right answers are hidden, or a judge gives the score
    scorers: Mapping[str, Scorer] = field(default_factory=lambda: SCORERS)
    # The predictions as numbers, by scorer; at least {"score": ...} of each
    aggregate: Callable[[Sequence[Prediction]], dict[str, dict[str, Any]]] = mean_by_kind
    name: str = ""  # in the registry of benchmarks; "" = one's own rows
    protocol: str = ""  # its name there: "own" is the benchmark's own definition
    suffix: str = ""  # what follows every question, for the record; `questions` has added it
    open_suffix: str | None = None  # in its place behind questions without options, where that is another
    parse: Callable[[Question, str], Any] = stripped  # what of an answer is scored: becomes `Prediction.parsed`
    by_likelihood: bool = False  # a question with options is answered by the likeliest of its letters, not by generation
    max_new_tokens: int | None = None  # most tokens of an answer; None = as whoever asks says
    # File name -> content of what the benchmark's server or judge reads; None where it has neither
    submission: Callable[[Sequence[Prediction]], dict[str, str]] | None = None
