"""Attention kernels on this GPU: against plain float32 at the sizes of a 7B decoder, and the package's own tests of them."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_check.programs import build, config_of
from benchmarks.gpu_check.record import Record, target
from benchmarks.gpu_check.step import timed
from deepstack_jax.model.attention import AttentionFn, Everything, Segments, dot_product
from deepstack_jax.parallel.kernels import attention_for
from deepstack_jax.parallel.rules import use_mesh

REPOSITORY = Path(__file__).parents[2]
NEAR = 1e-3  # of the portable kernel in bfloat16 a kernel may be, in the mean of the output and of each gradient
REPEATS = 10


class Case(NamedTuple):
    """What is compared: sizes of q and k, and what a token sees."""

    name: str
    rows: int
    length: int
    heads: int
    kv_heads: int
    width: int
    segments: int = 1  # of a row; 0 = a picture, in which every token sees every other
    window: int = 0


def compare(record: Record) -> None:
    """The decoder's and the tower's: errors against float32, the distance from the portable kernel's, and times."""
    rows, length, heads, width = record.size.attention
    tower = Case("tower", *record.size.tower_attention, segments=0)
    cases = (
        Case("packed", rows, length, heads, heads, width, 3),
        Case("single", rows, length, heads, heads, width),
        tower,
        Case("packed, grouped heads", rows, length, heads, heads // 4, width, 3),
        Case("packed, window", rows, length, heads, heads, width, 3, length // 4),
    )
    program = build(config_of(record.size, {"decoder.layers": 6}))
    worst = 0.0
    for case in cases:
        kernel = program.kernels.decoder if case.segments else program.kernels.tower
        attend = attention_for(kernel, program.mesh, segments=case.segments + 1)
        given, mask = _inputs(case)
        with use_mesh(program.mesh):
            mine, seconds = _attended(attend, given, mask, "bfloat16")
            portable, portable_seconds = _attended(dot_product, given, mask, "bfloat16")
            exact, _ = _attended(dot_product, given, mask, "float32")
        apart = [_distance(*pair) for pair in zip(mine, portable, strict=True)]
        worst = max(worst, *apart)
        figures: dict[str, Any] = {"kernel": kernel, "from the portable kernel": apart}
        figures["mean errors"] = [_distance(*pair) for pair in zip(mine, exact, strict=True)]
        figures["the portable kernel's"] = [_distance(*pair) for pair in zip(portable, exact, strict=True)]
        times = {"s": float(np.median(seconds)), "the portable kernel's s": float(np.median(portable_seconds))}
        record.add(case.name, figures | times)
    record.add("goal: mean difference of a kernel from the portable one", target(worst, NEAR, at_most=True))


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


def _inputs(case: Case) -> tuple[list[np.ndarray], Segments | Everything]:
    """q, k, v, and the mask: segments of unlike lengths, and some padding."""
    rng = np.random.default_rng(0)
    shapes = [(case.rows, case.length, count, case.width) for count in (case.heads, case.kv_heads, case.kv_heads)]
    given = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    if not case.segments:
        return given, Everything(("crops", "vision_heads"))
    segments, positions = np.zeros((2, case.rows, case.length), np.int32)
    bounds = [case.length * tenths // 10 for tenths in ((0, 3, 5, 9) if case.segments > 1 else (0, 9))]
    for number, (first, last) in enumerate(itertools.pairwise(bounds), 1):
        segments[:, first:last] = number
        positions[:, first:last] = np.arange(last - first)
    return given, Segments(jnp.asarray(segments), jnp.asarray(positions), case.window)


def _attended(
    attend: AttentionFn, given: list[np.ndarray], mask: Segments | Everything, dtype: str
) -> tuple[list[np.ndarray], list[float]]:
    """([output at tokens, gradients of q, k, v] of a sum that weighs all outputs differently, seconds of some more runs)."""
    there = (mask.segment_ids > 0)[..., None, None] if isinstance(mask, Segments) else 1.0
    weights = jnp.asarray(np.random.default_rng(1).normal(size=given[0].shape), jnp.float32)

    def weighed(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        out = attend(q, k, v, mask).astype(jnp.float32) * there
        return (out * weights).sum(), out

    run = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))
    placed = [jnp.asarray(x, dtype) for x in given]
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        (_, out), gradients = run(*placed)
        seconds = timed(lambda: jax.block_until_ready(run(*placed)), REPEATS)
    return [np.asarray(x, np.float32) for x in (out, *gradients)], seconds


def tests(record: Record) -> None:
    """The package's tests of kernels, with the GPU in sight of those that ask for it."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/distributed/test_kernels.py"]
    chosen = "quick and not slow" if record.size.name == "tiny" else "not slow"
    done = subprocess.run(
        [*command, "-m", chosen], cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else "")
    }
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    record.add("pytest", {"code": done.returncode, **counts, "failures": failures[:20]})
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {' | '.join(failures[:3]) or done.stderr[-300:]}")
