"""Where the time of a run went and how its numbers developed, from what it left in its workdir alone."""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from deepstack_jax.atomic import whole_file
from deepstack_jax.errors import UserError
from deepstack_jax.printing import Console, plural
from deepstack_jax.train.account.journal import KINDS, read_journal
from deepstack_jax.train.run.metrics import read_metrics

LOST = "lost work"
LABELS = {
    "init": "starting: imports, data, weights",
    "compile": "compiling",
    "data": "waiting for data",
    "step": "training",
    "checkpoint": "waiting for checkpoints",
    "evaluation": "evaluating",
    LOST: "steps done again after a kill",
}
# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = dict(zip(LABELS, ("#56B4E9", "#E69F00", "#F0E442", "#009E73", "#0072B2", "#CC79A7", "#D55E00"), strict=True))
# Panels of the curves: title, names of the numbers, whether the axis is logarithmic.
PANELS = (
    ("loss", ("loss", "validation_loss"), False),
    ("learning rate", ("lr",), False),
    ("gradient norm", ("grad_norm",), True),
    ("examples per second", ("examples_per_second",), False),
    ("waiting for data, padding", ("data_wait", "padding"), False),
    ("token accuracy", ("token_accuracy", "validation_token_accuracy"), False),
)


class ReportError(UserError):
    """A workdir that tells nothing."""


class TimeSpent(NamedTuple):
    """The time of a run."""

    seconds: dict[str, float]  # by kind, lost work among them
    attempts: int  # starts of the program
    idle: float  # seconds between attempts, in which nothing ran
    steps: int  # steps that counted

    @property
    def goodput(self) -> float:
        """Share of the time that went into steps that counted."""
        total = sum(self.seconds.values())
        return self.seconds["step"] / total if total else 0.0


class _Interval(NamedTuple):
    first: int  # the step before it
    last: int
    seconds: dict[str, float]


def add_up(records: list[dict[str, Any]]) -> TimeSpent:
    """Add up a journal. Steps beyond the one that a later attempt resumed from were done again: their time is lost."""
    intervals: list[_Interval] = []
    seconds: dict[str, float] = dict.fromkeys((*KINDS, LOST), 0.0)
    attempts, idle, place, seen = 0, 0.0, 0, None
    for record in records:
        match record["event"]:
            case "start":
                attempts += 1
                idle += record["time"] - seen if seen else 0.0
            case "resume":
                place = record["step"]
                intervals, lost = _cut(intervals, place)
                seconds[LOST] += lost
            case "time":
                intervals.append(_Interval(place, record["step"], record["seconds"]))
                place = record["step"]
        seen = record["time"]
    for interval in intervals:
        for kind, spent in interval.seconds.items():
            seconds[kind] += spent
    return TimeSpent(seconds, attempts, idle, place)


def _cut(intervals: list[_Interval], step: int) -> tuple[list[_Interval], float]:
    """Take out of the intervals what lies beyond a step; returns what stays, and the seconds of steps taken out."""
    kept, lost = [], 0.0
    for first, last, seconds in intervals:
        share = min(1.0, max(0.0, (last - step) / (last - first))) if last > first else 0.0
        again = {kind: share * seconds.get(kind, 0.0) for kind in ("step", "data")}
        lost += sum(again.values())
        kept.append(_Interval(first, min(last, max(step, first)), {k: v - again.get(k, 0.0) for k, v in seconds.items()}))
    return kept, lost


def report(workdir: Path, console: Console) -> TimeSpent:
    """Print the account of a run and write `workdir/report/{time,curves}.png`.

    Raises:
      ReportError: the workdir holds no run.
    """
    try:
        spent, metrics = add_up(read_journal(workdir)), read_metrics(workdir)
    except OSError as error:
        raise ReportError(f"--report={workdir} holds no run ({error}); name the --workdir of one") from error
    console.print(
        f"{workdir}: {spent.steps} steps, {plural(spent.attempts, 'attempt')}, goodput {spent.goodput:.1%}", soft_wrap=True
    )
    console.print(time_table(spent))
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    for name, figure in (("time.png", draw_time(spent)), ("curves.png", draw_curves(metrics))):
        with whole_file(folder / name) as file:
            figure.savefig(file, dpi=120)
    console.print(f"written to {folder}: time.png, curves.png", soft_wrap=True)
    return spent


def time_table(spent: TimeSpent) -> Table:
    """Seconds and shares by kind."""
    total = sum(spent.seconds.values())
    table = Table("time", "seconds", "share")
    for kind, label in LABELS.items():
        seconds = spent.seconds[kind]
        table.add_row(label, f"{seconds:,.1f}", f"{seconds / total:.1%}" if total else "-")
    table.add_row("all of it", f"{total:,.1f}", "")
    table.add_row("between attempts", f"{spent.idle:,.1f}", "")
    return table


def draw_time(spent: TimeSpent) -> Figure:
    """One bar: where the time went."""
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for kind, label in LABELS.items():
        seconds = spent.seconds[kind]
        axes.barh(0, seconds, left=left, color=COLOURS[kind], label=f"{label}: {seconds:,.1f} s")
        left += seconds
    axes.set(yticks=[], xlabel="seconds", title=f"goodput {spent.goodput:.1%} over {plural(spent.attempts, 'attempt')}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def draw_curves(metrics: list[dict[str, Any]]) -> Figure:
    """The numbers of a run over its steps, a panel for each kind that there is."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in metrics:
        for name, value in record.items():
            if isinstance(value, int | float) and value == value:  # not a NaN
                series[name].append((record["step"], value))
    panels = [panel for panel in PANELS if any(name in series for name in panel[1])]
    figure = Figure(figsize=(11, 2.6 * -(-len(panels) // 2) + 0.4), layout="constrained")
    cells = figure.subplots(-(-max(1, len(panels)) // 2), 2, squeeze=False).ravel()
    for axes in cells[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, names, logarithmic) in zip(cells, panels, strict=False):
        _draw_panel(axes, title, {name: series[name] for name in names if name in series}, logarithmic)
    return figure


def _draw_panel(axes: Axes, title: str, curves: dict[str, list[tuple[int, float]]], logarithmic: bool) -> None:
    for (name, points), colour in zip(curves.items(), ("#0072B2", "#D55E00"), strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, linewidth=1.2, marker="." if len(points) < 20 else "", label=name)
    axes.set(title=title, xlabel="step", yscale="log" if logarithmic else "linear")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
