"""Compare the demo's finished runs: a table, summary.json, curves.png, pages.png, and page.png, a held-out page to ask about.

  python -m benchmarks.demo_report runs/demo

reads runs/demo/{baseline,dummy,deepstack} as `deepstack_jax.train` leaves them; any other run beside the three becomes a
further row. Exit codes: 0 done; 1 a run is missing, unfinished or does not fit the others, said in one line on stderr.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table

from deepstack_jax.atomic import write_json
from deepstack_jax.config import Config, from_stored
from deepstack_jax.data.encode.image import make_views, open_image
from deepstack_jax.data.open import open_source
from deepstack_jax.data.synthetic import BOXES, CHANCE
from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate.results import flat_scores
from deepstack_jax.printing import Console
from deepstack_jax.train.run.metrics import read_metrics

LABELS = {"baseline": "low-res baseline", "dummy": "dummy stack", "deepstack": "DeepStack"}
"""The three runs that the demo compares, in the order shown; a dummy stack injects the low-res tokens once more."""

COUNTS = ("steps", "seconds_per_step", "parameters", "context_length", "visual_tokens")
SHOWN_PAGES = 3

# Okabe and Ito's palette: told apart with any colour vision. Line styles tell curves apart that lie on each other.
COLOURS = {"baseline": "#E69F00", "dummy": "#0072B2", "deepstack": "#009E73"}
STYLES = {"baseline": "-", "dummy": (0, (4, 3)), "deepstack": "-"}
OTHER = "#8C8C8C"
RIGHT, WRONG = "#00875F", "#D03A00"
OUTLINES = {"fine": ("#FFB000", "-"), "coarse": ("#56B4E9", (0, (2.5, 1.5)))}
TASKS = {"fine": "Which digit is in this box?", "coarse": "Which shade is this box?"}

# pages.png in pixels: every view is enlarged by a whole factor, or the checker would turn into stripes.
DPI = 100
VIEW, CLOSE_UP, TEXT, GAP, HEAD = 384, 160, 330, 26, 134


class ReportError(ValueError):
    """Runs that cannot be compared; the message is one line with the next move."""


@dataclass(frozen=True)
class Run:
    """One finished training run."""

    name: str  # of its folder
    config: Config
    results: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]  # one record per logged training step
    answers: Sequence[Mapping[str, Any]]  # rows of predictions.jsonl

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name.replace("_", " "))


@dataclass(frozen=True)
class Shown:
    """One held-out page with the questions to show of it."""

    high: np.ndarray  # u8[y, x, 3], the crops put together
    low: np.ndarray  # u8[S, S, 3], the global view
    asked: Sequence[Mapping[str, Any]]  # at most one row of predictions.jsonl per kind
    said: Sequence[Mapping[str, Mapping[str, Any]]]  # for each of them, run name -> its row

    @property
    def blind(self) -> bool:
        """Whether every box of the low-res view is one exact gray, so that nothing but its shade can be read from it."""
        return all(np.ptp(box_of(self.low, box), axis=(0, 1)).max() == 0 for box in range(BOXES**2))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_report", description="Compare the demo's finished runs.")
    parser.add_argument("folder", nargs="?", default="runs/demo", type=Path, help="holds the workdirs (default: %(default)s)")
    folder = parser.parse_args(arguments).folder
    console = Console()
    try:
        runs = load_runs(folder)
        pages = pick_pages(runs)
        summary = {run.name: summarise(run) for run in runs}
        write_json(folder / "summary.json", summary)
        draw_curves(runs).savefig(folder / "curves.png", dpi=130)
        draw_pages(pages).savefig(folder / "pages.png", dpi=DPI)
        Image.fromarray(pages[0].high).save(folder / "page.png")
    except (ReportError, ConfigError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write the report to {folder}: {error.strerror}", file=sys.stderr)
        return 1
    console.print(table(runs))
    console.print(conclusion(runs, all(page.blind for page in pages)), soft_wrap=True)
    console.print(f"written to {folder}: summary.json, curves.png, pages.png, page.png", soft_wrap=True)
    return 0


def load_runs(folder: Path) -> list[Run]:
    """The three runs in their order, then every other finished run beside them by name; unfinished ones are named on stderr.

    Raises:
        ReportError: one of the three is missing, unfinished or damaged, or they were not asked the same questions.
    """
    runs = [load_run(folder / name) for name in LABELS]
    first = runs[0]
    asked = [_question(row) for row in first.answers]
    for run in runs[1:]:
        if [_question(row) for row in run.answers] != asked:
            raise ReportError(
                f"{folder / run.name} and {folder / first.name} were not asked the same held-out questions; train one of them "
                "again with the other's config.data.synthetic and config.evaluation.examples"
            )
    for other in sorted(path.parent for path in folder.glob("*/config.json") if path.parent.name not in LABELS):
        try:
            runs.append(load_run(other))
        except ReportError as error:
            print(f"left out: {error}", file=sys.stderr)
    return runs


def load_run(folder: Path) -> Run:
    """One workdir as the train verb leaves it.

    Raises:
        ReportError: what is missing or damaged, and the command that finishes the run.
    """
    name, variant = folder.name, folder.name
    try:
        values = json.loads((folder / "config.json").read_text())
        variant = name if name in LABELS else values.get("name", name)
        run = Run(
            name=name,
            config=from_stored(values),
            results=_flat(json.loads((folder / "results.json").read_text())),
            metrics=[record for record in read_metrics(folder) if "loss" in record],
            answers=[json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()],
        )
    except FileNotFoundError as error:
        command = f"python -m deepstack_jax.train --config=configs/demo.py:{variant} --workdir={folder}"
        raise ReportError(f"run {name} is not finished: {error.filename} does not exist; finish it with: {command}") from error
    except (OSError, ValueError) as error:
        raise ReportError(f"run {name} in {folder} cannot be read: {error}; delete the folder and train again") from error
    wanted = (*COUNTS, "fine_exact_match", "coarse_exact_match")
    if lacking := [key for key in wanted if key not in run.results]:
        raise ReportError(f"{folder / 'results.json'} lacks {', '.join(lacking)}; this report wants a run of configs/demo.py")
    if not run.metrics or not run.answers:
        empty = "predictions.jsonl" if run.metrics else "metrics.jsonl"
        raise ReportError(f"{folder / empty} holds nothing to show; delete the folder and train again")
    return run


def _flat(results: dict[str, Any]) -> dict[str, Any]:
    """With the scores by the names that they have in logs, "fine_exact_match" and such."""
    return results | flat_scores(results)


def _question(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("row", "turn", "kind", "question", "references"))


def summarise(run: Run) -> dict[str, float | int | None]:
    """The entry of a run in summary.json; shares are 0..1, `seconds_per_step` is null for a run too short to be timed."""
    return {
        "fine_exact_match": run.results["fine_exact_match"],
        "coarse_exact_match": run.results["coarse_exact_match"],
        "chance": CHANCE["fine"],
        "coarse_chance": CHANCE["coarse"],
        **{key: run.results[key] for key in COUNTS},
    }


def table(runs: Sequence[Run]) -> Table:
    """One row a run, and what guessing gives; 80 columns wide."""
    title = f"Exact match on {len(runs[0].answers):,} held-out questions"
    shown = Table("run", title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("fine:\ndigits", "coarse:\nshades", "steps", "s/step", "params", "context\ntokens", "visual\ntokens"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        values = run.results
        seconds = "-" if values["seconds_per_step"] is None else f"{values['seconds_per_step']:.2f}"
        shown.add_row(
            run.label,
            f"{values['fine_exact_match']:.1%}",
            f"{values['coarse_exact_match']:.1%}",
            f"{values['steps']}",
            seconds,
            f"{values['parameters'] / 1e6:.2f}M",
            f"{values['context_length']}",
            f"{values['visual_tokens']}",
            end_section=run is runs[-1],
        )
    shown.add_row("chance", f"{CHANCE['fine']:.1%}", f"{CHANCE['coarse']:.1%}")
    return shown


def conclusion(runs: Sequence[Run], blind: bool) -> str:
    """What the table shows and what it does not, in one sentence."""
    baseline, dummy, deepstack = (f"{run.results['fine_exact_match']:.1%}" for run in runs[:3])
    scores = (
        f"DeepStack answers {deepstack} of the digit questions right, the low-res baseline {baseline} "
        f"and the dummy stack {dummy} (chance {CHANCE['fine']:.0%})"
    )
    if not blind:
        return f"{scores}, but the boxes of these pages are not even in the low-res view, so this is not the blind task."
    return (
        f"{scores}: the task is blind by design, digits cannot be seen in the low-res view by construction, so this shows "
        "whether the high-res stack is read, not how much natural documents gain from it."
    )


def pick_pages(runs: Sequence[Run]) -> list[Shown]:
    """The first pages of the held-out split, with the first fine and the first coarse question of each.

    Raises:
        ReportError: the pages of this version of the generator are not those that the runs were asked about.
    """
    baseline, deepstack = runs[0], runs[2]
    source = open_source(deepstack.config.data, "validation")
    given = {run.name: {(row["row"], row["turn"]): row for row in run.answers} for run in runs[:3]}
    pages = []
    for index in sorted({row["row"] for row in baseline.answers})[:SHOWN_PAGES]:
        example = source[index]
        rows = [row for row in baseline.answers if row["row"] == index]
        for row in rows:
            if [example.messages[2 * row["turn"] + 1].text] != row["references"]:
                raise ReportError(
                    f"held-out page {index} has another answer than the runs were scored with: the generator changed since; "
                    "delete the runs and train them again"
                )
        image = open_image(example.images[0])
        crops = make_views(image, deepstack.config.image)
        if crops.grid is None:
            raise ReportError(f"run {deepstack.name} has no crops to show; train it with configs/demo.py:deepstack")
        asked = [next(row for row in rows if row["kind"] == kind) for kind in TASKS if any(row["kind"] == kind for row in rows)]
        said = [{name: answers[row["row"], row["turn"]] for name, answers in given.items()} for row in asked]
        low = make_views(image, baseline.config.image).pixels[0]
        pages.append(Shown(put_together(crops.pixels[1:], crops.grid), low, asked, said))
    return pages


def put_together(crops: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Crops u8[rows * cols, S, S, 3], row-major, as the picture u8[rows * S, cols * S, 3] they were cut from."""
    rows, cols = grid
    side = crops.shape[1]
    return crops.reshape(rows, cols, side, side, 3).swapaxes(1, 2).reshape(rows * side, cols * side, 3)


