"""How large the models and batches of the check are: those of a GPU, and tiny ones that go the same ways on a CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Of the step that is measured, and of decoding.

    Attributes:
      words: of `configs/llava15.py`.
      rows, length: of the packed batch.
      string: rows and length where all 2880 visual tokens of an image are in the sequence.
      layers: most layers of the decoder; as many as fit, where the memory is known.
      repeats: steps that are timed.
      decode_layers: of the decoder that decodes.
      prompt, new: tokens of a prompt, with its image, and of an answer.
      batches: of decoding.
      square: side of the plain product.
    """

    name: str
    words: str
    rows: int
    length: int
    string: tuple[int, int]
    layers: int
    repeats: int
    decode_layers: int
    prompt: int
    new: int
    batches: tuple[int, ...]
    square: int


SIZES = {
    size.name: size
    for size in (
        Size("full", "finetune", 8, 2048, (3, 6400), 32, 12, 32, 640, 128, (1, 8, 64), 8192),
        Size("tiny", "finetune,tiny", 2, 128, (1, 448), 5, 3, 5, 48, 8, (1, 2), 64),
    )
}
