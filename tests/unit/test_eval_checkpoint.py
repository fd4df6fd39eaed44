"""An evaluation that was stopped goes on: nothing answered twice, nothing left out, whatever the batch it was stopped in."""

import dataclasses
import io
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from deepstack_jax.config import Config, DataConfig
from deepstack_jax.data.example import SourceError
from deepstack_jax.evaluate import runner
from deepstack_jax.evaluate.ask import Refusal
from deepstack_jax.evaluate.checkpoint import EvalCheckpoint
from deepstack_jax.evaluate.on_mesh import Measured
from deepstack_jax.evaluate.runner import EvaluationRequest, ask_all, checkpoint_digest, key_of, prepare_part
from deepstack_jax.evaluate.tasks import Task
from deepstack_jax.generate.options import Options
from deepstack_jax.json_lines import read_lines
from deepstack_jax.parallel.distributed import ProcessSlice
from deepstack_jax.printing import Console
from deepstack_jax.progress import Progress
from tests.unit.test_held_out import Echo, Rows, row
from tests.unit.tiny import tiny_config

# Of several turns, unreadable (1, 6), refused (3, and the second turn of 4): ten questions that can be answered.
ROWS = [
    row(0, "A?", "a", "And?", "b", "More?", "c"),
    None,
    row(2, "C?", "c"),
    row(3, "D" * 60, "d"),
    row(4, "E?", "e", "E" * 60, "f"),
    row(5, "G?", "g", "H?", "h"),
    None,
    row(7, "I?", "i"),
    row(8, "J?", "j"),
    row(9, "K?", "k"),
]
KEY = {"model": "a"}


class Stopping(Echo):
    """Stopped, as by Ctrl-C, before a call; its answers tell how many were asked with them."""

    def __init__(self, calls: int | None = None) -> None:
        super().__init__()
        self.left = calls

    def answer_batch(self, prompts: Any, options: Options, batch_size: int) -> list[Measured]:
        if self.left == 0 and prompts:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        said = super().answer_batch(prompts, options, 9)
        return [Measured(f"{text} of {len(prompts)}", tokens) for text, tokens, _ in said]


def evaluation_of(rows: list, allowed: float = 1.0) -> EvaluationRequest:
    source: Any = Rows(rows)
    config = Config(data=DataConfig(max_bad_fraction=allowed))
    return EvaluationRequest(Task(source), config, "data", {"files": {"val.json": "1 file, 5 bytes"}}, len(rows), Options(), 3)


def run(
    folder: Path, rows: list, calls: int | None = None, *, key: Any = None, allowed: float = 1.0
) -> tuple[Any, Stopping, str]:
    """One attempt: the lines of predictions.jsonl and how many could not be asked, or what ended it."""
    answerer, printed = Stopping(calls), io.StringIO()
    asked: Any = answerer
    console = Console(file=printed, width=200)
    try:
        lines, bad = ask_all(asked, evaluation_of(rows, allowed), EvalCheckpoint(folder, key), console)
        return ([json.dumps(asdict(line)) for line in lines], len(bad)), answerer, printed.getvalue()
    except (KeyboardInterrupt, SourceError) as error:
        return error, answerer, printed.getvalue()


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("calls", range(1, 9))
def test_stopped_anywhere_it_ends_like_one_that_was_not(calls, torn, tmp_path):
    (tmp_path / "alone").mkdir()
    alone, _, _ = run(tmp_path / "alone", ROWS)
    assert (len(alone[0]), alone[1]) == (10, 4)
    run(tmp_path, ROWS, calls)
    for file in tmp_path.glob("*.unfinished") if torn else ():
        file.write_bytes(file.read_bytes()[:-5])
    assert run(tmp_path, ROWS)[0] == alone


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_another_number_of_processes_goes_on(before, after, tmp_path, monkeypatch):
    """A batch of three questions is prepared in one part, two or three, which together are the batch."""

    def in_parts(answerer: Any, evaluation: EvaluationRequest, batch: Any, part: ProcessSlice, remarks: Any) -> list:
        parts = [ProcessSlice(index, part.count, is_leader=True) for index in range(part.count)]
        return [one for each in parts for one in prepare_part(answerer, evaluation, batch, each, remarks)]

    monkeypatch.setattr(runner, "prepare_part", in_parts)
    monkeypatch.setattr(runner, "share_of_process", lambda evaluation, _part: evaluation.batch_size)

    def attempt(folder: Path, count: int, calls: int | None = None) -> list[str]:
        asked: Any = Stopping(calls)
        part, printed = ProcessSlice(0, count, is_leader=True), Console(file=io.StringIO())
        lines, _ = ask_all(asked, evaluation_of(ROWS), EvalCheckpoint(folder, KEY), printed, part)
        return [line.prediction.partition(" of ")[0] for line in lines]

    (tmp_path / "alone").mkdir()
    alone = attempt(tmp_path / "alone", 1)
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path, before, calls=3)
    kept = sum(len(line["batch"]) for line in read_lines(next(tmp_path.glob("*.unfinished"))))
    assert kept > 0
    assert attempt(tmp_path, after) == alone