def box_of(view: np.ndarray, box: int) -> np.ndarray:
    """The part of a square view u8[S, S, 3] that shows box 0..15, row-major."""
    side = view.shape[0] // BOXES
    row, column = divmod(box, BOXES)
    return view[row * side : (row + 1) * side, column * side : (column + 1) * side]


def asked_box(row: Mapping[str, Any]) -> int:
    """The box that a question asks for: the number that ends it.

    Raises:
        ReportError: it names no box of the page.
    """
    number = re.search(r"\d+$", row["question"])
    if number is None or int(number[0]) >= BOXES**2:
        raise ReportError(f"question {row['question']!r} does not end in a box number 0..{BOXES**2 - 1}")
    return int(number[0])


def draw_curves(runs: Sequence[Run]) -> Figure:
    """Training loss and token accuracy of the three, and exact match of all runs with the chance level."""
    figure = Figure(figsize=(10.5, 6.6 + 0.5 * (len(runs) - 3)), layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=(3.6, 1.2 + 0.35 * len(runs)))
    for plot, key, title in zip(axes[0], ("loss", "token_accuracy"), ("training loss", "training token accuracy"), strict=True):
        for run in runs[:3]:
            steps, values = zip(*((record["step"], record[key]) for record in run.metrics), strict=True)
            plot.plot(steps, values, color=COLOURS[run.name], linestyle=STYLES[run.name], linewidth=2.4, label=run.label)
        plot.set(title=title, xlabel="step")
        plot.set_xlim(left=0)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 1].set_ylim(top=1.02)
    for plot, kind, title in zip(axes[1], CHANCE, ("held-out digits (fine)", "held-out shades (coarse)"), strict=True):
        draw_scores(plot, runs, kind)
        plot.set_title(f"{title}, dashed: chance {CHANCE[kind]:.0%}")
    axes[1, 1].tick_params(labelleft=False)
    for plot in axes.flat:
        plot.title.set_size(12.5)
        plot.tick_params(labelsize=11)
        plot.xaxis.label.set_size(11.5)
        plot.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=12, frameon=False)
    return figure


