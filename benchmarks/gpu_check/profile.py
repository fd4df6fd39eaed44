"""Where the time of a step goes: a trace of a few steps, summed up by kernel, so that no large file is left."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.step import measure, with_fewer

STEPS = 3
WAITS = "ThunkExecutor"  # of XLA on a CPU, around what it waits for
SHOWN = 25  # kernels that take most
# What a kernel of cuBLAS, cuDNN, Triton or XLA is by its name; the first that is found counts.
KINDS = {
    "attention": r"fmha|attention|flash|sdpa|mosaic",
    "matrix products": r"gemm|xmma|cutlass|cublas|nvjet|wgmma|dot|matmul|conv(?!ert)",
    "copies": r"memcpy|memset|copy|transpose",
    "collectives": r"nccl|all_reduce|all_gather|reduce_scatter",
    "reductions": r"reduce|softmax|norm",
    "elementwise": r"fusion|loop|input|select|convert|add|multiply|wrapped",
}


def run(record: Record) -> None:
    """The step of stage `step`, a few times under the profiler."""

    def traced(step: Callable[[], Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(STEPS):
                    step()
            summarise(record, Path(folder))

    with_fewer(record, lambda record, config: measure(record, "step", config, then=traced))


def summarise(record: Record, folder: Path) -> None:
    """Milliseconds a step by kind of kernel, and of the kernels that take most."""
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for file in folder.rglob("*.xplane.pb"):
        for name, duration in _kernels(jax.profiler.ProfileData.from_file(str(file))):
            spent[name][0] += duration / 1e6 / STEPS
            spent[name][1] += 1
    kinds: dict[str, float] = defaultdict(float)
    for name, (milliseconds, _) in spent.items():
        kinds[kind_of(name)] += milliseconds
    total = sum(kinds.values())
    record.add("by kind, ms a step", dict(sorted(kinds.items(), key=lambda item: -item[1])) | {"all": total})
    top = sorted(spent.items(), key=lambda item: -item[1][0])[:SHOWN]
    for number, (name, (milliseconds, times)) in enumerate(top, 1):
        record.add(f"kernel {number}", {"ms a step": milliseconds, "times": times / STEPS, "name": name[:160]})


def _kernels(data: Any) -> Iterator[tuple[str, float]]:
    """(name, nanoseconds) of what ran on the device: the streams of a GPU, or XLA's threads on a CPU."""
    planes = list(data.planes)
    on_device = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in on_device or planes:
        for line in plane.lines:
            if line.name.startswith("Stream") if on_device else "XLA" in line.name or "tf_" in line.name:
                yield from ((event.name, event.duration_ns) for event in line.events if not event.name.startswith(WAITS))


def kind_of(name: str) -> str:
    """The kind of a kernel, "other" where its name says nothing."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")