def test_what_was_answered_is_not_asked_again(tmp_path):
    whole, answerer, _ = run(tmp_path, ROWS)
    assert answerer.asked
    again, answerer, printed = run(tmp_path, ROWS)
    assert (again, answerer.asked) == (whole, [])
    assert "goes on after 12 questions" in printed
    _, answerer, printed = run(tmp_path, ROWS, key={"model": "b"})
    assert answerer.asked, "answers of another model"
    assert "begins anew: " in printed
    assert "goes on after" in run(tmp_path, ROWS, key={"model": "b"})[2]


def test_rows_that_were_mended_meanwhile_are_asked_and_no_other_again(tmp_path):
    error, _, printed = run(tmp_path, ROWS, allowed=0.3)
    assert "4 of 10 rows cannot be asked" in str(error)
    assert printed.count("is left out") == 4
    mended = [ROWS[0], row(1, "B?", "b"), *ROWS[2:6], row(6, "H?", "h"), *ROWS[7:]]
    (lines, bad), answerer, _ = run(tmp_path, mended, allowed=0.3)
    places = [(line["row"], line["turn"]) for line in map(json.loads, lines)]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (4, 0), (5, 0), (5, 1), (6, 0), (7, 0), (8, 0), (9, 0)]
    assert bad == 2
    assert sum(answerer.asked) < len(places)


def test_nothing_answered_is_no_score(tmp_path):
    error, _, _ = run(tmp_path, [None, None])
    assert isinstance(error, SourceError)
    assert "none of the 2 rows could be asked" in str(error)


def test_off_a_terminal_a_line_now_and_then():
    printed = io.StringIO()
    with Progress("rows", 5000, Console(file=printed, width=200), first=1000, lines=50) as progress:
        for done in range(1001, 5001):
            progress.show(done)
    lines = printed.getvalue().splitlines()
    assert len(lines) == 40
    assert lines[0].startswith("rows 1100/5000 left ")
    assert lines[-1] == "rows 5000/5000 left 0s"


def test_without_a_folder_nothing_is_kept():
    kept = EvalCheckpoint(None, None)
    kept.add([Refusal(0, "x", "too long", 0)])
    kept.remove()
    assert kept.file is None


def test_what_answers_depend_on_tells_them_apart(tmp_path):
    def file_of(bits: int = 0, **changes: Any) -> Path | None:
        params = {"a": jnp.asarray([0, bits], jnp.float32)}
        model: Any = SimpleNamespace(params=params, config=tiny_config(), template="v1")
        evaluation = dataclasses.replace(evaluation_of([None] * 5), **changes)
        return EvalCheckpoint(tmp_path, key_of(model, checkpoint_digest(model), evaluation)).file

    others = [
        file_of(bits=1),
        file_of(origin={"files": {"val.json": "1 file, 6 bytes"}}),
        file_of(rows=4),
        file_of(options=Options(max_new_tokens=3)),
        file_of(batch_size=4),
    ]
    assert len({file_of(), *others}) == 6
    assert file_of() == file_of(data="the same by another name")
