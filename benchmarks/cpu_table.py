"""Steps and decoding on this CPU beside PyTorch's, into docs/performance.md: `python -m benchmarks.cpu_table`.

Minutes on two cores. Without torch the peer's columns would stay empty, so nothing is written then.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import version
from pathlib import Path

from benchmarks import decode, train_step
from benchmarks.input_pipeline import processor_name
from benchmarks.plan_table import write_section

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PACKAGES = ("jax", "torch", "transformers", "numpy")


def main() -> None:
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("torch is not installed, and its columns would stay empty; install it, e.g. pip install torch")
    speed, before = decode.bandwidth(), os.getloadavg()[0]
    lines = [
        f"{os.cpu_count()} cores of {processor_name()} ({platform.machine()}), Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        + f'; load average {before:.1f} at first, all float32. The two take turns; "of the least" is the',
        "ratio of the fastest turns, which other work on the machine disturbs least.",
        "",
        f"A training step of a DeepStack-L, medians of {train_step.STEPS} (`benchmarks/train_step.py`):",
        "",
    ]
    for line in train_step.table():
        lines.append(line)
        print(line, flush=True)
    lines += [
        "",
        f"Greedy decoding at batch 1, prompt {decode.PROMPT}, {decode.NEW} tokens, medians of {decode.REPEATS}; the floor is",
        f"reading the parameters once at {speed / 1e9:.1f} GB/s (`benchmarks/decode.py`):",
        "",
    ]
    for line in decode.table(speed):
        lines.append(line)
        print(line, flush=True)
    write_section("cpu", "\n".join(lines), PAGE)


if __name__ == "__main__":
    main()
