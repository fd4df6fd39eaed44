"""A step without a finite number: skipped, counted, kept for a replay that walks to it; too many in a row end the run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from deepstack_jax.config import build_config
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from tests.e2e.verb import REPOSITORY, Done, module, read_json, read_lines

STEPS, BAD = 6, 5
DEMO = {
    "train.steps": STEPS,
    "train.batch_size": 4,
    "train.log_every": 3,
    "train.checkpoint_every": 2,
    "train.keep": 1,
    "data.synthetic.questions": 4,
    "data.max_length": 24,
    "evaluation.examples": 2,
    "evaluation.batch_size": 8,
}


@pytest.fixture(scope="module")
def examples() -> list[list[int]]:
    """The examples of every step."""
    config = runpy.run_path(str(REPOSITORY / "configs" / "demo.py"))["get_config"]()
    config.update_from_flattened_dict(DEMO)
    run = build_config(config)
    stream = TrainingStream(open_source(run.data, "train"), run.data_spec)
    return [stream.examples(number) for number in range(STEPS)]


def poisoned(which: list[int], *flags: str) -> Done:
    return module("tests.e2e.poisoned", ",".join(map(str, which)), *flags)


def flags(workdir: Path, **changes: int) -> list[str]:
    values = DEMO | {key.replace("__", "."): value for key, value in changes.items()}
    return ["--config=configs/demo.py", f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in values.items())]


def test_a_bad_step_is_skipped_kept_and_replayed(examples, tmp_path):
    workdir = tmp_path / "poisoned"
    done = poisoned([examples[BAD - 1][0]], *flags(workdir))
    assert done.returncode == 0, done.stderr
    assert f"step {BAD}: loss nan, gradient norm nan: skipped, nothing was updated" in done.stdout
    assert [line["bad_steps"] for line in read_lines(workdir / "metrics.jsonl") if "loss" in line] == [0, 1]
    bundle = read_json(workdir / "replay" / f"step-{BAD}.json")
    assert bundle["examples"] == examples[BAD - 1]
    assert bundle["checkpoint"] == BAD - 1
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == [str(BAD - 1), str(STEPS)]

    writing = workdir / "checkpoints" / f"{STEPS + 1}.orbax-checkpoint-tmp"  # as another process does
    writing.mkdir()
    again = poisoned([examples[BAD - 1][0]], f"--replay={workdir}/replay/step-{BAD}.json")
    assert again.returncode == 0, again.stderr
    assert writing.exists(), "a replay leaves a run that goes on alone"
    assert f"walked to from step {BAD - 1}" in again.stdout
    assert f"row 0: loss nan; records of the source: {examples[BAD - 1][0]}\n" in again.stdout
    assert "row 1" not in again.stdout
    assert re.search(r"gradients that are not finite, of \d+: embed/embedding, .* and \d+ more\n", again.stdout)
    assert "parameters that are not finite" not in again.stdout

    other = poisoned([-1], f"--replay={workdir}/replay/step-{BAD + 1}.json")
    assert other.returncode == 1
    assert other.stderr.startswith("error: --replay=")
    assert f"step-{BAD}.json" in other.stderr


def test_too_many_bad_steps_in_a_row_end_the_run(examples, tmp_path):
    workdir = tmp_path / "hopeless"
    done = poisoned([step[0] for step in examples[2:]], *flags(workdir, train__max_bad_steps=3, train__log_every=1))
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    expected = ("the last 3 steps up to 5 ", "config.train.max_bad_steps=3", "--replay=")
    assert [part for part in expected if part not in done.stderr] == []
    assert sorted(path.name for path in (workdir / "replay").iterdir()) == [f"step-{step}.json" for step in (3, 4, 5)]
    assert "state of step 5 saved" in done.stdout
