"""The page: one HTML file without a reference to anything outside it."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from deepstack_jax import __version__
from deepstack_jax.audit import pictures, survey
from deepstack_jax.audit.cards import SampleCard, Tag, hex_code
from deepstack_jax.audit.inputs import injecting_layers
from deepstack_jax.audit.survey import Survey
from deepstack_jax.config import Config
from deepstack_jax.data.example import BadExample
from deepstack_jax.printing import printable, redacted

CAPTIONS = {
    "lengths": "Sequence positions per example. What lies beyond the red line is dropped, cut or stops the run, as configured.",
    "supervised": "Share of each example's positions that the loss asks for: the answers and their ends of turn.",
    "grids": "How images are cut, chosen by their shape alone.",
}


def render_page(
    config: Config,
    found: Survey,
    cards: Sequence[SampleCard],
    charts: Mapping[str, Mapping[str, bytes]],
    rows: int,
    leaks: Sequence[BadExample] = (),
) -> str:
    """The page as HTML, of a source of `rows`: the samples' cards, charts as name -> theme ("light", "dark") -> PNG.

    `leaks`: held-out rows that are trained on, with what of them is.
    """
    bad = quarantined(found, cards)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deepstack_jax.audit"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_harmless,
    )
    return environment.get_template("audit.html.j2").render(
        config=config,
        version=__version__,
        data=f"synthetic {config.data.source}"
        if config.data.generated
        else redacted(config.data.train) or ", ".join(config.data.sets),
        tiles=make_tiles(config, found, rows, len(bad)),
        charts=[(name, CAPTIONS[name], {theme: _png(png) for theme, png in chart.items()}) for name, chart in charts.items()],
        sets=survey.by_origin(found.usable),
        bad=bad,
        leaks=leaks,
        remarks=found.remarks(),
        scanned=len(found.rows),
        method=method(config),
        layers=layer_tags(config),
        cards=cards,
        shown=_with_newlines,
    )


def quarantined(found: Survey, cards: Sequence[SampleCard]) -> list[BadExample]:
    """Every example known to be unusable, once, by row: those of the survey, and samples whose images turned out damaged."""
    reasons = {bad.index: bad for bad in found.bad}
    reasons |= {card.row: BadExample(card.row, card.name, card.reason) for card in cards if card.reason}
    return [reasons[row] for row in sorted(reasons)]


def make_tiles(config: Config, found: Survey, rows: int, bad: int) -> list[tuple[str, str, str]]:
    """The numbers on top: what, how many, and a remark."""
    sizes = found.sizes
    if not len(sizes):
        return [("examples", f"{rows:,}", f"none of the {len(found.rows):,} looked at can be used")]
    lengths, visual = sizes[:, 0], sizes[:, 2]
    packed, per_row = survey.packed_efficiency(sizes, config)
    padded = survey.padded_efficiency(sizes, config)
    span = f"tokens; {lengths.min():,} to {lengths.max():,} of {config.data.max_length:,}"
    state = f"packing is {'on' if config.data.packing.enabled else 'off'}"
    return [
        ("examples", f"{rows:,}", f"{len(found.rows):,} looked at, {bad:,} unusable"),
        ("median length", f"{np.median(lengths):,.0f}", span),
        ("visual tokens", f"{visual.sum() / lengths.sum():.0%}", "of all positions"),
        ("supervised", f"{found.supervised_share:.1%}", "of all positions"),
        ("useful if packed", f"{packed:.0%}", f"of token slots, {per_row:.1f} examples a row; {state}"),
        ("useful if padded", f"{padded:.0%}", "of token slots, one example a row"),
    ]


def method(config: Config) -> str:
    """What happens to an image under this configuration, in one or two sentences."""
    layers, stack, image = injecting_layers(config), config.deepstack, config.image
    first = {
        "global": "The tokens of the global view are in the sequence",
        "zero": "The sequence holds exact zeros in the places of the global view's tokens",
        "crops": "The tokens of all crops are in the sequence, one group after the other",
        "global_crops": "The tokens of the global view and of all crops are in the sequence",
    }[stack.sequence]
    if image.kind.mosaic:
        first += ", after them those of the cells" if image.kind.upsampled else ", after them those of the crops"
    if not layers:
        return f"{first}. Nothing is injected."
    of_views = {
        "none": "",
        "crops": f"the crops' tokens, dealt into groups by {stack.sampling!r} sampling,",
        "dummy": "the global view's own tokens",
        "global": "the global view's own tokens",
        "global_crops": f"the global view's tokens, then the crops' in groups by {stack.sampling!r} sampling,",
    }[stack.stack_of_views]
    taps = "the global view's tokens by other layers of the tower (taps)" if stack.taps else ""
    what = " and ".join(filter(None, (of_views, taps)))
    if stack.into == "channels":
        return f"{first}. With each of them {what} are joined along channels, before the projector. Parts count from 0."
    where = (
        "hidden states of the decoder" if stack.into in ("decoder", "input") else "global view's tokens inside the vision tower"
    )
    return f"{first}. At the inputs of the layers below, {what} are added to the {where}. Layers count from 0."


def layer_tags(config: Config) -> list[Tag]:
    """The legend of all layers, and the groups that reach none."""
    layers = injecting_layers(config)
    colours = [hex_code(colour) for colour in pictures.layer_colours(len(layers))]
    tags = [Tag(code, f"{layer.name}, {layer.source}") for layer, code in zip(layers, colours, strict=True)]
    lost = sorted(set(range(config.layout.groups)) - {layer.group for layer in layers})
    if lost:
        tags.append(Tag("", f"never added, past the last layer: group {', '.join(map(str, lost))}"))
    return tags


def _png(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _harmless(value: Any) -> Any:
    """Text without controls of direction and the like: the browser would obey them."""
    return type(value)(printable(value)) if isinstance(value, str) else value


def _with_newlines(text: str) -> Markup:
    """The text with every line end made visible, since it is a token like any other."""
    return escape(text).replace("\n", Markup('<span class="newline">↵</span>\n'))
