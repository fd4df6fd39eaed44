"""The live line of a run: where it is, how it goes, when it ends."""

from __future__ import annotations

from collections.abc import Mapping

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from deepstack_jax.config import DataConfig
from deepstack_jax.printing import Console

# What the line shows of the numbers at hand, in this order.
_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("token_accuracy", "acc {:.3f}"),
    ("lr", "lr {:.2e}"),
    ("grad_norm", "grad {:.2f}"),
    ("examples_per_second", "{:.1f} ex/s"),
    ("supervised_tokens_per_second", "{:.0f} tok/s"),
    ("tflops_per_device", "{:.3g} TFLOP/s"),
    ("mfu", "MFU {:.1%}"),
    ("data_wait", "data wait {:.1%}"),
    ("padding", "padding {:.1%}"),
)
PADDING_HINTED = 0.7  # above it a run is told of packing and buckets


class Progress:
    """Shows one line that moves on a terminal, and one line per log interval elsewhere."""

    def __init__(self, start: int, steps: int, console: Console) -> None:
        self._console, self._steps = console, steps
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = RichProgress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("compiling", total=steps, completed=start)
        self._per_step: float | None = None  # the last rate known, for the time left

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Bring the line up to date with the latest numbers."""
        line = " ".join(text.format(values[name]) for name, text in _SHOWN if name in values)
        if values["bad_steps"]:
            line += f" skipped {values['bad_steps']:.0f}"
        self._per_step = values.get("seconds_per_step", self._per_step)
        self._bar.update(self._task, completed=step, description=line)
        if not self._console.is_terminal:
            left = "" if self._per_step is None else f" left {duration(self._per_step * (self._steps - step))}"
            self._console.print(f"step {step}/{self._steps} {line}{left}", soft_wrap=True)


def padding_hint(padding: float, length: float, data: DataConfig) -> str:
    """What to do about rows that hold little, with the numbers; "" where they are full enough, or packed already.

    Args:
      padding: share of positions that hold nothing, 0..1.
      length: positions of a row.
    """
    if padding <= PADDING_HINTED or data.packing.enabled:
        return ""
    used = round((1 - padding) * length)
    buckets = tuple(2**power for power in range(5, 31) if 1.25 * used < 2**power < length)
    shorter = f', or pad to shorter lengths with --config.data.buckets="{buckets}"' if buckets else ""
    unset = ' --config.data.buckets="()"' if data.buckets else ""
    return (
        f"{padding:.0%} of the positions are padding, an example has {used:,} of the {length:,.0f} of its row: pack about "
        f"{length / max(1, used):.0f} into each with --config.data.packing.enabled=True{unset}{shorter}, in a new --workdir"
    )


def duration(seconds: float) -> str:
    """As 42s, 3m 07s, 5h 12m."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02}m"
