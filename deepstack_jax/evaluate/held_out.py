"""Held-out rows as questions to a model: every answered turn is asked, the true answers of the turns before it given."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deepstack_jax.data.encode.encoder import BadExample, try_row
from deepstack_jax.data.encode.templates import IMAGE_MARK
from deepstack_jax.data.example import Example, Source
from deepstack_jax.evaluate.questions import answered_turns
from deepstack_jax.evaluate.scorers import SCORERS
from deepstack_jax.generate.answers import Answerer, Turn
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.prompts import CutImage, cut_image, find_template


@dataclass(frozen=True)
class Question:
    """One answered turn of a row."""

    row: int
    name: str
    turn: int  # which question of the row, from 0
    turns: tuple[Turn, ...]  # all before its answer
    reference: str
    problem: str  # why it cannot be asked; "" where it can

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was done to its images, one for each (`encode.REMARKS`)."""
        cut = [image for turn in self.turns for image in turn.images]
        return tuple(remark for image in cut if isinstance(image, CutImage) for remark in image.remarks)


@dataclass(frozen=True)
class Prediction:
    """What a model said to a question, and every score of it."""

    question: Question
    text: str
    tokens: int
    scores: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """A line of predictions.jsonl."""
        asked = self.question
        words = asked.turns[-1].words.replace(IMAGE_MARK, "").strip()
        line = {"id": asked.name, "row": asked.row, "turn": asked.turn, "question": words, "reference": asked.reference}
        return line | {"prediction": self.text, "tokens": self.tokens} | self.scores


@dataclass(frozen=True)
class Refusal(BadExample):
    """A question that the model cannot be asked, such as one that is too long for it; the row itself could be read."""

    turn: int

    def as_dict(self) -> dict[str, Any]:
        """What it is made from."""
        return asdict(self)


def ask(
    answerer: Answerer,
    source: Source,
    options: Options,
    batch_size: int,
    rows: Iterable[int],
    done: Container[tuple[int, int]] = (),
) -> Iterator[list[Prediction | Refusal] | BadExample]:
    """Answer the questions of some rows, `batch_size` at a time, in their order.

    Args:
      rows: numbers of the rows.
      done: questions that are left out, as (row, turn).

    Yields:
      What became of a batch, or a row that cannot be asked, with the reason.

    Raises:
      RequestError: no such template.
    """
    find_template(options.template or answerer.template)  # a wrong name is no fault of the rows
    waiting: list[Question] = []
    for row in rows:
        found = try_row(source, row, lambda example: questions(example, answerer, options))
        if isinstance(found, BadExample):
            yield found
            continue
        waiting += [question for question in found if (question.row, question.turn) not in done]
        while len(waiting) >= batch_size:
            yield _answer(answerer, waiting[:batch_size], options, batch_size)
            waiting = waiting[batch_size:]
    if waiting:
        yield _answer(answerer, waiting, options, batch_size)


def questions(example: Example, answerer: Answerer, options: Options) -> list[Question]:
    """The questions of one row, its images cut once.

    Raises:
      ImageError: an image cannot be read. ConversationError: as `answered_turns`.
    """
    asked = answered_turns(example, find_template(options.template or answerer.template))
    images = [cut_image(image, answerer.config, options.exif) for image in example.images]
    found, turns = list[Question](), list[Turn]()
    for one in asked:
        for message in one.before[len(turns) :]:
            shown = sum(len(turn.images) for turn in turns)
            count = message.text.count(IMAGE_MARK) if images else 0
            turns.append(Turn(message.role, message.text, images[shown : shown + count]))
        found.append(Question(example.index, example.name, one.turn, tuple(turns), one.reference, one.problem))
    return found


def _answer(answerer: Answerer, asked: Sequence[Question], options: Options, batch_size: int) -> list[Prediction | Refusal]:
    """Answer some questions at once; where one cannot be asked, each alone, so that it spoils no other."""
    try:
        if problem := next((question.problem for question in asked if question.problem), ""):
            raise RequestError(problem)
        answers = answerer.answers([question.turns for question in asked], options, batch_size)
    except RequestError as error:
        if len(asked) == 1:
            return [Refusal(asked[0].row, asked[0].name, f"turn {asked[0].turn}: {error}", asked[0].turn)]
        return [result for question in asked for result in _answer(answerer, [question], options, batch_size)]
    return [
        Prediction(question, answer.text, answer.tokens, _scores(answer.text, question.reference))
        for question, answer in zip(asked, answers, strict=True)
    ]


def _scores(said: str, reference: str) -> dict[str, float]:
    return {name: scorer.score(said, (reference,)) for name, scorer in SCORERS.items()}
