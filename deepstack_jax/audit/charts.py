"""The charts on top of the page, each as a PNG for light and for dark surroundings."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deepstack_jax.audit.survey import Survey
from deepstack_jax.config import Config

SIZE, DPI = (4.6, 3.1), 200  # inches: shown 300 to 400 px wide, where the text is as large as the page's
THEMES = {"light": ("#ffffff", "#24292f", "#d0d7de"), "dark": ("#1b1f24", "#d6dbe1", "#3d444d")}  # ground, text, grid
BLUE, GREEN, ORANGE, RED = "#3B82C4", "#2FA37C", "#E69F00", "#D9534F"


def draw_charts(found: Survey, config: Config) -> dict[str, dict[str, bytes]]:
    """name -> theme -> PNG: "lengths", "supervised" and "grids"; the last only where images are cut into crops."""
    drawings = {"lengths": draw_lengths, "supervised": draw_supervised}
    if config.layout.grids:
        drawings["grids"] = draw_grids
    return {name: {theme: _render(draw, found, config, theme) for theme in THEMES} for name, draw in drawings.items()}


def draw_lengths(axes: Axes, found: Survey, config: Config) -> None:
    """Sequence lengths with their images, by whether there is an image, and the lengths that rows have."""
    lengths, visual = found.sizes[:, 0], found.sizes[:, 2]
    limit = config.data.max_length
    bins = np.linspace(0, limit, 33).tolist() if limit > 32 else [edge - 0.5 for edge in range(limit + 2)]
    parts = [("with images", BLUE, lengths[visual > 0]), ("text only", ORANGE, lengths[visual == 0])]
    shown = [part for part in parts if len(part[2])]
    if shown:
        names, colours, values = zip(*shown, strict=True)
        axes.hist(values, bins, stacked=True, color=colours, label=names)
    axes.axvline(limit, color=RED, linewidth=1.8, label=f"max_length {limit:,}")
    for number, bucket in enumerate(config.data.buckets):
        axes.axvline(bucket, color=GREEN, linewidth=1.4, linestyle="--", label="" if number else "buckets")
    axes.set(xlabel="tokens, visual ones included", ylabel="examples", title="Length", xlim=(0, limit * 1.04))


def draw_supervised(axes: Axes, found: Survey, _: Config) -> None:
    """Share of each example's sequence that is trained on."""
    shares = [one.supervised / one.size.tokens for one in found.usable]
    axes.hist(shares, np.linspace(0, 1, 26).tolist(), color=GREEN, label="examples")
    axes.axvline(found.supervised_share, color=RED, linewidth=1.8, label=f"of all tokens {found.supervised_share:.1%}")
    axes.set(xlabel="share of the sequence", ylabel="examples", title="Supervised tokens", xlim=(0, 1))
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def draw_grids(axes: Axes, found: Survey, _: Config) -> None:
    """Images by grid, the most frequent first."""
    counts = found.grids().most_common(12)
    bars = axes.bar([name for name, _ in counts], [count for _, count in counts], color=BLUE, label="images")
    axes.bar_label(bars, [f"{count:,}" for _, count in counts], fontsize=9, color=axes.xaxis.label.get_color())
    axes.margins(y=0.25)
    axes.set_xlim(-0.6, max(len(counts), 4) - 0.4)  # a single bar must not fill the chart
    axes.set(xlabel="crops of an image, rows × columns", ylabel="images", title="Grids")


def _render(draw: Callable[[Axes, Survey, Config], None], found: Survey, config: Config, theme: str) -> bytes:
    ground, text, grid = THEMES[theme]
    figure = Figure(figsize=SIZE, layout="constrained", facecolor=ground)
    axes = figure.add_subplot(facecolor=ground)
    axes.xaxis.label.set_color(text)
    draw(axes, found, config)
    axes.yaxis.label.set_color(text)
    axes.title.set(color=text, fontsize=12, fontweight="bold")
    axes.tick_params(colors=text, labelsize=9.5, length=0)
    axes.tick_params(axis="x", pad=6)
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    axes.grid(axis="y", color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9, labelcolor=text, facecolor=ground, edgecolor=grid, framealpha=0.9)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()