def draw_scores(plot: Axes, runs: Sequence[Run], kind: str) -> None:
    """A bar a run with its number, the first run on top, and the chance level as a dashed line."""
    scores = [run.results[f"{kind}_exact_match"] for run in runs]
    plot.barh([run.label for run in runs], scores, color=[COLOURS.get(run.name, OTHER) for run in runs], height=0.66)
    plot.axvline(CHANCE[kind], color="black", linestyle=(0, (4, 3)), linewidth=1.4)
    for place, score in enumerate(scores):
        plot.text(max(score, CHANCE[kind]) + 0.015, place, f"{score:.1%}", va="center", fontsize=11)
    plot.set(xlim=(0, 1.19), xticks=np.linspace(0, 1, 5), xlabel="exact match")
    plot.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    plot.invert_yaxis()


def draw_pages(pages: Sequence[Shown]) -> Figure:
    """A row a page: the high-res view, the low-res view, the fine question's box close up, the questions and the answers."""
    lefts = np.cumsum([GAP, VIEW + GAP, VIEW + GAP, CLOSE_UP + GAP])
    width, height = lefts[-1] + TEXT + GAP, HEAD + len(pages) * (VIEW + GAP)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    sides = f"{pages[0].high.shape[1]}x{pages[0].high.shape[0]}", f"{pages[0].low.shape[1]}x{pages[0].low.shape[0]}"
    headings = (f"high-res crops\n{sides[0]} pixels", f"low-res view\n{sides[1]} pixels", "asked box", "questions and answers")
    title = f"The first {len(pages)} held-out pages, exactly as the models get them"
    figure.text(GAP / width, 1 - 14 / height, title, va="top", fontsize=16, weight="bold")
    if all(page.blind for page in pages):
        note = "Digits only rearrange the fine checker: the low-res view, its average, is even in each box; "
        note += "a guess is right once in ten."
        figure.text(GAP / width, 1 - 46 / height, note, va="top", fontsize=12.5)
    for left, heading in zip(lefts, headings, strict=True):
        figure.text(left / width, 1 - (HEAD - 10) / height, heading, va="bottom", fontsize=12.5, linespacing=1.25)
    for number, page in enumerate(pages):
        top = HEAD + number * (VIEW + GAP)
        for left, view in zip(lefts, (page.high, page.low), strict=False):
            plot = pixel_axes(figure, left, top, VIEW, VIEW)
            plot.imshow(view, interpolation="nearest", extent=(0, VIEW, VIEW, 0))
            for row in page.asked:
                outline(plot, row)
        for view, name, offset in ((page.high, "high-res", 0), (page.low, "low-res", VIEW - CLOSE_UP - 30)):
            plot = pixel_axes(figure, lefts[2], top + offset, CLOSE_UP, CLOSE_UP)
            plot.imshow(box_of(view, asked_box(page.asked[0])), interpolation="nearest", extent=(0, CLOSE_UP, CLOSE_UP, 0))
            plot.add_patch(Rectangle((0, 0), CLOSE_UP, CLOSE_UP, fill=False, color=OUTLINES[page.asked[0]["kind"]][0], lw=5))
            plot.text(0, CLOSE_UP + 6, f"box {asked_box(page.asked[0])}, {name}", va="top", fontsize=12)
        write_answers(pixel_axes(figure, lefts[3], top, TEXT, VIEW), page)
    return figure


