"""Where the time of a run goes, over all its attempts, as lines of journal.jsonl: enough to tell later what was lost.

An attempt is one start of the program on a workdir. Times are written with every log line, so that a kill loses one interval.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax

from deepstack_jax.data.encode.batch_rows import HostBatch
from deepstack_jax.json_lines import Lines, read_lines

# What an attempt's time is spent on; "data" is when the devices have no batch, "step" what the loop does besides the others.
KINDS = ("init", "compile", "data", "step", "checkpoint", "evaluation")


class Journal:
    """Counts seconds by kind and appends them to `workdir/journal.jsonl`.

    Args:
      workdir: an existing folder; None counts and writes nothing, as on all hosts but the first.
      clock: seconds since some moment; all time is counted by it.
    """

    def __init__(self, workdir: Path | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._lines = Lines(None if workdir is None else workdir / "journal.jsonl")
        self._rest = "init"  # what time counts as that nothing else claims
        self._spent: dict[str, float] = defaultdict(float)
        self._since = clock()
        self._claimed = 0.0  # seconds since then that a kind has claimed

    def start(self, about: dict[str, Any]) -> None:
        """Record the beginning of an attempt."""
        self._append({"event": "start", **about})

    def begin_loop(self, step: int) -> None:
        """From here on time counts as "step"; what came before is written down with the step that the attempt goes on from."""
        self._settle_rest()
        self._rest = "step"
        self._append({"event": "resume", "step": step})

    @contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Count the time inside as `kind`."""
        began, claimed = self.clock(), self._claimed
        yield
        inside = self.clock() - began - (self._claimed - claimed)  # less what a kind within has taken
        self.count(kind, inside)

    def count(self, kind: str, seconds: float) -> None:
        """Count seconds that have just passed as `kind`."""
        self._spent[kind] += seconds
        self._claimed += seconds

    def flush(self, step: int) -> dict[str, float]:
        """Write the seconds by kind since the last time, and return them; `step` is the last step done."""
        self._settle_rest()
        spent = {kind: round(seconds, 6) for kind, seconds in self._spent.items()}
        self._append({"event": "time", "step": step, "seconds": spent})
        self._spent.clear()
        return spent

    def stop(self, step: int, why: str) -> None:
        """Record the end of an attempt that was not killed."""
        self.flush(step)
        self._append({"event": "stop", "step": step, "why": why})

    def _settle_rest(self) -> None:
        now = self.clock()
        self._spent[self._rest] += now - self._since - self._claimed
        self._since, self._claimed = now, 0.0

    def _append(self, record: dict[str, Any]) -> None:
        self._lines.append({"time": round(time.time(), 3), **record})


class DataWait(AbstractContextManager):
    """Takes batches, and counts as "data" the part of the wait in which no step was running.

    The loop is a step ahead of the devices: while it waits for a batch they may still be busy for all or a part of the wait.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._watch = ThreadPoolExecutor(1, thread_name_prefix="data-wait")

    def next(self, stream: Iterator[HostBatch], numbers: Any) -> HostBatch:
        """The next batch; `numbers` are those of the last step, on the device, None before the first."""
        began = self._journal.clock()
        idle = self._watch.submit(self._ready_at, numbers)
        delivered = next(stream)
        came = self._journal.clock()
        if idle.done():
            self._journal.count("data", max(0.0, came - max(began, idle.result())))
        return delivered

    def _ready_at(self, numbers: Any) -> float:
        jax.block_until_ready(numbers)
        return self._journal.clock()

    def __exit__(self, *_: object) -> None:
        self._watch.shutdown(wait=False)


def read_journal(workdir: Path) -> list[dict[str, Any]]:
    """All records of a run; a line that a kill or a full disk cut short, or that is none of ours, is left out."""
    return [record for record in read_lines(workdir / "journal.jsonl") if _is_record(record)]


def _is_record(record: dict[str, Any]) -> bool:
    seconds = record.get("seconds", {})
    return (
        isinstance(record.get("event"), str)
        and isinstance(record.get("time"), int | float)
        and isinstance(record.get("step", 0 if record["event"] == "start" else None), int)
        and isinstance(seconds, dict)
        and all(kind in KINDS and isinstance(spent, int | float) for kind, spent in seconds.items())
        and (record["event"] != "time" or "seconds" in record)
    )
