"""Asks a model the held-out questions and counts the right answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import jax
import numpy as np

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.conversation import IMAGE_MARK
from deepstack_jax.data.encode import BadExample, Encoder
from deepstack_jax.data.pipeline import BatchMaker, collate
from deepstack_jax.data.rows import EncodedExample
from deepstack_jax.data.sources import Source
from deepstack_jax.data.tokenize import load_tokenizer
from deepstack_jax.evaluation.scorers import exact_match
from deepstack_jax.inference.generate import NO_TOKEN
from deepstack_jax.types import PyTree

# Fills the last batch up to its static size.
_NOBODY = BadExample(-1, "", "")


@dataclass(frozen=True)
class Answer:
    """One question, what the model said, and what was expected."""

    index: int  # row of the source
    turn: int  # which question of the example, from 0
    kind: str
    question: str
    reference: str
    prediction: str
    score: float

    def as_dict(self) -> dict:
        return asdict(self)


def ask(
    source: Source, config: Config, decode: Callable[[Batch], np.ndarray], examples: int
) -> tuple[list[Answer], list[BadExample]]:
    """Ask every answered turn of the first `examples` examples, the true answers of earlier turns given.

    Args:
      source: held-out examples.
      config: the run; questions are decoded `evaluation.batch_size` at a time.
      decode: batch of prompts -> i32[B, Y] tokens, NO_TOKEN behind the end.
      examples: how many examples at the most.

    Returns:
      One Answer per question, in the order of the source, and the examples that could not be asked.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    questions, bad = _questions(source, config, examples)
    answers: list[Answer] = []
    size = config.evaluation.batch_size
    for first in range(0, len(questions), size):
        part = questions[first : first + size]
        batch = collate([prompt for prompt, _ in part] + [_NOBODY] * (size - len(part)), config).batch
        for (_, answer), ids in zip(part, decode(batch), strict=False):
            end = np.flatnonzero(ids == NO_TOKEN)
            said = tokenizer.decode(ids[: end[0]] if end.size else ids).strip()
            answers.append(Answer(**{**answer, "prediction": said, "score": exact_match(said, answer["reference"])}))
    return answers, bad


def _questions(source: Source, config: Config, count: int) -> tuple[list[tuple[EncodedExample, dict]], list[BadExample]]:
    encoder = Encoder(config)
    questions, bad = [], []
    for index in range(min(count, len(source))):
        try:
            example = source[index]
            prompts = encoder.questions(example)
        except ValueError as error:
            bad.append(BadExample(index, str(index), str(error)))
            continue
        kinds = example.info.get("kinds", ())
        asked = [message.text.replace(IMAGE_MARK, "").strip() for message in example.messages if message.role == "human"]
        for turn, (prompt, reference) in enumerate(prompts):
            if prompt.length > config.data.max_length:
                bad.append(BadExample(index, example.name, f"turn {turn}: a prompt of {prompt.length} tokens"))
                continue
            kind = kinds[turn] if turn < len(kinds) else "all"
            answer = {"index": index, "turn": turn, "kind": kind, "question": asked[turn], "reference": reference}
            questions.append((prompt, answer))
    return questions, bad


def mean_by_kind(answers: Sequence[Answer]) -> dict[str, float]:
    """{"fine_exact_match": share, ...}, and "exact_match" over all answers."""
    scores: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        scores["exact_match"].append(answer.score)
        if answer.kind != "all":
            scores[f"{answer.kind}_exact_match"].append(answer.score)
    return {name: float(np.mean(values)) for name, values in sorted(scores.items())}


class HeldOut:
    """Loss and answers on held-out examples, with functions that are compiled once.

    Args:
      source: held-out examples.
      config: the run.
      loss: (params, batch) -> LossSums, compiled.
      decode: (params, batch of prompts) -> i32[B, Y], compiled.
      put: a host's batch onto the devices.
    """

    def __init__(self, source: Source, config: Config, loss: Callable, decode: Callable, put: Callable) -> None:
        self.source, self._config = source, config
        self._loss, self._decode, self._put = loss, decode, put

    def loss(self, params: PyTree) -> dict[str, float]:
        """Token-weighted loss and accuracy over the first `evaluation.examples` examples, the answers given."""
        sums = np.zeros(3)
        for batch in self._batches():
            sums += np.array(jax.device_get(self._loss(params, self._put(batch))))
        weight = max(sums[1], 1.0)
        return {"validation_loss": sums[0] / weight, "validation_token_accuracy": sums[2] / weight}

    def answers(self, params: PyTree, examples: int) -> tuple[list[Answer], list[BadExample]]:
        """Greedy answers to the questions of the first `examples` examples."""

        def decode(batch: Batch) -> np.ndarray:
            return np.asarray(jax.device_get(self._decode(params, self._put(batch))))

        return ask(self.source, self._config, decode, examples)

    def _batches(self) -> Iterator[Batch]:
        maker = BatchMaker(self.source, Encoder(self._config))
        count, rows = min(self._config.evaluation.examples, len(self.source)), self._config.evaluation.batch_size
        for first in range(0, count, rows):
            examples = [maker.load(index) for index in range(first, min(count, first + rows))]
            yield collate(examples + [_NOBODY] * (rows - len(examples)), self._config).batch
