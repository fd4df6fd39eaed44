"""The live line of a run: where it is, how it goes, when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows one line that moves on a terminal, and one line per log interval elsewhere. Measures between log intervals.

    The first interval holds the compilation, so it yields no rate.
    """

    def __init__(self, start: int, steps: int, console: Console) -> None:
        self._console, self._steps = console, steps
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = RichProgress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("compiling", total=steps, completed=start)
        self._since: tuple[int, float] | None = None
        self._waited = 0.0
        self._per_step: float | None = None  # the last rate known, for the time left

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def rates(self, step: int, batch_size: int) -> dict[str, float]:
        """Seconds per step, examples per second and the share of time spent waiting for data, since the last call."""
        now = time.perf_counter()
        since, waited = self._since, self._waited
        self._since, self._waited = (step, now), 0.0
        if since is None:
            return {}
        per_step = self._per_step = (now - since[1]) / (step - since[0])
        return {
            "seconds_per_step": per_step,
            "examples_per_second": batch_size / per_step,
            "data_wait": waited / (now - since[1]),
        }

    def forget(self) -> None:
        """Start measuring anew, after work that is not a step."""
        self._since = None

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Bring the line up to date with the latest numbers."""
        line = f"loss {values['loss']:.4f} acc {values['token_accuracy']:.3f} grad {values['grad_norm']:.2f}"
        if "examples_per_second" in values:
            line += f" {values['examples_per_second']:.1f} ex/s data wait {values['data_wait']:.1%}"
        self._bar.update(self._task, completed=step, description=line)
        if not self._console.is_terminal:
            left = "" if self._per_step is None else f" left {self._per_step * (self._steps - step):.0f}s"
            self._console.print(f"step {step}/{self._steps} {line}{left}", soft_wrap=True)
