"""One example as the model gets it: read back from the batch that the pipeline makes of it, never computed a second time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from deepstack_jax.config import Config
from deepstack_jax.data.encode.batch_rows import collate
from deepstack_jax.data.encode.encoder import Encoder, OverlongError, try_record
from deepstack_jax.data.encode.image import image_grid
from deepstack_jax.data.example import BadExample, Example, ExampleError, Source
from deepstack_jax.data.formats.image_files import image_size
from deepstack_jax.layout.grid import Grid

Made = TypeVar("Made")


class Layer(NamedTuple):
    """A layer at whose input a group of the stack is added."""

    kind: str  # "layer" of the decoder | "vision layer" of the tower (DeepStack-V) | "part" of what the projector takes
    number: int  # from 0
    group: int
    state: int | None = None  # the tower's hidden state that the group is made of, where it is a tap

    @property
    def name(self) -> str:
        return f"{self.kind} {self.number}"

    @property
    def source(self) -> str:
        """What is added there."""
        return f"group {self.group}" + ("" if self.state is None else f", tap of hidden state {self.state}")


def injecting_layers(config: Config) -> tuple[Layer, ...]:
    """The layers that get a group, in order; none for a baseline."""
    stack, groups = config.deepstack, config.layout.groups
    if stack.into == "input":
        return tuple(Layer("layer", 0, group) for group in range(groups))
    if stack.into == "channels":
        return tuple(Layer("part", 1 + group, group) for group in range(groups))
    schedule = stack.tower_schedule(config.vision, groups) or stack.decoder_schedule(config.decoder.layers, groups)
    kind = "vision layer" if stack.into == "vision" else "layer"
    states = dict(enumerate((state for state, _ in stack.taps), groups - len(stack.taps)))
    return tuple(Layer(kind, number, group, states.get(group)) for number, group in enumerate(schedule) if group >= 0)


@dataclass(frozen=True)
class ImageInput:
    """One image's part of a batch row. Encoded tokens count from its first view: view * P + token."""

    size_wh: tuple[int, int]  # (width, height) of the original in pixels
    grid: Grid | None  # (rows, cols) of its crops; None without crops
    pixels: np.ndarray  # u8[views, S, S, 3]
    tokens: np.ndarray  # i32[m] the encoded token at every sequence position of the image, or a sentinel below 0
    stack: np.ndarray  # i32[J, m] the encoded token of every group that is added there, or a sentinel

    def uses(self, layers: Sequence[Layer], patches: int) -> tuple[np.ndarray, np.ndarray]:
        """What becomes of every encoded token: bool[views, P] whether it is in the sequence, and bool[K, views, P] at which
        of K layers it is added.
        """
        used = np.zeros((1 + len(layers), len(self.pixels) * patches), bool)
        for row, source in zip(used, [self.tokens, *(self.stack[layer.group] for layer in layers)], strict=True):
            row[source[source >= 0]] = True
        used = used.reshape(len(used), -1, patches)
        return used[0], used[1:]


@dataclass(frozen=True)
class ModelInput:
    """One example's row of a batch, without its padding."""

    example: Example  # what the source gave
    tokens: np.ndarray  # i32[n] token ids; meaningless where an image is
    supervised: np.ndarray  # bool[n] tokens that the loss asks for
    image_of: np.ndarray  # i64[n] number of the image that a token belongs to, -1 for text
    images: tuple[ImageInput, ...]  # in the order of the sequence
    row_length: int  # positions of the row, padding included
    cut: int  # tokens at the end of its text that the row had no room for (`config.data.overlong` "cut")


def use_row(source: Source, index: int, use: Callable[[Example], Made]) -> Made | BadExample:
    """What `use` makes of row `index`, or why a run could not use it.

    Raises:
      SourceError: the source as a whole cannot be read.
    """

    def judged(example: Example) -> Made:
        try:
            return use(example)
        except OverlongError as error:
            raise ExampleError(f"{error}; the run would stop here", example.name) from error

    return try_record(source, index, judged)


def model_input(source: Source, index: int, config: Config) -> ModelInput | BadExample:
    """Row `index` of a source as a batch holds it, or why a run could not use it; raises as `use_row`."""
    return use_row(source, index, partial(_read_back, config=config))


def _read_back(example: Example, config: Config) -> ModelInput:
    encoder = Encoder(config.data_spec)
    encoded = encoder.encode(example)
    batch, patches = collate([encoded], config.data_spec).batch, config.layout.patches
    length = int((batch.segment_ids[0] > 0).sum())
    visual = batch.visual_index[0, :length]
    visual_ends = np.cumsum([layout.tokens.size for layout in encoded.layouts], dtype=np.int64)
    view_ends = np.cumsum([layout.views for layout in encoded.layouts], dtype=np.int64)
    images = []
    for picture, views, places in zip(example.images, _spans(view_ends), _spans(visual_ends), strict=True):
        shift, size_wh = views.start * patches, image_size(picture, config.data)
        tokens, stack = (
            np.where(source >= 0, source - shift, source)
            for source in (batch.token_source[0, places], batch.stack_source[0, :, places])
        )
        images.append(ImageInput(size_wh, image_grid(size_wh, config.image), batch.pixels[0, views], tokens, stack))
    return ModelInput(
        example=example,
        tokens=batch.tokens[0, :length],
        supervised=np.concatenate([[False], batch.loss_weights[0, : length - 1] > 0]),  # the weight is one before its token
        image_of=np.where(visual >= 0, np.searchsorted(visual_ends, visual, side="right"), -1),
        images=tuple(images),
        row_length=batch.tokens.shape[1],
        cut=encoder.text(example).ids.size - encoded.ids.size,
    )


def _spans(ends: np.ndarray) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *ends.tolist()])]
