"""A run that an earlier version began, killed after its fourth of eight steps, its third without a finite loss."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deepstack_jax as dsx
from tests.e2e.verb import REPOSITORY, read_json, read_lines, train, verb

ARCHIVE = REPOSITORY / "tests" / "golden" / "workdir" / "0.1.0-64acf10.tar.gz"
# The flags that it was begun with.
FLAGS = {
    "train.steps": 8,
    "train.batch_size": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "train.keep": 1,
    "data.synthetic.questions": 4,
    "data.max_length": 24,
    "evaluation.examples": 2,
    "evaluation.batch_size": 8,
    "vision.width": 16,
    "vision.layers": 2,
    "vision.heads": 2,
    "vision.mlp": 16,
    "decoder.width": 16,
    "decoder.layers": 3,
    "decoder.heads": 2,
    "decoder.kv_heads": 2,
    "decoder.head_dim": 8,
    "decoder.mlp": 16,
}
# What the version that began it computed where nothing stopped it.
LOSSES = {5: 3.8881120681762695, 6: 3.7831029891967773, 7: 3.821338653564453, 8: 3.716003656387329}
HELD_OUT, EXACT = 3.6662843227386475, 0.25


@pytest.fixture
def workdir(tmp_path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_it_goes_on(workdir):
    """By its checkpoint's checksums as they were made then, and to the numbers that it would have reached then."""
    done = train("configs/demo.py", workdir, FLAGS)
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stdout + done.stderr
    lines = {line["step"]: line for line in read_lines(workdir / "metrics.jsonl") if "loss" in line}
    np.testing.assert_allclose([lines[step]["loss"] for step in LOSSES], list(LOSSES.values()), rtol=1e-5)
    assert lines[8]["bad_steps"] == 1
    results = read_json(workdir / "results.json")
    assert results["validation_loss"] == pytest.approx(HELD_OUT, rel=1e-5)
    assert (results["scores"]["exact_match"]["score"], results["steps"], results["visual_tokens"]) == (EXACT, 8, 80)


def test_it_is_loaded_and_exported(workdir, tmp_path):
    lmm = dsx.load(workdir)
    page = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    logits = lmm.logits([[1, -200, 5]], [[Image.fromarray(page)]])
    assert logits.shape == (1, 18, 49)
    dsx.save_hf(lmm, tmp_path / "out")
    np.testing.assert_array_equal(dsx.load(tmp_path / "out").logits([[1, -200, 5]], [[Image.fromarray(page)]]), logits)


@pytest.mark.slow
def test_it_is_converted_evaluated_and_replayed(workdir, tmp_path):
    replayed = verb("train", f"--replay={workdir / 'replay' / 'step-3.json'}")
    assert replayed.returncode == 0, replayed.stderr
    assert "walked to from step 2" in replayed.stdout
    converted = verb("convert", f"--from={workdir}", f"--to={tmp_path / 'out'}")
    assert converted.returncode == 0, converted.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    changed = "--config.evaluation.examples=1"
    evaluated = verb("evaluate", f"--model={workdir}", changed, f"--out={tmp_path / 'eval'}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert read_json(tmp_path / "eval" / "results.json")["rows"] == 1
