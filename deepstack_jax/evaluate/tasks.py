"""A task: where its questions come from, how they are put, and how answers become numbers. Held-out rows are the first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepstack_jax.data.encode.templates import Template
from deepstack_jax.data.example import Example, Source
from deepstack_jax.evaluate.questions import Question, answered_turns
from deepstack_jax.evaluate.scorers import SCORERS, Scorer


@dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl: a question, what a model said to it, and every score of that.

    Attributes:
      id, row, turn, kind, question, references: as in `Question`; `question` are its words without images.
      prediction: the answer.
      tokens: how many the model made for it, end of turn not counted.
      scores: scorer -> 0..1.
    """

    id: str
    row: int
    turn: int
    kind: str
    question: str
    references: list[str]
    prediction: str
    tokens: int
    scores: dict[str, float]


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


@dataclass(frozen=True)
class Task:
    """Questions with all that it takes to score their answers.

    Attributes:
      source: of the rows.
      questions: (row, its images, template) -> its questions; a benchmark adds its suffix and its references here.
      scorers: every answer gets the score of each.
      aggregate: the predictions as numbers, by scorer; at least {"score": ...} of each.
    """

    source: Source
    questions: Callable[[Example, Sequence[Any], Template], list[Question]] = answered_turns
    scorers: Mapping[str, Scorer] = field(default_factory=lambda: SCORERS)
    aggregate: Callable[[Sequence[Prediction]], dict[str, dict[str, Any]]] = mean_by_kind
