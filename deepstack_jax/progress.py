"""How far long work is: a bar on a terminal, lines elsewhere."""

import time
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from deepstack_jax.printing import Console


class Progress:
    """Progress through `total` things; use it as a context manager.

    Args:
      noun: what is counted, as "step".
      total: how many there are, those done before it begins (`first`) included.
      lines: off a terminal, about how many lines to print in all; 0 prints one at every call of `show`.
      text: shown beside the bar at the start.
    """

    def __init__(self, noun: str, total: int, console: Console, *, first: int = 0, lines: int = 0, text: str = "") -> None:
        self._noun, self._total, self._console, self._lines, self._first = noun, total, console, lines, first
        columns = (TextColumn(noun), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = RichProgress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(text, total=total, completed=first)
        self._printed = first * lines // max(1, total)
        self._began = time.monotonic()
        self._each: float | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int, text: str = "", seconds_each: float | None = None) -> None:
        """Say that `done` are done.

        Args:
          seconds_each: for the time left off a terminal; None = the last that was given. With `lines` it is measured.
        """
        self._each = self._each if seconds_each is None else seconds_each
        self._bar.update(self._task, completed=done, description=text)
        if self._console.is_terminal:
            return
        if self._lines:
            if done * self._lines // self._total <= self._printed:
                return
            self._printed = done * self._lines // self._total
            self._each = (time.monotonic() - self._began) / max(1, done - self._first)
        left = "" if self._each is None else f"left {duration(self._each * (self._total - done))}"
        self._console.print(" ".join(filter(None, (f"{self._noun} {done}/{self._total}", text, left))), soft_wrap=True)


def duration(seconds: float) -> str:
    """As 42s, 3m 07s, 5h 12m."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02}m"
