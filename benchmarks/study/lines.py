"""Text lines of real receipts, and drawn ones to learn to read from, as files that the train verb takes.

  python -m benchmarks.study.lines --receipts=DIR --out=runs/study/lines-data

DIR of --receipts holds images/, boxes.json (image -> [x0, y0, x1, y1, text] of every piece of text) and val.json, whose images
are held out: no receipt is in both. An example is LINES lines that follow each other, cut out and brought to WIDTH x HEIGHT
pixels, and a turn for each, in random order: "line 2" -> its text. In the low-res view a letter has two pixels of width, in
the crops eight. Drawn examples have words of the training receipts in the fonts that matplotlib brings, of many sizes, with
noise. Everything is a function of --seed. What is there already is not written again.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deepstack_jax.atomic import write_whole

LINES = 3
WIDTH, HEIGHT = 256, 64
LONGEST = 32  # letters of a line; windows with a longer one are left out
MARGIN = 3  # pixels around a cut
TRAIN, HELD_OUT, DRAWN = "receipts.json", "held_out.json", "drawn.json"
FONTS = re.compile(r"(DejaVuSans(Mono|Display)?|DejaVuSerif|STIXGeneral)(-?Bold|-?Bol|-?Oblique|-?Italic)?\.ttf")


class Piece(NamedTuple):
    """Text with its place on a receipt, in pixels."""

    left: int
    top: int
    right: int
    bottom: int
    text: str


def main(arguments: Sequence[str] | None = None) -> int:
    usage, *_ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.lines", description=usage)
    parser.add_argument("--receipts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drawn", type=int, default=20_000, help="drawn examples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    try:
        write_data(asked.receipts, asked.out, asked.drawn, asked.seed)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; --receipts=DIR holds boxes.json, val.json, images/", file=sys.stderr)
        return 1
    return 0


def write_data(receipts: Path, out: Path, drawn: int, seed: int) -> None:
    """The three files and their pictures; what an earlier call finished stays."""
    boxes = {name: [Piece(*box) for box in found] for name, found in json.loads((receipts / "boxes.json").read_text()).items()}
    held = {Path(row["image"]).stem for row in json.loads((receipts / "val.json").read_text())}
    for file, wanted in ((TRAIN, boxes.keys() - held), (HELD_OUT, boxes.keys() & held)):
        if not (out / file).exists():
            rows = [row for name in sorted(wanted) for row in cut_receipt(receipts, name, boxes[name], out, seed)]
            # Shuffled once: the first rows that an evaluation asks are then of many receipts.
            order = np.random.default_rng((seed, len(rows))).permutation(len(rows))
            write_whole(out / file, json.dumps([rows[at] for at in order], indent=0))
    if not (out / DRAWN).exists():
        words = sorted({word for name in boxes.keys() - held for piece in boxes[name] for word in piece.text.split()})
        write_whole(out / DRAWN, json.dumps([draw(number, words, out, seed) for number in range(drawn)], indent=0))


def lines_of(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that stand beside each other as one line, from the top; a line's pieces from the left."""
    lines: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (piece.top + piece.bottom, piece.left)):
        middle = (piece.top + piece.bottom) / 2
        if lines and middle < max(other.bottom for other in lines[-1]) - (piece.bottom - piece.top) / 4:
            lines[-1].append(piece)
        else:
            lines.append([piece])
    return [sorted(line) for line in lines]


def cut_receipt(receipts: Path, name: str, pieces: Sequence[Piece], out: Path, seed: int) -> Iterator[dict]:
    """Every LINES lines that follow each other, each line in one example at most."""
    lines = lines_of(pieces)
    picture = None
    for first in range(0, len(lines) - LINES + 1, LINES):
        window = lines[first : first + LINES]
        texts = [" ".join(piece.text for piece in line) for line in window]
        if max(map(len, texts)) > LONGEST:
            continue
        picture = picture or Image.open(receipts / "images" / f"{name}.jpg").convert("L")
        pieces = list(itertools.chain(*window))
        edges = [
            min(p.left for p in pieces),
            min(p.top for p in pieces),
            max(p.right for p in pieces),
            max(p.bottom for p in pieces),
        ]
        cut = picture.crop((edges[0] - MARGIN, edges[1] - MARGIN, edges[2] + MARGIN, edges[3] + MARGIN))
        yield _row(f"{name}_{first}", cut.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), texts, out, "receipts", seed)


def draw(number: int, words: Sequence[str], out: Path, seed: int) -> dict:
    """Lines of random words, one font and size for all of them, dark on light, with noise."""
    rng = np.random.default_rng((seed, 1, number))
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = sorted(file for file in folder.iterdir() if FONTS.fullmatch(file.name))
    font = ImageFont.truetype(fonts[rng.integers(len(fonts))], int(rng.integers(16, 40)))
    texts = [_text(rng, words) for _ in range(LINES)]
    height = sum(font.getmetrics())
    step = int(height * rng.uniform(1.0, 1.3))
    width = max(int(font.getlength(text)) for text in texts)
    paper, ink = int(rng.integers(200, 256)), int(rng.integers(0, 110))
    page = Image.new("L", (width + 8, step * LINES + 8), paper)
    for at, text in enumerate(texts):
        left = int(rng.integers(0, max(1, width - int(font.getlength(text)) + 1)))
        ImageDraw.Draw(page).text((4 + left, 4 + at * step), text, fill=ink, font=font)
    page = page.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    noisy = np.asarray(page, float) + rng.normal(0, rng.uniform(0, 12), (HEIGHT, WIDTH))
    return _row(f"{number:06d}", Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), texts, out, "drawn", seed)


def _text(rng: np.random.Generator, words: Sequence[str]) -> str:
    """One to five words, as far as a line has room, digits changed at random so that prices are not learnt by heart."""
    chosen = ""
    for word in rng.choice(words, size=int(rng.integers(1, 6))):
        longer = f"{chosen} {word}".strip()
        chosen = longer if len(longer) <= LONGEST else chosen
    return re.sub(r"\d", lambda _: str(rng.integers(10)), chosen or words[0][:LONGEST])


def _row(name: str, picture: Image.Image, texts: Sequence[str], out: Path, folder: str, seed: int) -> dict:
    """A row of LLaVA JSON, its picture written beside."""
    file = f"{folder}/{name}.png"
    (out / folder).mkdir(parents=True, exist_ok=True)
    picture.save(out / file)
    order = np.random.default_rng((seed, 2, *name.encode())).permutation(len(texts)).tolist()
    turns = []
    for at in order:
        question = f"line {at + 1}" if turns else f"<image>\nline {at + 1}"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": texts[at]}]
    return {"id": name, "image": file, "conversations": turns}


if __name__ == "__main__":
    sys.exit(main())
