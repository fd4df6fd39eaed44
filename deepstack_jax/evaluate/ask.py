"""The one way from rows to scored answers, for a run's held-out data and for the verb alike."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.data.encode.encoder import try_record
from deepstack_jax.data.example import BadExample, Example
from deepstack_jax.evaluate.questions import Question
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.generate.answers import Answer, Answerer
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.prompts import find_template
from deepstack_jax.parallel.distributed import max_over_hosts


@dataclass(frozen=True)
class Refusal(BadExample):
    """A question that the model cannot be asked, such as one that is too long for it; the row itself could be read."""

    turn: int


class _Asked(NamedTuple):
    question: Question
    prompt: EncodedExample


def ask(
    task: Task,
    answerer: Answerer,
    options: Options,
    batch_size: int,
    rows: Iterable[int],
    *,
    done: Container[tuple[int, int]] = (),
    remarks: Counter[str] | None = None,
) -> Iterator[list[Prediction | Refusal | BadExample]]:
    """Answer the questions of some rows, `batch_size` at a time, in their order.

    Images are decoded batch by batch. Where a run has several hosts, each asks rows of its own, and all take part in every
    batch until none has a question left.

    Args:
      done: questions that are left out, as (row, turn).
      remarks: what was done to images is counted here (`encoder.REMARKS`).

    Yields:
      What became of a batch, with the questions in between that could not be asked; or alone, a row that cannot be asked.

    Raises:
      RequestError: no such template.
    """
    found = _prompts(task, answerer, options, rows, done, remarks)
    while True:
        batch: list[_Asked | Refusal] = []
        asked: list[_Asked] = []
        while len(asked) < batch_size and (one := next(found, None)) is not None:
            if isinstance(one, _Asked):
                asked.append(one)
            elif not isinstance(one, Refusal):
                yield [one]
                continue
            batch.append(one)
        more = max_over_hosts(len(asked))
        answers = iter(answerer.answer_encoded([one.prompt for one in asked], options, batch_size) if more else ())
        if batch:
            yield [_scored(task, one.question, next(answers)) if isinstance(one, _Asked) else one for one in batch]
        if not more:
            return


def _prompts(
    task: Task,
    answerer: Answerer,
    options: Options,
    rows: Iterable[int],
    done: Container[tuple[int, int]],
    remarks: Counter[str] | None,
) -> Iterator[_Asked | Refusal | BadExample]:
    template = find_template(options.template or answerer.template)  # a wrong name is not the rows' fault

    def prompts_of(example: Example) -> list[_Asked | Refusal]:
        images = answerer.cut_images(example.images, options)
        if remarks is not None:
            remarks.update(remark for image in images for remark in image.remarks)
        questions = [one for one in task.questions(example, images, template) if (one.row, one.turn) not in done]
        return [_encode(question, answerer, options) for question in questions]

    for row in rows:
        found = try_record(task.source, row, prompts_of, lost=True)
        yield from [found] if isinstance(found, BadExample) else found


def _encode(question: Question, answerer: Answerer, options: Options) -> _Asked | Refusal:
    try:
        if question.problem:
            raise RequestError(question.problem)
        return _Asked(question, answerer.encode(question.turns, options, placed=True))
    except RequestError as error:
        return Refusal(question.row, question.id, f"turn {question.turn}: {error}", question.turn)


def _scored(task: Task, question: Question, answer: Answer) -> Prediction:
    parsed = task.parse(question, answer.text)
    return Prediction(
        id=question.id,
        row=question.row,
        turn=question.turn,
        kind=question.kind,
        question=question.words,
        references=list(question.references),
        prediction=answer.text,
        tokens=answer.tokens,
        scores={name: scorer.score(parsed, question.references) for name, scorer in task.scorers.items()},
        parsed=parsed,
        details=dict(question.details),
    )
