"""The study's pictures: on white, in colours that anyone tells apart, so that they can be read on light and on dark pages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.results import REACHED, Run, by_row
from benchmarks.study.table import DIGITS, ROWS, Study
from deepstack_jax.data.cards import CHANCE

Runs = Mapping[tuple[str, str, int], Run]
# Okabe and Ito's palette; the rows of the curves, which lines tell apart too.
CURVES = {
    "baseline": ("#E69F00", "-"),
    "dummy": ("#0072B2", (0, (4, 3))),
    "deepstack": ("#009E73", "-"),
    "string": ("#CC79A7", "-"),
    "sampling_1d": ("#56B4E9", (0, (1, 1))),
    "sampling_grid": ("#D55E00", (0, (5, 2, 1, 2))),
}
SHADE, LINE = "#8FBBD9", "#1F4E79"
DPI = 130


def draw_scores(runs: Runs, study: str) -> Figure:
    """A bar a row, its mean over the seeds, with a dot for each of them and the chance level."""
    names = [name for name in ROWS if by_row(runs, study, name)]
    figure = Figure(figsize=(9.5, 1.2 + 0.3 * len(names)), layout="constrained", facecolor="white")
    plot = figure.subplots()
    for place, name in enumerate(names):
        scores = [run.score(DIGITS) for run in by_row(runs, study, name)]
        plot.barh(place, np.mean(scores), color=CURVES.get(name, (SHADE,))[0], height=0.66, alpha=0.85)
        plot.plot(scores, [place] * len(scores), "o", color="black", markersize=3.5)
    plot.set_yticks(range(len(names)), [ROWS[name].label for name in names])
    plot.axvline(CHANCE["fine"], color="black", linestyle=(0, (4, 3)), linewidth=1.2)
    plot.set(xlim=(0, 1), title=f"digits, exact match; dots: seeds, dashed: chance {CHANCE['fine']:.0%}")
    plot.invert_yaxis()
    _share(plot.xaxis)
    _plain(plot)
    return figure


def draw_curves(runs: Runs, study: str) -> Figure:
    """Token accuracy of all kinds of questions over the steps, the mean of the seeds and their range."""
    figure = Figure(figsize=(9.5, 4.6), layout="constrained", facecolor="white")
    plot = figure.subplots()
    for name, (color, style) in CURVES.items():
        if found := by_row(runs, study, name):
            _curve(plot, found, color=color, linestyle=style, label=ROWS[name].label)
    plot.axhline(REACHED, color="black", linestyle=(0, (4, 3)), linewidth=1)
    plot.set(xlabel="step", title="accuracy on the cards of each batch, none seen before", ylim=(0, 1.02))
    plot.set_xlim(left=0)
    plot.legend(frameon=False, fontsize=9)
    _share(plot.yaxis)
    _plain(plot)
    return figure


def draw_held_out(runs: Runs, studies: Sequence[Study]) -> Figure:
    """Held-out token accuracy over the steps, a plot for each study of real images that has runs."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained", facecolor="white")
    for plot, study in zip(figure.subplots(1, len(studies), sharey=True, squeeze=False)[0], studies, strict=True):
        for row in study.rows.values():
            if found := by_row(runs, study.name, row.name):
                color, style = CURVES[row.name.removeprefix(f"{study.name}_")]
                _curve(plot, found, color=color, linestyle=style, marker=".", label=row.label)
        plot.set(xlabel="step", title=study.title)
        plot.set_xlim(left=0)
        plot.set_ylim(bottom=0)
        plot.legend(frameon=False, fontsize=9)
        _share(plot.yaxis)
        _plain(plot)
    return figure


def draw_along(runs: Runs, study: str, rows: Sequence[tuple[float, str]], title: str, label: str) -> Figure:
    """Each kind of digits over a number that the rows differ in, as where the injection starts."""
    figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
    plot = figure.subplots()
    found = [(at, by_row(runs, study, name)) for at, name in rows if by_row(runs, study, name)]
    for kind, (color, style) in zip(DIGITS, list(CURVES.values())[1:4], strict=True):
        means = [np.mean([run.scores[kind] for run in one]) for _, one in found]
        plot.plot([at for at, _ in found], means, color=color, linestyle=style, marker="o", linewidth=2, label=kind)
        for at, one in found:
            plot.plot([at] * len(one), [run.scores[kind] for run in one], ".", color=color, markersize=4)
    plot.axhline(CHANCE["fine"], color="black", linestyle=(0, (4, 3)), linewidth=1)
    plot.set(xlabel=label, title=title, ylim=(0, 1.02))
    plot.legend(frameon=False)
    _share(plot.yaxis)
    _plain(plot)
    return figure


def draw_costs(runs: Runs, study: str, names: Sequence[str]) -> Figure:
    """Exact match against what a step costs: FLOPs, memory, time."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained", facecolor="white")
    costs = {
        "GFLOP a step": lambda run: run.flops / 1e9,
        "MiB": lambda run: run.memory / 2**20,
        "s/step": lambda run: run.seconds_per_step or np.nan,
    }
    for plot, (label, cost) in zip(figure.subplots(1, len(costs), sharey=True), costs.items(), strict=True):
        for name in names:
            if found := by_row(runs, study, name):
                color = CURVES.get(name, (LINE,))[0]
                plot.plot([cost(run) for run in found], [run.score(DIGITS) for run in found], "o", color=color, label=name)
        plot.set(xlabel=label, ylim=(0, 1.02))
        plot.set_xlim(left=0)
        _share(plot.yaxis)
        _plain(plot)
    figure.axes[-1].legend(frameon=False)
    return figure


def save(figure: Figure, file: Path) -> None:
    """As a PNG that is the same whenever the numbers are."""
    figure.savefig(file, dpi=DPI, metadata={"Software": None})


def _curve(plot: Axes, found: Sequence[Run], color: str, **how: Any) -> None:
    """The mean of a row's runs over the steps that all of them have, and their range."""
    length = min(len(run.curve) for run in found)
    steps = [step for step, _ in found[0].curve[:length]]
    values = np.array([[accuracy for _, accuracy in run.curve[:length]] for run in found])
    plot.plot(steps, values.mean(0), color=color, linewidth=2.2, **how)
    plot.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def _share(axis) -> None:
    axis.set_major_formatter(lambda share, _: f"{share:.0%}")


def _plain(plot: Axes) -> None:
    plot.spines[["top", "right"]].set_visible(False)
