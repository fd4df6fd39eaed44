"""The laboratory's task: cards on which something coarse, visible at any resolution, must be bound to something fine.

A card is 3x3 boxes. Each box is one token of the low-res view and `rows x cols` tokens of the crops, where (rows, cols) is the
card's crop grid. A box has a colour, its *mark*, in which no other box of the card is: visible in every view, and so is
which half of it is darker. One of its patches, drawn at random, holds a digit, drawn in cells whose area mean is exactly that
of the paper: digits exist in the crops alone.

Four kinds of questions, each of one word, ask for one box each:
  coarse  which side is dark in the box of this mark? The low-res view answers.
  fine    which digit has the box at this place? The crops answer, addressed by position.
  cued    which digit has the box of this mark? The crops answer, addressed by what the low-res view shows.
  before  which digit has the box before, in reading order, the box of this mark? Needs a second step of attention
          after the digit was injected.
No box is asked for twice, so that no answer tells another.
"""

import itertools
import operator
from dataclasses import dataclass
from types import MappingProxyType
from typing import SupportsIndex

import numpy as np

from deepstack_jax.data.example import Example, Message
from deepstack_jax.data.synthetic import FONT, SPLITS
from deepstack_jax.layout.grid import Grid

SIDE = 3  # boxes along a side of the card, and tokens along one of the low-res view
BOXES = SIDE**2
PATCH = 16  # side of a patch in pixels, of which the low-res view has SIDE along each side
CELL = 2  # side of a cell in pixels; the area mean of a cell, of its rows and of its columns is that of paper
AMPLITUDE = 48  # half the contrast within a cell; what is left of the range of a pixel is the marks'
GLYPH = (0, 1)  # first row and column of the 7x5 digit among the patch's 8x8 cells: always the same, or the tower learns longer
# i64[9, 3], a colour each: the corners of a cube around gray, and gray. Far apart, and room for AMPLITUDE on both sides
MARKS = np.array([*itertools.product((80, 200), repeat=3), (140, 140, 140)])
DARKER = 28  # how much darker than the rest one half of a box is
SIDES = ("top", "bottom", "left", "right")
KINDS = MappingProxyType({"coarse": 0.2, "fine": 0.25, "cued": 0.3, "before": 0.25})  # the share of each of the questions
# Exact match of the best constant guess: digits and sides are uniform.
CHANCE = MappingProxyType({"coarse": 0.25, "fine": 0.1, "cued": 0.1, "before": 0.1})
QUESTION_WORDS = MappingProxyType({kind: tuple(f"{kind}?{number}" for number in range(BOXES)) for kind in KINDS})
# Every word of questions and answers; each is one token of a whitespace tokenizer.
VOCABULARY: tuple[str, ...] = (
    *map(str, range(10)),
    *SIDES,
    *(word for words in QUESTION_WORDS.values() for word in words),
)


