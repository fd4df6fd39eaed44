"""Encoded examples into the rows of a Batch: the one place where text, visual tokens and crop slots are lined up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deepstack_jax.batch import Batch, BatchShape, check_batch, empty_batch
from deepstack_jax.config import DataSpec
from deepstack_jax.data.encode.labels import IMAGE_TOKEN
from deepstack_jax.data.example import BadExample
from deepstack_jax.layout.sequence import VisualLayout


class ExampleSize(NamedTuple):
    """What an example takes of a row."""

    tokens: int = 0  # sequence positions, visual tokens included
    crops: int = 0  # crop slots
    visual: int = 0  # visual tokens


@dataclass(frozen=True)
class EncodedExample:
    """One example, tokenised and cut into crops, not yet placed."""

    index: int  # record of the source
    ids: np.ndarray  # i32[n], IMAGE_TOKEN where an image is
    supervised: np.ndarray  # bool[n], tokens that the loss asks for
    pixels: tuple[np.ndarray, ...]  # per image: u8[views, y, x, 3]
    layouts: tuple[VisualLayout, ...]  # per image
    remarks: tuple[str, ...] = ()  # `encoder.REMARKS` that hold, one for each image or text

    @property
    def length(self) -> int:
        """Sequence positions after the images are expanded."""
        return self.ids.size + sum(layout.tokens.size - 1 for layout in self.layouts)

    @property
    def size(self) -> ExampleSize:
        """What it takes of a row."""
        views, visual = (layout.views for layout in self.layouts), (layout.tokens.size for layout in self.layouts)
        return ExampleSize(self.length, sum(views), sum(visual))


class Cursor(NamedTuple):
    """What is used of a row so far."""

    token: int = 0
    crop: int = 0
    visual: int = 0
    segment: int = 0

    def after(self, size: ExampleSize) -> Cursor:
        """The cursor after an example of this size."""
        return Cursor(self.token + size.tokens, self.crop + size.crops, self.visual + size.visual, self.segment + 1)


def place_example(batch: Batch, row: int, example: EncodedExample, cursor: Cursor, patches: int) -> Cursor:
    """Write one example into `batch` (in place) at the cursor, as a segment of its own; returns the cursor after it.

    ValueError where placeholders and images differ in number, or it does not fit into what is left of the row: going on would
    shift every later image of the row onto wrong text.
    """
    slots = np.flatnonzero(example.ids == IMAGE_TOKEN)
    if slots.size != len(example.layouts):
        raise ValueError(f"{slots.size} image placeholders but {len(example.layouts)} images")
    views, expected = [len(pixels) for pixels in example.pixels], [layout.views for layout in example.layouts]
    if views != expected:
        raise ValueError(f"the images have {views} views, their layouts {expected}")
    if groups := {layout.stack.shape[0] for layout in example.layouts} - {batch.stack_source.shape[1]}:
        raise ValueError(f"layouts have {groups} groups, the batch has room for {batch.stack_source.shape[1]}")
    needs = Cursor(*example.size, 1)
    room = (batch.tokens.shape[1], batch.pixels.shape[1], batch.token_source.shape[1], batch.example_id.shape[1])
    for name, used, need, size in zip(("tokens", "crop slots", "visual tokens", "examples"), cursor, needs, room, strict=True):
        if used + need > size:
            raise ValueError(f"{need} {name} do not fit: {used} of {size} are used")

    tokens, supervised, index = _expand(example, slots, cursor.visual)
    span = slice(cursor.token, cursor.token + needs.token)
    batch.tokens[row, span] = tokens
    batch.targets[row, span][:-1] = tokens[1:]
    batch.loss_weights[row, span][:-1] = supervised[1:]
    batch.positions[row, span] = np.arange(needs.token)
    batch.segment_ids[row, span] = cursor.segment + 1
    batch.visual_index[row, span] = index
    batch.example_id[row, cursor.segment] = example.index

    crop, place = cursor.crop, cursor.visual
    for pixels, layout in zip(example.pixels, example.layouts, strict=True):
        placed = layout.place(crop, patches)
        batch.pixels[row, crop : crop + layout.views] = pixels
        batch.token_source[row, place : place + layout.tokens.size] = placed.tokens
        batch.stack_source[row, :, place : place + layout.tokens.size] = placed.stack
        crop, place = crop + layout.views, place + layout.tokens.size
    return cursor.after(example.size)


def _expand(example: EncodedExample, slots: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens i32[n], supervised bool[n] and visual_index i32[n] with every placeholder replaced by its visual tokens."""
    tokens, supervised, index, start = [], [], [], 0
    for slot, layout in zip(slots, example.layouts, strict=True):
        visual = layout.tokens.size
        tokens += [example.ids[start:slot], np.zeros(visual, np.int32)]
        supervised += [example.supervised[start:slot], np.zeros(visual, bool)]
        index += [np.full(slot - start, -1, np.int32), np.arange(first, first + visual, dtype=np.int32)]
        start, first = slot + 1, first + visual
    tokens.append(example.ids[start:])
    supervised.append(example.supervised[start:])
    index.append(np.full(example.ids.size - start, -1, np.int32))
    return np.concatenate(tokens), np.concatenate(supervised), np.concatenate(index)


class HostBatch(NamedTuple):
    """This host's part of a batch, and what was left blank in it."""

    batch: Batch
    bad: tuple[BadExample, ...]
    examples: int  # that were due in this part, bad ones included
    remarks: tuple[tuple[int, tuple[str, ...]], ...] = ()  # record of the source, and what was done to it (`encoder.REMARKS`)


def collate(examples: Sequence[EncodedExample | BadExample], spec: DataSpec, longest: int | None = None) -> HostBatch:
    """One example per row, right padded to a bucket; the place of a bad one stays blank, with its id on record.

    `longest` is of the examples of all hosts; None = that of `examples`.
    """
    if longest is None:
        longest = max((example.length for example in examples if isinstance(example, EncodedExample)), default=0)
    rows = [[(example, ExampleSize())] for example in examples]
    return fill(spec.padded_shape(len(rows), spec.padded_length(longest)), rows, spec.layout.patches)


def fill(
    shape: BatchShape, rows: Sequence[Sequence[tuple[EncodedExample | BadExample, ExampleSize]]], patches: int
) -> HostBatch:
    """A batch with every row's examples one after the other; where a bad one was due, room of the given size stays blank."""
    batch = empty_batch(shape)
    bad, remarks = [], []
    for row, examples in enumerate(rows):
        cursor = Cursor()
        for example, room in examples:
            if isinstance(example, BadExample):
                batch.example_id[row, cursor.segment] = example.index  # it stays on record, nothing of it is trained on
                bad.append(example)
                cursor = cursor.after(room)
            else:
                cursor = place_example(batch, row, example, cursor, patches)
                if example.remarks:
                    remarks.append((example.index, example.remarks))
    check_batch(batch, patches)
    return HostBatch(batch, tuple(bad), sum(map(len, rows)), tuple(remarks))
