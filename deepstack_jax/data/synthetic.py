"""The demo's document-reading task: pages whose fine answers exist only in the high-res view, by construction.

A page is 4x4 boxes of 32x32 pixels. A box has one of four gray shades (coarse: visible at any resolution) and one digit
(fine). In style "checker" every 2x2 cell of a box, ink or paper, holds the same four gray values and differs only in their
arrangement, so the 2x2 area mean (PIL's `BOX` filter at half size: the low-res view) is exactly the shade everywhere in the
box, and a model that sees only that view answers the digit by chance. This is blind by design: it shows *that* the
high-res stack is read, not how much natural documents gain. Style "legible" is the control: the same boxes, digits and
questions with the digits drawn plainly at a size that survives the low-res view.
"""

import functools
import operator
from dataclasses import dataclass
from types import MappingProxyType
from typing import SupportsIndex

import numpy as np

from deepstack_jax.data.example import Example, Message

BOXES = 4  # along each side of the page: with the 64x64 low-res view and 16-pixel patches, one visual token per box
BOX_PIXELS = 32  # side of a box: 2x2 patches of the high-res view, one in each of the four 2d-sampled groups
PAGE_PIXELS = BOXES * BOX_PIXELS
CELL = 2  # side of a checker cell, the factor between page and low-res view; ink and paper differ only inside a cell
SHADES = (104, 120, 136, 152)  # gray value of each: near the middle, which leaves room for AMPLITUDE on both sides
# Half the contrast between the two gray levels of a box: as large as the darkest and brightest shade allow with a margin,
# since the texture is all that a patch embedding has to learn the digits from.
AMPLITUDE = 100
INK = 32  # how much darker than its shade that of a "legible" digit is: two shades apart, so that neither drowns the other
# Positions along each axis that a glyph may take within its area, one cell apart. With all eight that fit, the digits take
# more steps to learn than a demo has.
JITTER = 2
SHADE_WORDS = ("dark", "dim", "pale", "bright")
FINE_FRACTION = 0.7  # of the questions ask for a digit; the rest keep the coarse task, which every model can learn, in the mix
# Exact match of the best constant guess, by kind: digits and shades are uniform and independent of everything else.
CHANCE = MappingProxyType({"fine": 0.1, "coarse": 0.25})
STYLES = ("checker", "legible")
SPLITS = ("train", "validation")
# One word asks for one thing of one box: a question that has to be put together from two words needs a further layer.
QUESTION_WORDS = MappingProxyType({kind: tuple(f"{kind}?{box:02d}" for box in range(BOXES**2)) for kind in ("digit", "shade")})
# Every word of questions and answers; each is one token of a whitespace tokenizer.
VOCABULARY: tuple[str, ...] = (*map(str, range(10)), *SHADE_WORDS, *QUESTION_WORDS["digit"], *QUESTION_WORDS["shade"])

_FONT_ROWS = """
.###. ..#.. .###. ##### ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ...#. ..##. #.... .#... ....# #...# #...#
#..## ..#.. ....# ..#.. .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. ...#. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# .#... #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ...#.
.###. .###. ##### .###. ...#. .###. .###. .#... .###. .##..
"""

_DOTS = [[[dot == "#" for dot in glyph] for glyph in row.split()] for row in _FONT_ROWS.strip().split("\n")]

FONT = np.array(_DOTS).swapaxes(0, 1)  # bool[10, 7, 5]: the usual 5x7 matrix digits; FONT[d, y, x] is ink


