"""Benchmarks' files with a value of another kind somewhere: one line, or a row that is counted, and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepstack_jax.data.encode.encoder import try_record
from deepstack_jax.data.encode.templates import get_template
from deepstack_jax.data.example import BadExample
from deepstack_jax.errors import UserError
from deepstack_jax.evaluate.benchmarks.registry import TASKS, find_task
from tests.unit.made_benchmarks import MADE

JUNK = [None, [], {}, 5, -1.5, True, "", "x\n\0", ["a", 3], {"a": [None]}, "9" * 5000, "\ud800"]
CHANGES = 20  # per task
NAMES = [name for name, form in MADE if form == "json"]


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands in a JSON value."""
    yield way
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*way, key))


def changed(value: Any, way: tuple[Any, ...], junk: Any) -> Any:
    if not way:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[way[0]] = changed(copy[way[0]], way[1:], junk)  # type: ignore[index,call-overload]
    return copy


def use(name: str, root: Path, said: list[str]) -> None:
    """Ask all that a task has; what is wrong is said: of the files, or of a row."""
    try:
        task = find_task(name, str(root))
    except UserError as error:
        said.append(str(error))
        return
    for row in range(len(task.source)):
        asked = try_record(task.source, row, lambda one: task.questions(one, one.images, get_template("v1")), lost=True)
        said += [asked.reason] if isinstance(asked, BadExample) else []
        for question in asked if isinstance(asked, list) else ():
            for answer in ("", "A", "yes it is 7"):
                parsed = task.parse(question, answer)
                assert all(0 <= scorer.score(parsed, question.references) <= 1 for scorer in task.scorers.values())


@pytest.mark.parametrize("name", NAMES)
def test_junk_in_a_file(name, tmp_path):
    folder = tmp_path / TASKS[name].folder
    MADE[name, "json"](folder)
    draw = random.Random(name)
    files = [file for file in sorted(folder.rglob("*.json")) if file.suffix == ".json"]
    said: list[str] = []
    for _ in range(CHANGES):
        file = draw.choice(files)
        before = file.read_text()
        lines = name == "pope"
        held = [json.loads(line) for line in before.splitlines()] if lines else json.loads(before)
        new = changed(held, draw.choice(list(places(held))), draw.choice(JUNK))
        file.write_text("\n".join(map(json.dumps, new)) if lines and isinstance(new, list) else json.dumps(new))
        use(name, tmp_path, said)
        file.write_text(before)
    assert said
    assert not [line for line in said if "\n" in line]
