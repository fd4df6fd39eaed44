"""The one way from rows to scored answers, for a run's held-out data and for the verb alike."""

import json
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from deepstack_jax.background import in_background
from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.data.encode.encoder import try_record
from deepstack_jax.data.encode.templates import AnyTemplate
from deepstack_jax.data.example import BadExample, Example
from deepstack_jax.evaluate.on_mesh import Measured, MeshAnswerer
from deepstack_jax.evaluate.questions import Question
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.prompts import find_template, prompt_text
from deepstack_jax.parallel.distributed import ProcessSlice, allgather_str, max_over_hosts


@dataclass(frozen=True)
class Refusal(BadExample):
    """A question that the model cannot be asked, such as one that is too long for it; the row itself could be read."""

    turn: int


Result = Prediction | Refusal | BadExample
"""What became of a question, or of a row without one."""


class Asked(NamedTuple):
    """A question as the model reads it."""

    question: Question
    prompt: EncodedExample


Prepared = Asked | Refusal | BadExample
"""A question, or why there is none."""


def ask(task: Task, answerer: MeshAnswerer, options: Options, batch_size: int, rows: Iterable[int]) -> Iterator[list[Result]]:
    """Answer the questions of some rows, `batch_size` at a time, in their order.

    The images of the next batch are decoded while one is answered. Where a run has several hosts, each asks rows of its own,
    and all take part in every batch until none has a question left.

    Yields:
      What became of a batch, with the questions in between that could not be asked; or alone, a row that cannot be asked.

    Raises:
      RequestError: no such template.
    """
    with closing(in_background(prepare(task, answerer, options, rows), batch_size)) as found:
        while True:
            batch: list[Prepared] = []
            count = 0
            while count < batch_size and (one := next(found, None)) is not None:
                if isinstance(one, BadExample) and not isinstance(one, Refusal):
                    yield [one]
                    continue
                count += isinstance(one, Asked)
                batch.append(one)
            answered = answer(task, answerer, options, batch_size, batch)
            if batch:
                yield answered
            if not max_over_hosts(count):
                return


def answer(task: Task, answerer: MeshAnswerer, options: Options, batch_size: int, prepared: Sequence[Prepared]) -> list[Result]:
    """What becomes of at most `batch_size` questions; all hosts take part, also those without one."""
    asked = [one for one in prepared if isinstance(one, Asked)]
    answers = iter(_answers(task, answerer, options, batch_size, asked) if max_over_hosts(len(asked)) else ())
    template = find_template(options.template or answerer.template, answerer.tokenizer)
    return [_scored(task, one.question, next(answers), template) if isinstance(one, Asked) else one for one in prepared]


def _answers(task: Task, answerer: MeshAnswerer, options: Options, batch_size: int, asked: Sequence[Asked]) -> list[Measured]:
    """Generated, or where the task says so and there are options, the likeliest of their letters."""
    if not task.by_likelihood:
        return answerer.answer_batch([one.prompt for one in asked], options, batch_size)
    free = [one.prompt for one in asked if not one.question.options]
    choices = [one.question for one in asked if one.question.options]
    chosen = iter(answerer.choose(choices, options, batch_size))
    made = iter(answerer.answer_batch(free, options, batch_size) if max_over_hosts(len(free)) else ())
    return [next(chosen if one.question.options else made) for one in asked]


def prepare(
    task: Task,
    answerer: MeshAnswerer,
    options: Options,
    rows: Iterable[int],
    only: Container[tuple[int, int]] | None = None,
    remarks: Counter[str] | None = None,
) -> Iterator[Prepared]:
    """The questions of some rows, read and encoded on the host: nothing here touches a device, so a thread may do it.

    Args:
      only: questions that are asked, as (row, turn); None = all.
      remarks: what was done to images is counted here (`encoder.REMARKS`).

    Raises:
      RequestError: no such template.
    """
    template = find_template(options.template or answerer.template, answerer.tokenizer)  # a wrong name is not the rows' fault

    def prompts_of(example: Example) -> list[Asked | Refusal]:
        images = answerer.cut_images(example.images, options)
        if remarks is not None:
            remarks.update(remark for image in images for remark in image.remarks)
        questions = task.questions(example, images, template)
        return [_encode(one, answerer, options) for one in questions if only is None or (one.row, one.turn) in only]

    for row in rows:
        found = try_record(task.source, row, prompts_of, lost=True)
        yield from [found] if isinstance(found, BadExample) else found


def _encode(question: Question, answerer: MeshAnswerer, options: Options) -> Asked | Refusal:
    try:
        if question.problem:
            raise RequestError(question.problem)
        return Asked(question, answerer.encode(question.turns, options, placed=True))
    except RequestError as error:
        return Refusal(question.row, question.id, f"turn {question.turn}: {error}", question.turn)


def _scored(task: Task, question: Question, answer: Measured, template: AnyTemplate) -> Prediction:
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
        margin=answer.margin if answer.margin is not None and math.isfinite(answer.margin) else None,
        prompt=prompt_text(question.turns, template),
    )


def result_of(record: Mapping[str, Any]) -> Result:
    """The inverse of `asdict`."""
    return (Prediction if "prediction" in record else Refusal if "turn" in record else BadExample)(**record)


def of_all_hosts(results: Sequence[Result], part: ProcessSlice) -> list[Result]:
    """What all processes have found, which is the same list on each."""
    if part.count == 1:
        return [*results]
    mine = json.dumps([asdict(one) for one in results] if part.is_leader else [])
    return [result_of(record) for text in allgather_str(mine) for record in json.loads(text)]
