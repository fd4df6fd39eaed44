"""A small model learns 16 real receipts by heart through the whole path, and then answers every question exactly."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.e2e.verb import ENVIRONMENT, REPOSITORY, read_json, read_lines

REAL = REPOSITORY.parent / "shared" / "data" / "receipts"
TIMEOUT = 3600  # seconds; about three minutes of CPU on a free machine
# Other than the tiny runs this one is worth optimizing.
OPTIMIZED = {name: value for name, value in ENVIRONMENT.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no receipts in {REAL}")
def test_sixteen_receipts_to_exact_answers(tmp_path):
    command = [sys.executable, "-m", "benchmarks.overfit_receipts", f"--data={REAL}", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=OPTIMIZED, timeout=TIMEOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_json(tmp_path / "evaluation" / "results.json")
    assert (results["rows"], results["questions"], results["bad_examples"]) == (16, 40, 0)
    assert results["scores"]["exact_match"]["score"] == results["scores"]["anls"]["score"] == 1.0
    said = {line["prediction"] for line in read_lines(tmp_path / "evaluation" / "predictions.jsonl")}
    assert len(said) > 30  # receipts differ, and so do the answers
    assert "40 of 40 answers of 16 rows exact" in done.stdout
    config = read_json(tmp_path / "stage2" / "config.json")
    assert config["data"]["packing"]["enabled"]
    assert config["train"]["weights"] == str(tmp_path / "stage1")
