"""Benchmarks within a run: opened before it begins, asked now and then and at its end, and one score that tells the best."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from deepstack_jax.config import Config
from deepstack_jax.data.example import SourceError
from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate import training_tasks
from deepstack_jax.evaluate.benchmarks.registry import TASKS, find_task
from deepstack_jax.evaluate.held_out import HeldOut
from deepstack_jax.evaluate.training_tasks import TrainingTasks, scores_of
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.printing import Console
from deepstack_jax.train.core.program import build_program
from tests.parity.goldens import GOLDEN
from tests.unit.made_benchmarks import MADE
from tests.unit.made_examples import MadeExamples
from tests.unit.tiny import model_params, tiny_config

SETTINGS = {
    "data.tokenizer": "bytes",
    "data.template": "direct",
    "decoder.vocab_size": 259,
    "decoder.max_positions": 512,
    "decoder.layers": 5,
    "evaluation.batch_size": 8,
    "evaluation.tasks": "pope",
    "evaluation.task_rows": 2,
    "evaluation.best": "pope/accuracy",
}


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("pope", "gqa"):
        MADE[name, "json"](tmp_path / "root" / TASKS[name].folder)
    return tmp_path / "root"


def opened(root: Path, workdir: Path, **changes: Any) -> tuple[TrainingTasks, Config, io.StringIO]:
    named = {f"evaluation.{name}": value for name, value in changes.items()}
    config, printed = tiny_config(SETTINGS | {"evaluation.tasks_root": str(root)} | named), io.StringIO()
    tasks = TrainingTasks(config, workdir, Console(file=printed, width=200))
    tasks.open(MadeExamples(4), starts=True)
    return tasks, config, printed


def test_a_few_rows_now_and_all_at_the_end_with_their_files(root, tmp_path):
    tasks, config, printed = opened(root, tmp_path)
    program = build_program(config, make_mesh(config.mesh, jax.devices()[:1]), 1)
    tasks.begin(program)
    params = model_params(program.model, program.sample, seed=3)
    accuracy = tasks.report(params, 7)["pope/accuracy"]
    assert f"step 7: pope/accuracy {accuracy:.4f}, " in printed.getvalue()
    assert "left out" not in printed.getvalue(), "the table is for the end"
    assert not (tmp_path / "tasks").exists()
    found = tasks.finish(params)
    assert "left out" in printed.getvalue()
    assert (found["pope"]["rows"], found["pope"]["questions"]) == (3, 3)
    assert scores_of(found)["pope/accuracy"] == found["pope"]["scores"]["accuracy"]["score"]
    assert json.loads((tmp_path / "tasks" / "pope" / "results.json").read_text())["scores"] == found["pope"]["scores"]
    assert {file.name for file in (tmp_path / "tasks" / "pope").iterdir()} == {"predictions.jsonl", "results.json"}
    assert "questions 3/3" in printed.getvalue()
    assert "questions 2/2" in printed.getvalue()


def test_answers_end_where_those_of_the_verb_do(root, tmp_path, monkeypatch):
    """By generation_config.json beside the tokenizer, too."""
    folder = Path(shutil.copytree(GOLDEN / "tokenizer" / "llama_legacy_false", tmp_path / "tokenizer"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    asked: list[tuple[int, ...]] = []

    def note(answerer: Any, *_: Any) -> None:
        asked.append(answerer.ends)
        raise SourceError("nothing more is wanted")

    monkeypatch.setattr(training_tasks, "evaluate_one", note)
    named = {"evaluation.tasks_root": str(root), "data.tokenizer": str(folder), "decoder.vocab_size": 32064}
    config = tiny_config(SETTINGS | named)
    tasks = TrainingTasks(config, tmp_path, Console(file=io.StringIO()))
    tasks.open(MadeExamples(4), starts=True)
    program = build_program(config, make_mesh(config.mesh, jax.devices()[:1]), 1)
    tasks.begin(program)
    tasks.report({}, 1)
    assert asked == [(2, 7)]
    rows: Any = MadeExamples(4)
    held_out = HeldOut(rows, config, program.loss, program.model, program.mesh)
    monkeypatch.setattr("deepstack_jax.evaluate.held_out.ask", lambda _task, answerer, *_: asked.append(answerer.ends) or [])
    held_out.predictions({}, 2)
    assert asked == [(2, 7)] * 2


MISTAKES = [
    ({"tasks": "pop"}, ConfigError, "pope"),
    ({"tasks": "pope,gqa,pope"}, ConfigError, "the tasks name pope twice"),
    ({"tasks": "docvqa", "best": ""}, SourceError, "docvqa"),
    ({"best": "pope/anls"}, ConfigError, "config.evaluation.best='pope/anls' is no score of the tasks"),
    ({"best": "gqa/exact_match"}, ConfigError, "is no score of the tasks"),
    ({"tasks": ""}, ConfigError, "set config.evaluation.tasks"),
]


@pytest.mark.parametrize(("changes", "kind", "said"), MISTAKES)
def test_a_mistake_ends_a_run_before_it_begins(changes, kind, said, root, tmp_path):
    with pytest.raises(kind, match=said):
        opened(root, tmp_path, **changes)


def test_too_many_rows_that_cannot_be_asked_end_it_and_name_the_folder(root, tmp_path):
    (root / TASKS["gqa"].folder / "images" / "n0.jpg").unlink()
    with pytest.raises(
        SourceError, match=rf"1 of 3 rows cannot be asked, .*n0.jpg.*; fix them \(in .*{TASKS['gqa'].folder}\), or"
    ):
        opened(root, tmp_path, tasks="gqa", best="")


def test_rows_that_are_trained_on_are_told(root, tmp_path):
    tasks = TrainingTasks(
        tiny_config(SETTINGS | {"evaluation.tasks_root": str(root)}), tmp_path, Console(file=(out := io.StringIO()), width=300)
    )
    tasks.open(find_task("pope", str(root)).source, starts=True)
    assert "warning: pope: 3 of 3 held-out rows are also among the training rows" in out.getvalue()
