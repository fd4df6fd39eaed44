"""How far an evaluation is: a bar on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from deepstack_jax.printing import Console
from deepstack_jax.train.run.progress import duration

_LINES = 50  # about so many in all: in a log, hours of work are to be seen and not to fill it


class Progress:
    """Rows of a data set, one behind the other.

    Args:
      first: rows that are done before it begins; the time left is judged by the others.
      rows: all of them.
    """

    def __init__(self, first: int, rows: int, console: Console) -> None:
        self._console, self._first, self._rows, self._shown = console, first, rows, first * _LINES // rows
        columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = RichProgress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=rows, completed=first)
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int) -> None:
        """Say that `done` rows are done."""
        self._bar.update(self._task, completed=done)
        if self._console.is_terminal or done * _LINES // self._rows <= self._shown:
            return
        self._shown = done * _LINES // self._rows
        per_row = (time.monotonic() - self._began) / max(1, done - self._first)
        self._console.print(f"rows {done}/{self._rows} left {duration(per_row * (self._rows - done))}")