def pixel_axes(figure: Figure, left: int, top: int, width: int, height: int) -> Axes:
    """Bare axes that cover whole pixels of the figure and count in them, from their top left corner."""
    full_width, full_height = figure.get_size_inches() * DPI
    plot = figure.add_axes((left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height))
    plot.set(xlim=(0, width), ylim=(height, 0))
    plot.set_axis_off()
    return plot


def outline(plot: Axes, row: Mapping[str, Any]) -> None:
    """Frame the asked box; a coarse frame is the smaller, so that both show where both questions ask for one box."""
    color, style = OUTLINES[row["kind"]]
    y, x = divmod(asked_box(row), BOXES)
    side, inset = VIEW / BOXES, 4 if row["kind"] == "fine" else 11
    frame = Rectangle((x * side + inset, y * side + inset), side - 2 * inset, side - 2 * inset, fill=False, ec=color, lw=3.2)
    frame.set(linestyle=style, path_effects=[withStroke(linewidth=5.5, foreground="black")])
    plot.add_patch(frame)


def write_answers(plot: Axes, page: Shown) -> None:
    """Each question with its mark, the truth, and what the three said, ticked where right and crossed where wrong."""
    for block, (row, said) in enumerate(zip(page.asked, page.said, strict=True)):
        color, style = OUTLINES[row["kind"]]
        top = block * VIEW / 2 + (0 if block == 0 else 8)
        swatch = Rectangle((4, top + 2), 20, 20, fill=False, ec=color, lw=3, linestyle=style, clip_on=False)
        swatch.set_path_effects([withStroke(linewidth=4.5, foreground="black")])
        plot.add_patch(swatch)
        plot.text(34, top + 12, TASKS[row["kind"]], va="center", fontsize=13, weight="bold")
        words = row["question"].splitlines()[-1]
        plot.text(34, top + 40, f"asked as “{words}”", va="center", fontsize=12, color="#444444")
        plot.text(34, top + 70, "truth", va="center", fontsize=12.5)
        plot.text(214, top + 70, row["references"][0], va="center", fontsize=12.5, weight="bold")
        for line, (name, label) in enumerate(LABELS.items()):
            answer, y = said[name], top + 98 + 28 * line
            right = answer["scores"]["exact_match"] == 1
            plot.text(34, y, label, va="center", fontsize=12.5)
            plot.text(214, y, shorten(answer["prediction"]), va="center", fontsize=12.5)
            plot.text(312, y, "✓" if right else "✗", va="center", fontsize=16, weight="bold", color=RIGHT if right else WRONG)


def shorten(prediction: str, limit: int = 9) -> str:
    """A prediction that fits its column."""
    words = " ".join(prediction.split()) or "(none)"
    return words if len(words) <= limit else words[: limit - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
