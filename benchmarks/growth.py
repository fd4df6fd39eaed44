"""How a step grows with depth, batch, crops, length and chips, by `plan`'s own estimate, into docs/scaling.md.

`python -m benchmarks.growth` estimates DeepStack-L on v5p and writes the tables and docs/images/growth.png, in a minute or two
(the TPU compiler describes the chips: `pip install -e '.[plan]'`). With `--compile` it first compiles a few of the points,
minutes each, and keeps what comes out in benchmarks/results/growth.json.

An order is the slope of a line through the logarithms: 1 where a quantity doubles with what grows.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from benchmarks.plan_table import write_section
from deepstack_jax.config import Config, build_config
from deepstack_jax.parallel.chips import GIB
from deepstack_jax.plan.planner import Wanted, make_plan
from deepstack_jax.plan.report import Plan
from deepstack_jax.plan.roofline import ATTAINED
from deepstack_jax.plan.topology import Machine, open_machine

ROOT = Path(__file__).parents[1]
COMPILED = ROOT / "benchmarks" / "results" / "growth.json"
PICTURE = ROOT / "docs" / "images" / "growth.png"
PAGE = ROOT / "docs" / "scaling.md"
RECIPE, WORDS = "configs/llava15.py", "finetune"
CHIPS = 64
SHAPES = {4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16"}
QUANTITIES = {
    "step": "step, s",
    "compute": "compute, s",
    "exposed": "links that nothing runs beside, s",
    "part": "s of the part",
    "memory": "GiB of each chip",
    "traffic": "GB into each chip",
}
# Okabe and Ito's palette, which anyone tells apart, on white, which is read on light and on dark pages.
LINES = {
    "step": ("#0072B2", "-", "o"),
    "compute": ("#009E73", (0, (5, 2)), None),
    "exposed": ("#D55E00", (0, (1, 1)), None),
    "part": ("#CC79A7", (0, (5, 2, 1, 2)), None),
    "memory": ("#0072B2", "-", "o"),
    "traffic": ("#D55E00", (0, (5, 2)), "s"),
}
DPI = 100


class Expected(NamedTuple):
    """The order that a quantity should have, and why it may depart from it."""

    order: float
    why: str


@dataclass(frozen=True)
class Curve:
    """What grows, where, and what is expected of it."""

    title: str
    along: str
    values: Sequence[int]
    changes: Callable[[int], dict[str, Any]]  # keys of the configuration at a value
    expected: Mapping[str, Expected]
    chips: Callable[[int], int] = lambda _: CHIPS
    part: str = ""  # of the step, drawn beside it
    compiled: Sequence[int] = field(default=())  # values that are compiled as well


class Point(NamedTuple):
    """A step's cost at one value of what grows."""

    at: int
    step: float
    compute: float
    exposed: float
    part: float
    memory: float
    traffic: float


def to_point(at: int, plan: Plan, machine: Machine, part: str) -> Point:
    """What a curve shows of a plan."""
    assert plan.roofline
    assert machine.chip
    flops = sum(one.executed for one in plan.parts if one.name == part)
    seconds = flops / (machine.chip.flops * ATTAINED * plan.devices)
    traffic = sum(one.total for one in plan.collectives) / 1e9
    line = plan.roofline
    return Point(at, line.step, line.compute, line.exposed, seconds, plan.used / GIB, traffic)


def measure(
    curve: Curve,
    build: Callable[[dict[str, Any]], Config],
    open_chips: Callable[[int], Machine],
    at: Sequence[int] | None = None,
    *,
    compiled: bool = False,
) -> list[Point]:
    """The points of a curve, estimated or compiled."""
    points = []
    for value in curve.values if at is None else at:
        machine = open_chips(curve.chips(value))
        plan = make_plan(build(curve.changes(value)), machine, Wanted(), compiled=compiled)
        points.append(to_point(value, plan, machine, curve.part))
    return points


def order(points: Sequence[Point], quantity: str) -> float:
    """The slope of a quantity over what grows, both as logarithms; 0 where it is nothing."""
    values = np.array([getattr(point, quantity) for point in points])
    if not values.all():
        return 0.0
    slope = np.polyfit(np.log([point.at for point in points]), np.log(values), 1)[0]
    return round(float(slope), 3) + 0.0  # not -0.0


