"""A two-minute slice of the injection laboratory, from the command line: the ordering that is far outside of the noise."""

import json
import subprocess
import sys

import pytest

from benchmarks.study.results import read_runs
from tests.e2e.test_overfit import OPTIMIZED, TIMEOUT
from tests.e2e.verb import REPOSITORY


@pytest.mark.slow
def test_crops_in_the_stack_are_read_and_the_low_res_view_alone_is_not(tmp_path):
    results = tmp_path / "results.jsonl"
    line = [sys.executable, "-m", "benchmarks.study", "--size=slice", "--only=baseline,deepstack", "--seeds=1"]
    line += [f"--runs={tmp_path}", f"--results={results}"]
    done = subprocess.run(line, cwd=REPOSITORY, env=OPTIMIZED, timeout=TIMEOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {run.row: run for run in read_runs(results).values()}
    assert runs["deepstack"].scores["cued"] > runs["baseline"].scores["cued"] + 0.4, runs
    assert runs["baseline"].scores["cued"] < 0.2, runs
    assert runs["deepstack"].parameters == runs["baseline"].parameters
    assert runs["deepstack"].context == runs["baseline"].context
    assert (runs["deepstack"].visual, runs["baseline"].visual) == (45, 9)
    assert runs["deepstack"].flops > runs["baseline"].flops > 1e9
    # Asked again, nothing is trained.
    before = results.read_bytes()
    done = subprocess.run(line, cwd=REPOSITORY, env=OPTIMIZED, timeout=TIMEOUT, capture_output=True, text=True)
    assert "0 runs to do" in done.stdout
    assert results.read_bytes() == before
    assert len(json.loads(before.splitlines()[0])["curve"]) > 10
