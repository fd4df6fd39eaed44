"""A source of small made-up examples of every kind, some of them unusable. No jax: worker processes import this."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from deepstack_jax.data.example import Example, ExampleError, Message

SIZES_WH = ((20, 10), (9, 30), (16, 16), (40, 12), (7, 7))
WORDS = "ab cd efg hi j klm"


@dataclass(frozen=True)
class MadeExamples:
    """`count` examples: text only, one image, text only, two images, and so on, of many lengths.

    Args:
      count: rows.
      broken: rows whose last image has a header and no content, so that they can be measured and not decoded.
      refused: rows that the source itself cannot read.
      changed: rows that have other text than the same source has without this.
    """

    count: int
    broken: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"row {index} of {self.count}")
        if index in self.refused:
            raise ExampleError(f"row {index} is refused", f"made{index}")
        rng = np.random.default_rng(index)
        images = [draw(index + 100 * number) for number in range((0, 1, 0, 2)[index % 4])]
        if index in self.broken:
            images[-1] = images[-1][:60]
        question = "<image>\n" * len(images) + WORDS[: int(rng.integers(1, 8))]
        answer = WORDS[: int(rng.integers(1, 12))] + "!" * (index in self.changed)
        return Example(index, f"made{index}", tuple(images), (Message("human", question), Message("gpt", answer)))


def draw(seed: int) -> bytes:
    """A PNG of noise, of one of several shapes."""
    width, height = SIZES_WH[seed % len(SIZES_WH)]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def turns_of(conversations: list[dict[str, str]]) -> tuple[Message, ...]:
    """The messages of LLaVA's `conversations`, as they are there."""
    return tuple(Message(turn["from"], turn["value"]) for turn in conversations)