def orders_table(curves: Mapping[str, Curve], found: Mapping[str, Sequence[Point]]) -> str:
    """The order of each quantity beside the expected one."""
    lines = [
        "| grows | quantity | expected order | found | of the last two points | why it departs |",
        "|---|---|---|---|---|---|",
    ]
    for name, curve in curves.items():
        for quantity, (expected, why) in curve.expected.items():
            label = f"{QUANTITIES[quantity]} {curve.part}" if quantity == "part" else QUANTITIES[quantity]
            slopes = f"{order(found[name], quantity):.2f} | {order(found[name][-2:], quantity):.2f}"
            lines.append(f"| {curve.title} | {label} | {expected:g} | {slopes} | {why} |")
    return "\n".join(lines)


def points_table(
    curves: Mapping[str, Curve], found: Mapping[str, Sequence[Point]], kept: Mapping[str, Mapping[str, Any]]
) -> str:
    """Every point, and beside it what the compiler says of it, where it was asked."""
    lines = [
        "| grows | at | step, s | links that nothing runs beside, s | GiB of each chip | GB into each chip | compiled |",
        "|---" * 7 + "|",
    ]
    for name, curve in curves.items():
        for point in found[name]:
            known = kept.get(name, {}).get(str(point.at))
            by = f"{known['step']:.3f} s, {known['memory']:.1f} GiB, {known['traffic']:.1f} GB" if known else ""
            numbers = f"{point.step:.3f} | {point.exposed:.3f} | {point.memory:.1f} | {point.traffic:.1f}"
            lines.append(f"| {curve.title} | {point.at:,} | {numbers} | {by} |")
    return "\n".join(lines)