@dataclass(frozen=True)
class DocumentPages:
    """Random-access source of pages, each a pure function of (seed, split, index); ValueError for arguments out of range."""

    seed: int  # non-negative; names the family of pages
    length: int  # number of pages; any size, nothing is stored
    style: str = "checker"  # digits invisible in the low-res view, or "legible" (the control, same texts)
    questions: int = 12  # question-answer turns a page, 1..16
    split: str = "train"  # or "validation"; hashed into the random stream, so the two share no stream and no page

    def __post_init__(self) -> None:
        for name, choices in (("style", STYLES), ("split", SPLITS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        for name, low, high in (("seed", 0, None), ("length", 1, None), ("questions", 1, BOXES**2)):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                expected = f"{low}..{high}" if high is not None else f"at least {low}"
                raise ValueError(f"{name} is {value}, expected {expected}")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Page `index` with its questions.

        Returns:
          An `Example` with one image `u8[128, 128, 3]`. `info` holds "kinds" ("fine" or "coarse" per question) and
          `i64[4, 4]` arrays over (box row, box column): "digits" 0..9, "shades" 0..3, and "corners" 0..3, the 16x16
          quadrant (row-major) the digit is in, or -1 where it fills the box ("legible").
        """
        index = operator.index(index)
        if not 0 <= index < self.length:
            raise IndexError(f"page {index} is outside 0..{self.length - 1}")
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, *self.split.encode()), spawn_key=(index,)))
        digits = rng.integers(10, size=BOXES**2)
        shades = rng.integers(len(SHADES), size=BOXES**2)
        messages, kinds = self._conversation(rng, digits, shades)
        # Drawn last: the two styles have different numbers of places, yet the same digits, shades and questions.
        _, corners = digit_tiles(self.style)
        places = rng.integers(len(corners), size=BOXES**2)
        grid = (BOXES, BOXES)
        return Example(
            index=index,
            name=f"page_{self.split}_{self.seed}_{index}",
            images=(draw_page(self.style, digits, shades, places),),
            messages=messages,
            info={"kinds": kinds}
            | {"digits": digits.reshape(grid), "shades": shades.reshape(grid), "corners": corners[places].reshape(grid)},
        )

    def _conversation(
        self, rng: np.random.Generator, digits: np.ndarray, shades: np.ndarray
    ) -> tuple[tuple[Message, ...], tuple[str, ...]]:
        """Question-answer turns over boxes that do not repeat within a kind; `<image>` opens the first question."""
        fine = rng.random(self.questions) < FINE_FRACTION
        boxes = np.where(fine, rng.permutation(BOXES**2)[: self.questions], rng.permutation(BOXES**2)[: self.questions])
        messages: list[Message] = []
        for is_fine, box in zip(fine.tolist(), boxes.tolist(), strict=True):
            question = QUESTION_WORDS["digit" if is_fine else "shade"][box]
            answer = str(digits[box]) if is_fine else SHADE_WORDS[shades[box]]
            messages += [Message("human", question if messages else f"<image>\n{question}"), Message("gpt", answer)]
        return tuple(messages), tuple("fine" if is_fine else "coarse" for is_fine in fine.tolist())


def draw_page(style: str, digits: np.ndarray, shades: np.ndarray, places: np.ndarray) -> np.ndarray:  # u8[128, 128, 3]
    """A gray RGB page from per-box numbers, row-major `int[16]`: digits 0..9, shades 0..3, places of `digit_tiles(style)`."""
    tiles, _ = digit_tiles(style)
    boxes = np.asarray(SHADES, np.int16)[shades][:, None, None] + tiles[digits, places]
    page = boxes.reshape(BOXES, BOXES, BOX_PIXELS, BOX_PIXELS).swapaxes(1, 2).reshape(PAGE_PIXELS, PAGE_PIXELS)
    return np.repeat(page.astype(np.uint8)[:, :, None], 3, axis=2)


@functools.cache
def digit_tiles(style: str) -> tuple[np.ndarray, np.ndarray]:
    """What each digit at each place adds to the shade of its box; rendered once per process.

    In "checker", ink cells hold [[+A, -A], [-A, +A]] and paper cells the opposite phase: every cell, row pair and column
    pair sums to zero, so an area filter gives the shade exactly whichever axis it takes first. In "legible",
    ink is INK darker than the shade and paper the shade itself, so that both questions can be answered from the low-res view.

    Returns:
      `(tiles i16[10, N, 32, 32], corners i64[N])`: N places; the quadrant of each, or -1 in "legible".
    """
    cells = BOX_PIXELS // CELL
    if style == "checker":
        dots, area, areas = FONT, cells // 2, [(y, x) for y in (0, cells // 2) for x in (0, cells // 2)]
    else:
        dots, area, areas = FONT.repeat(2, axis=1).repeat(2, axis=2), cells, [(0, 0)]
    _, height, width = dots.shape
    jitters = [(y, x) for y in range(min(JITTER, area - height + 1)) for x in range(min(JITTER, area - width + 1))]
    paper = -1 if style == "checker" else 0
    sign = np.full((10, len(areas) * len(jitters), cells, cells), paper)
    for place, (y, x) in enumerate((top + dy, left + dx) for top, left in areas for dy, dx in jitters):
        sign[:, place, y : y + height, x : x + width] = np.where(dots, 1, paper)
    phase = np.array([[1, -1], [-1, 1]]) if style == "checker" else -np.ones((CELL, CELL), int)
    tiles = np.kron(sign, phase) * (AMPLITUDE if style == "checker" else INK)
    corners = np.arange(len(areas)).repeat(len(jitters)) if style == "checker" else np.full(len(jitters), -1)
    tiles = tiles.astype(np.int16)
    tiles.flags.writeable = False
    corners.flags.writeable = False
    return tiles, corners
