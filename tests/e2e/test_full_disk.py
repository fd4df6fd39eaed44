"""A disk that fills up ends no training: what cannot be written is said, once for each file, and the next save tries again."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from deepstack_jax.config import build_config
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from tests.e2e.receipts import draw_receipts
from tests.e2e.verb import ENVIRONMENT, REPOSITORY, TIMEOUT, read_lines

STEPS, FULL = 6, 3  # by then all is compiled: a full disk would leave half an entry in the compilation cache
SIZES = {
    "data.max_length": 400,
    "image.size": 32,
    "vision.width": 32,
    "vision.layers": 2,
    "vision.mlp": 32,
    "decoder.width": 32,
    "decoder.head_dim": 16,
    "decoder.mlp": 32,
    "train.steps": STEPS,
    "train.batch_size": 2,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "evaluation.every": 2,
    "evaluation.examples": 1,
    "evaluation.batch_size": 1,
    "evaluation.max_new_tokens": 2,
    "data.max_bad_fraction": 0.5,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Receipts of which the first in the batch of step FULL cannot be decoded."""
    root = draw_receipts(tmp_path_factory.mktemp("receipts"), train=6, validation=1)
    config = runpy.run_path(str(REPOSITORY / "configs" / "receipts.py"))["get_config"]()
    config.update_from_flattened_dict({"data.root": str(root), **SIZES})
    run = build_config(config)
    bad = TrainingStream(open_source(run.data, "train"), run.data_spec).examples(FULL - 1)[0]
    (root / "images" / f"train{bad}.jpg").write_bytes(b"no picture")
    return root


def train_with_room_from(step: int, data: Path, workdir: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "tests.e2e.full_disk", str(FULL), str(step), "--config=configs/receipts.py"]
    words += [f"--workdir={workdir}", f"--config.data.root={data}", *(f"--config.{key}={SIZES[key]}" for key in SIZES)]
    return subprocess.run(words, cwd=REPOSITORY, env=ENVIRONMENT, timeout=TIMEOUT, capture_output=True, text=True)


def test_a_run_trains_through_a_full_disk_and_ends_well_where_there_is_room_again(data, tmp_path):
    run = tmp_path / "run"
    done = train_with_room_from(STEPS, data, run)
    assert done.returncode == 0, done.stderr
    for file in ("journal.jsonl", "metrics.jsonl", "tensorboard", "quarantine.jsonl", f"replay/step-{FULL + 1}.json"):
        assert done.stderr.count(f"cannot write to {run / file}: ") == 1, (file, done.stderr)
    assert f"checkpoint {FULL + 1} could not be written" in done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("WARNING: ")] == []
    assert [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] == [1, 2, STEPS]
    assert (run / "checkpoints" / str(STEPS)).is_dir()
    assert (run / "results.json").is_file()


@pytest.mark.slow
def test_a_run_whose_last_state_finds_no_room_says_so_in_one_line(data, tmp_path):
    run = tmp_path / "run"
    done = train_with_room_from(STEPS + 1, data, run)
    assert done.returncode == 1, done.stderr
    assert f"step {STEPS}/{STEPS} " in done.stdout
    *warned, last = done.stderr.splitlines()
    assert [line for line in warned if not line.startswith("WARNING: ")] == []
    assert last.startswith(f"error: the state of step {STEPS} could not be saved in {run / 'checkpoints'}")
    assert "make room and run the same command again, it goes on from there" in last
