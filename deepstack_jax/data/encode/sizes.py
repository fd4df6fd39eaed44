"""How much of a row an example takes, known from its text and the headers of its images: nothing is decoded."""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from deepstack_jax.config import DataSpec
from deepstack_jax.data.encode.batch_rows import ExampleSize
from deepstack_jax.data.encode.encoder import Encoder
from deepstack_jax.data.encode.image import image_grid
from deepstack_jax.data.encode.labels import EncodedText
from deepstack_jax.data.encode.tokenizer import open_tokenizer
from deepstack_jax.data.example import Example
from deepstack_jax.data.formats.image_files import image_size
from deepstack_jax.errors import ConfigError
from deepstack_jax.layout.grid import Grid
from deepstack_jax.layout.sequence import VisualLayout


def measure(example: Example, encoder: Encoder) -> ExampleSize:
    """The size of `encoder.encode(example)`, images known by their headers only; raises ValueError as that does."""
    text = encoder.text(example)
    return fit_text(example, encoder, text, [image_size(source, encoder.spec.data) for source in example.images])[2]


def fit_text(
    example: Example, encoder: Encoder, text: EncodedText, sizes: Sequence[tuple[int, int]]
) -> tuple[EncodedText, list[Grid | None], ExampleSize]:
    """What a row has room for of an example's text, beside images of these (width, height); their grids, and the whole size."""
    layout, grids = encoder.spec.layout, [image_grid(size, encoder.spec.image) for size in sizes]
    visual = [layout.token_count(grid, size) for grid, size in zip(grids, sizes, strict=True)]
    text = encoder.fit(example, text, visual)
    return text, grids, ExampleSize(text.ids.size - len(visual) + sum(visual), sum(map(layout.views, grids)), sum(visual))


def header_layouts(example: Example, spec: DataSpec) -> list[VisualLayout]:
    """The layout of every image, known by its header; ImageError where one has none."""
    sizes = [image_size(source, spec.data) for source in example.images]
    return [spec.layout.layout(image_grid(size, spec.image), size) for size in sizes]


def encoded_tokens(example: Example, spec: DataSpec) -> int:
    """Distinct encoded tokens that an example gives the model, in the sequence or injected."""
    sources = [np.append(layout.tokens, layout.stack) for layout in header_layouts(example, spec)]
    return sum(np.unique(source[source >= 0]).size for source in sources)


def example_check(spec: DataSpec) -> tuple[Callable[[Example], object], dict[str, Any]]:
    """The checks that every example must pass, as in a run, and the settings that this depends on.

    Where the tokenizer is not on this machine, a warning says that lengths are not looked at.
    """
    data, encoder = spec.data, Encoder(spec)
    asked: dict[str, Any] = {f"config.data.{key}": getattr(data, key) for key in ("template", "max_images", "max_pixels")}
    try:
        open_tokenizer(spec)
    except ConfigError as error:
        warnings.warn(f"the lengths of examples are not checked: {error}", stacklevel=1)
        return encoder.rendered, asked
    asked |= {f"config.data.{key}": getattr(data, key) for key in ("max_length", "overlong")}
    asked["tokens"] = [os.path.basename(data.tokenizer.rstrip("/")), spec.layout.max_tokens]
    return partial(measure, encoder=encoder), asked