@dataclass(frozen=True)
class Cards:
    """Random-access source of cards, each a pure function of (seed, split, index); ValueError for arguments out of range."""

    seed: int  # non-negative; names the family of cards
    length: int  # number of cards; any size, nothing is stored
    questions: int = BOXES  # question-answer turns a card, 1..9
    grids: tuple[Grid, ...] = ((2, 2),)  # crop grids, one of which each card has the shape of
    unseen: tuple[Grid, ...] = ()  # further ones, of held-out cards alone: their kinds end in "_unseen"
    sharp: bool = True  # False: what the low-res view shows, enlarged to the size of the card
    split: str = "train"  # or "validation"; hashed into the random stream, so the two share no stream and no card

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}, expected one of {', '.join(SPLITS)}")
        if self.seed < 0 or self.length < 1 or not 1 <= self.questions <= BOXES:
            raise ValueError(
                f"seed {self.seed}, length {self.length}, questions {self.questions}: expected 0 on, 1 on, 1..{BOXES}"
            )
        for rows, cols in (*self.grids, *self.unseen):
            if min(rows, cols) < 1 or (rows % CELL and cols % CELL):
                raise ValueError(f"grid {rows}x{cols} must have an even side: otherwise digits show in the low-res view")
        if not self.grids:
            raise ValueError("no grids: name at least one, as ((2, 2),)")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Card `index` with its questions.

        Returns:
          An `Example` with one image `u8[48 * rows, 48 * cols, 3]`. `info` holds "kinds" per question, "grid", and by box, in
          reading order, `i64[9]` "digits" 0..9, "marks" 0..8, "sides" 0..3 and "places", the patch with the digit, row-major.
        """
        index = operator.index(index)
        if not 0 <= index < self.length:
            raise IndexError(f"card {index} is outside 0..{self.length - 1}")
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, *self.split.encode()), spawn_key=(index,)))
        digits, marks, sides = rng.integers(10, size=BOXES), rng.permutation(BOXES), rng.integers(len(SIDES), size=BOXES)
        messages, kinds = self._conversation(rng, digits, marks, sides)
        # Drawn last, so that cards of other shapes ask the same questions.
        shapes = (*self.grids, *(self.unseen if self.split == "validation" else ()))
        shape = int(rng.integers(len(shapes)))
        rows, cols = shapes[shape]
        places = rng.integers(rows * cols, size=BOXES)
        if shape >= len(self.grids):
            kinds = tuple(f"{kind}_unseen" for kind in kinds)
        return Example(
            index=index,
            name=f"card_{self.split}_{self.seed}_{index}",
            images=(draw_card((rows, cols), digits, marks, sides, places, self.sharp),),
            messages=messages,
            info={"kinds": kinds, "grid": (rows, cols), "digits": digits, "marks": marks, "sides": sides, "places": places},
        )

    def _conversation(
        self, rng: np.random.Generator, digits: np.ndarray, marks: np.ndarray, sides: np.ndarray
    ) -> tuple[tuple[Message, ...], tuple[str, ...]]:
        """Question-answer turns over boxes that do not repeat; `<image>` opens the first question."""
        boxes = rng.permutation(BOXES)[: self.questions].tolist()
        kinds = rng.choice(list(KINDS), size=self.questions, p=list(KINDS.values())).tolist()
        kinds = ["cued" if kind == "before" and box == BOXES - 1 else kind for kind, box in zip(kinds, boxes, strict=True)]
        messages: list[Message] = []
        for kind, box in zip(kinds, boxes, strict=True):
            named = {"fine": box, "coarse": marks[box], "cued": marks[box], "before": marks[min(box + 1, BOXES - 1)]}[kind]
            question = QUESTION_WORDS[kind][named]
            answer = SIDES[sides[box]] if kind == "coarse" else str(digits[box])
            messages += [Message("human", question if messages else f"<image>\n{question}"), Message("gpt", answer)]
        return tuple(messages), tuple(kinds)


def draw_card(
    grid: Grid, digits: np.ndarray, marks: np.ndarray, sides: np.ndarray, places: np.ndarray, sharp: bool
) -> np.ndarray:  # u8[48 * rows, 48 * cols, 3]
    """A card from per-box numbers, `int[9]`: digits 0..9, marks 0..8, sides 0..3, places 0..rows*cols-1."""
    rows, cols = grid
    ink = np.zeros((BOXES, rows * cols, PATCH // CELL, PATCH // CELL), bool)
    _, height, width = FONT.shape
    top, left = GLYPH
    ink[np.arange(BOXES), places, top : top + height, left : left + width] = FONT[digits]
    sign = np.where(ink, 1, -1) * sharp
    texture = np.kron(sign, np.array([[1, -1], [-1, 1]])) * AMPLITUDE  # [box, patch, y, x]
    texture = texture.reshape(SIDE, SIDE, rows, cols, PATCH, PATCH).transpose(0, 2, 4, 1, 3, 5)
    texture = texture.reshape(SIDE * rows * PATCH, SIDE * cols * PATCH, 1)
    y, x = np.indices((rows * PATCH, cols * PATCH))
    halves = np.stack([y < rows * PATCH // 2, y >= rows * PATCH // 2, x < cols * PATCH // 2, x >= cols * PATCH // 2])
    boxes = MARKS[marks][:, None, None] - DARKER * halves[sides][..., None]  # [box, y, x, 3]
    paper = boxes.reshape(SIDE, SIDE, rows * PATCH, cols * PATCH, 3).transpose(0, 2, 1, 3, 4)
    paper = paper.reshape(SIDE * rows * PATCH, SIDE * cols * PATCH, 3)
    return (paper + texture).astype(np.uint8)
