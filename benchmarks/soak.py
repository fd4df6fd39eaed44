"""Whether the input pipeline keeps its memory: resident memory of the run and of every worker over many samples.

  python -m benchmarks.soak --data=DIR
  python -m benchmarks.soak --data=DIR --samples=20000 --workers=4 --packed

  --data=DIR    a folder with train.json in LLaVA JSON and its images, read with configs/receipts.py
  --samples=N   examples to read, epoch after epoch; 20000 unless given
  --workers=N   worker processes; 4 unless given
  --packed      several examples per row

Prints one line per tenth of the way and ends with 1 where memory after the first tenth grew by more than 10%. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from configs import receipts
from deepstack_jax.config import build_config
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.printing import Console

GROWTH = 0.10
MB = 1024  # /proc counts in kB


class Memory(NamedTuple):
    """Of a process, in MB."""

    resident: float
    own: float  # without what it shares with others: code, and batches on their way


def memory(process: int) -> Memory:
    """What /proc knows of a process."""
    lines = (line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
    kilobytes = {name: int(number) for name, number, *_ in lines}
    return Memory(kilobytes["Rss:"] / MB, (kilobytes["Private_Clean:"] + kilobytes["Private_Dirty:"]) / MB)


def workers_of(process: int) -> list[int]:
    """Processes that a process has started, but for Python's own helper that watches over shared memory."""
    threads = Path(f"/proc/{process}/task").iterdir()
    children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    return [child for child in children if "resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--packed", action="store_true")
    given = parser.parse_args()

    changes = receipts.get_config()
    changes.update_from_flattened_dict(
        {"data.root": given.data, "data.workers": given.workers, "data.packing.enabled": given.packed, "train.batch_size": 16}
    )
    if given.packed:
        changes.update_from_flattened_dict({"data.max_length": 2048})
    config = build_config(changes)
    stream = TrainingStream(open_source(config.data, "train"), config.data_spec)
    console, own = Console(width=110), os.getpid()
    if table := stream.describe():
        console.print(table)

    rows: list[tuple[int, float, Memory, list[Memory]]] = []
    samples, start = 0, time.monotonic()
    while samples < given.samples:
        samples += next(stream).examples
        if samples >= (len(rows) + 1) * given.samples / 10:
            measured = [memory(worker) for worker in workers_of(own)]
            rows.append((samples, samples / (time.monotonic() - start), memory(own), measured))
            console.print(f"{samples} samples, {rows[-1][1]:.0f}/s, {sum(m.own for m in [rows[-1][2], *measured]):.0f} MB")
    stream.close()

    table = Table("samples", "per second", "run, MB", "workers, MB each", "all, own pages, MB", title="Resident memory")
    for samples, speed, ours, theirs in rows:
        each = " ".join(f"{worker.resident:.0f}" for worker in theirs)
        total = sum(process.own for process in [ours, *theirs])
        table.add_row(str(samples), f"{speed:.0f}", f"{ours.resident:.0f}", each, f"{total:.0f}")
    console.print(table)
    first, last = (sum(process.own for process in [rows[at][2], *rows[at][3]]) for at in (0, -1))
    console.print(f"growth after the first tenth: {last / first - 1:+.1%}, allowed {GROWTH:+.0%}")
    return int(last > (1 + GROWTH) * first)


if __name__ == "__main__":
    sys.exit(main())
