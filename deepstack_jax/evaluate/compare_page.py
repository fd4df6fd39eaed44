"""The page of a comparison: one HTML file without a reference to anything outside it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from deepstack_jax import __version__
from deepstack_jax.evaluate.compare import CONFIDENCE, RESAMPLES, Comparison, Pair, names_of
from deepstack_jax.evaluate.pictures import Pictures
from deepstack_jax.evaluate.results import in_words
from deepstack_jax.printing import printable

SAMPLES = 200  # per task: the page has their pictures inside
SIDE, PICTURES = 384, 4  # pixels of a picture's longest side; pictures of a sample


class Sample(NamedTuple):
    """A question on which they differ, as the page has it."""

    pair: Pair
    better: str  # "a", "b", "same", or "" where one score is higher and another lower
    pictures: list[str]


class Section(NamedTuple):
    """A task of the page."""

    comparison: Comparison
    samples: list[Sample]
    differing: int  # of which `samples` are the first
    protocol: str


def render_page(found: Sequence[Comparison], pictures: Mapping[str, Pictures]) -> str:
    """The page as HTML; `pictures` by task, where its rows are at hand."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deepstack_jax.evaluate"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: type(value)(printable(value)) if isinstance(value, str) else value,
    )
    return environment.get_template("compare.html.j2").render(
        names=names_of(found[0]),
        sections=[make_section(comparison, pictures.get(comparison.title)) for comparison in found],
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        version=__version__,
    )


def make_section(comparison: Comparison, pictures: Pictures | None) -> Section:
    """The samples on which a task's two evaluations differ most, in the order of the rows among equals."""
    differing = sorted((pair for pair in comparison.pairs if pair.differs), key=lambda pair: -max(map(abs, _gains(pair))))
    shown = [Sample(pair, _better(pair), pictures(pair.first["row"]) if pictures else []) for pair in differing[:SAMPLES]]
    protocol: dict[str, Any] = comparison.first.results.get("protocol", {})
    return Section(comparison, shown, len(differing), in_words(protocol))


def _gains(pair: Pair) -> list[float]:
    return [pair.gain(name) for name in pair.first["scores"] if name in pair.second["scores"]] or [0.0]


def _better(pair: Pair) -> str:
    gains = _gains(pair)
    if not any(gains):
        return "same"
    if min(gains) < 0 < max(gains):
        return ""
    return "b" if max(gains) > 0 else "a"