def draw(curves: Mapping[str, Curve], found: Mapping[str, Sequence[Point]], kept: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Time of every curve, below it memory and traffic: logarithmic, so that an order is a slope.

    Thin lines have the expected order and the last value, or the first where it is to fall; crosses are compiled.
    """
    rows = -(-len(curves) // 3)
    figure = Figure(figsize=(11, 5.2 * rows), layout="constrained", facecolor="white")
    plots = figure.subplots(2 * rows, 3, squeeze=False)
    for place, (name, curve) in enumerate(curves.items()):
        above, below = plots[place // 3 * 2, place % 3], plots[place // 3 * 2 + 1, place % 3]
        points, at = found[name], [point.at for point in found[name]]
        for plot, quantities in ((above, ("step", "compute", "exposed", "part")), (below, ("memory", "traffic"))):
            for quantity in quantities:
                values = np.array([getattr(point, quantity) for point in points])
                if not values.any():
                    continue
                color, style, marker = LINES[quantity]
                label = f"{curve.part}, s" if quantity == "part" else QUANTITIES[quantity]
                plot.plot(at, values, color=color, linestyle=style, marker=marker, markersize=4, linewidth=2, label=label)
                if quantity in curve.expected:
                    expected = curve.expected[quantity].order
                    known_at = 0 if expected < 0 else -1
                    line = values[known_at] * (np.array(at) / at[known_at]) ** expected
                    plot.plot(at, line, color=color, linewidth=0.9, alpha=0.6)
                for value, known in kept.get(name, {}).items():
                    if quantity in ("step", "memory", "traffic"):
                        plot.plot(int(value), known[quantity], "x", color="black", markersize=8, zorder=3)
            plot.set(xscale="log", yscale="log", xticks=at)
            plot.set_xticks(at, [f"{value:,}" for value in at], fontsize=8)
            plot.xaxis.set_minor_formatter(NullFormatter())
            plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            plot.yaxis.set_minor_formatter(NullFormatter())
            plot.grid(alpha=0.25, which="major")
            plot.spines[["top", "right"]].set_visible(False)
            plot.legend(frameon=False, fontsize=7.5)
        above.set_title(curve.title, fontsize=11)
        below.set_xlabel(curve.along)
    return figure


def main() -> None:
    kept = json.loads(COMPILED.read_text()) if COMPILED.exists() else {}
    if "--compile" in sys.argv[1:]:
        for name, curve in CURVES.items():
            for at in curve.compiled:
                if str(at) not in kept.setdefault(name, {}):
                    [point] = measure(curve, recipe, slice_of, [at], compiled=True)
                    kept[name][str(at)] = point._asdict()
                    COMPILED.write_text(json.dumps(kept, indent=1) + "\n")
                    print(name, point, flush=True)
    found = {}
    for name, curve in CURVES.items():
        found[name] = measure(curve, recipe, slice_of)
        print(name, *found[name], sep="\n", flush=True)
    draw(CURVES, found, kept).savefig(PICTURE, dpi=DPI, metadata={"Software": None})
    Image.open(PICTURE).convert("RGB").quantize(64).save(PICTURE, optimize=True)  # a quarter of the bytes
    write_section("growth", f"{orders_table(CURVES, found)}\n\n{points_table(CURVES, found, kept)}", PAGE)


def recipe(changes: dict[str, Any]) -> Config:
    """DeepStack-L at 7B over all chips along fsdp, with some keys changed."""
    config = runpy.run_path(str(ROOT / RECIPE))["get_config"](WORDS)
    config.update_from_flattened_dict({"mesh.fsdp": -1} | changes)
    return build_config(config)


def slice_of(chips: int) -> Machine:
    return open_machine(f"v5p:{SHAPES[chips]}")


CURVES = {
    "depth": Curve(
        "layers of the decoder",
        "layers",
        (8, 16, 32, 64, 128),
        lambda layers: {"decoder.layers": layers},
        {
            "step": Expected(1, "tower, projector and head do not grow"),
            "memory": Expected(1, "embedding, head, one layer's work and one chunk of logits do not grow"),
            "traffic": Expected(1, "embedding, head and tower travel as before"),
        },
        compiled=(8, 32),
    ),
    "batch": Curve(
        "rows of a step",
        "global batch",
        (64, 128, 256, 512, 1024),
        lambda rows: {"train.batch_size": rows},
        {
            "compute": Expected(1, ""),
            "step": Expected(1, "what the links take does not depend on rows: the more, the less it weighs"),
            "memory": Expected(1, "state and gathered weights do not depend on rows"),
            "traffic": Expected(0, ""),
        },
    ),
    "crops": Curve(
        "crops of an image",
        "crops",
        (2, 4, 8, 16),
        lambda crops: {"image.num_crops": crops},
        {
            "part": Expected(1, "the view of the whole image is one more"),
            "step": Expected(0, "crops are injected, no row gets longer: only the tower grows, and the projector"),
            "memory": Expected(0, "the stack and the tower's features grow"),
        },
        part="tower",
    ),
    "length": Curve(
        "positions of a row",
        "positions",
        (1024, 2048, 4096, 8192, 16384, 32768),
        lambda length: {"data.max_length": length},
        {
            "part": Expected(2, ""),
            "step": Expected(1, "what the links take weighs at the short end, attention at the long one"),
            "memory": Expected(1, "state and gathered weights do not grow"),
            "traffic": Expected(0, "the head's weights are gathered for every 512 positions, and their gradient scattered"),
        },
        part="attention",
    ),
    "weak": Curve(
        "chips, 2 rows each",
        "chips",
        tuple(SHAPES),
        lambda chips: {"train.batch_size": 2 * chips},
        {
            "step": Expected(0, "of n chips each gets (n - 1) / n of all weights, 3/4 of them at 4"),
            "memory": Expected(-1, "only the state is cut: what a chip's rows and gathered weights take stays"),
            "traffic": Expected(0, "(n - 1) / n again"),
        },
        chips=lambda chips: chips,
        compiled=(4, 16),
    ),
    "strong": Curve(
        "chips, 1,024 rows in all",
        "chips",
        tuple(SHAPES)[1:],
        lambda _: {"train.batch_size": 1024},
        {
            "compute": Expected(-1, ""),
            "step": Expected(-1, "what the links take does not shrink"),
            "memory": Expected(-1, "gathered weights and a chunk of logits do not shrink"),
            "traffic": Expected(0, "(n - 1) / n again"),
        },
        chips=lambda chips: chips,
    ),
}


if __name__ == "__main__":
    main()
