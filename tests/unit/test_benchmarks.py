"""The registry of benchmarks, and each task over files in the form in which its benchmark is published."""

import json

import pytest

from deepstack_jax.data.encode.templates import get_template
from deepstack_jax.data.open import MissingError
from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate.benchmarks.registry import TASKS, find_task
from deepstack_jax.evaluate.questions import Question
from deepstack_jax.evaluate.tasks import Task


def questions_of(task: Task) -> list[Question]:
    """All questions of all rows."""
    rows = [task.source[row] for row in range(len(task.source))]
    return [one for row in rows for one in task.questions(row, row.images, get_template("v1"))]


def scores(task: Task, question: Question, answer: str) -> dict[str, float]:
    parsed = task.parse(question, answer)
    return {name: scorer.score(parsed, question.references) for name, scorer in task.scorers.items()}


def test_an_unknown_task_or_protocol_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="there is no task 'receipt'; nearest valid name: 'receipts'"):
        find_task("receipt", str(tmp_path))
    with pytest.raises(ConfigError, match="task receipts has no protocol 'papers'; valid names: own"):
        find_task("receipts", str(tmp_path), "papers")


@pytest.mark.parametrize("name", TASKS)
def test_missing_files_are_one_line_that_says_where_they_come_from(name, tmp_path):
    with pytest.raises(MissingError) as error:
        find_task(name, str(tmp_path))
    assert TASKS[name].origin in str(error.value)
    assert "\n" not in str(error.value)


def test_receipts(tmp_path):
    folder = tmp_path / "receipts"
    folder.mkdir()
    asked = {
        "company": "What is the name of the company that issued this receipt?",
        "date": "What is the date on this receipt?",
    }
    asked |= {"address": "What is the address of the company on this receipt?", "total": "What is the total amount?"}
    turns = [
        {"from": "human", "value": f"{'<image>' * (name == 'company')}\n{words}\nOne word."} for name, words in asked.items()
    ]
    answers = [{"from": "gpt", "value": f"The {name}"} for name in asked]
    fields = [turn for pair in zip(turns, answers, strict=True) for turn in pair]
    lines = [{"from": "human", "value": "<image>\nTranscribe this."}, {"from": "gpt", "value": "a total"}]
    rows = [{"id": at, "image": "a.png", "conversations": said} for at, said in enumerate((fields, lines))]
    (folder / "val.json").write_text(json.dumps(rows))
    task = find_task("receipts", str(tmp_path))
    assert (task.name, task.protocol, len(task.source)) == ("receipts", "own", 2)
    found = questions_of(task)
    assert [(one.kind, *one.references) for one in found] == [(name, f"The {name}") for name in asked]
    assert scores(task, found[0], " The company ") == {"exact_match": 1, "anls": 1, "word_f1": 1}
    said = scores(task, found[0], "a company that the owner has not named")
    assert said == {"exact_match": 0, "anls": 0, "word_f1": pytest.approx(0.4)}
