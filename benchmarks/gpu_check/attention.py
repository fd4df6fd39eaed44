"""Attention kernels on this GPU: the comparison of `benchmarks.attention_check`, and the package's own tests of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

from benchmarks.attention_check import CASES, TINY, check
from benchmarks.gpu_check.record import Record, target

REPOSITORY = Path(__file__).parents[2]
ON_GPU = "test_cudnn_equals_xla"  # skipped where jax sees no GPU
FAR = 0.1  # in the mean, where values are of the order of one: such a kernel computes something else


def compare(record: Record) -> None:
    """Every case, those of a 7B decoder first: values, gradients and times beside the portable kernel's."""
    cases, equal = TINY if record.size.name == "tiny" else CASES, 0
    for number, case in enumerate(cases, 1):
        try:
            found = check(case)
        except Exception as error:  # of whatever kind: other cases may run, and the step takes other attention
            traceback.print_exc()
            found = {"equal": False, "refused": f"{type(error).__name__} {error}".splitlines()[0][:200]}
        if not all(apart <= FAR for apart in found.get("apart", [])):  # not a number either
            found["refused"] = "its results are other ones"
        equal += found["equal"]
        record.add(case.name, found)
        record.add("goal: share of kernels that are equal", target(equal / number, 1.0))


def tests(record: Record) -> None:
    """The package's tests of kernels that compute on the GPU; on a CPU, those that take no time."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/distributed/test_kernels.py"]
    chosen = ["-m", "quick and not slow"] if record.size.name == "tiny" else ["-k", ON_GPU]
    done = subprocess.run(
        [*command, *chosen], cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else "")
    }
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    record.add("pytest", {"code": done.returncode, **counts, "failures": failures[:20]})
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {' | '.join(failures[:3]) or done.stderr[-300:]}")
    if record.size.name == "full" and not counts.get("passed"):
        skipped = [line for line in lines if line.startswith("SKIPPED")]
        raise RuntimeError(f"no test ran on the GPU: {' | '.join(skipped[:3]) or lines[-1]}")
