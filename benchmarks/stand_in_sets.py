"""Small data sets as files, in the place of the published ones: LLaVA JSON and JPEGs, in every folder that a mixture names.

They carry a recipe through its whole path where nothing was downloaded. Every picture shows a number on a coloured ground,
which its conversation asks for; the shapes differ, so that grids do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from deepstack_jax.config import SetConfig

SHAPES_WH = ((96, 96), (140, 70), (60, 150), (120, 90), (90, 120))
COLOURS = {"red": (190, 40, 40), "green": (40, 140, 60), "blue": (50, 70, 190), "gray": (110, 110, 110)}
TEXT = "<text>"  # what a mixture calls the rows without an image


def write_sets(root: Path, sets: Mapping[str, SetConfig], rows: int) -> None:
    """Write all files of a mixture: `rows` rows in all, and at least one for every folder that a set takes images from.

    Raises:
      ValueError: a set is not a JSON file.
    """
    by_file: dict[str, list[dict]] = {}
    for name, entry in sets.items():
        if not entry.file.endswith(".json"):
            raise ValueError(f"set {name}: {entry.file} is not a .json file, and others are not written here")
        places = entry.keep_images or (f"{name}/",)
        for number in range(max(len(places), rows // len(sets))):
            image = places[number % len(places)]
            by_file.setdefault(entry.file, []).append(_row(root / entry.images, f"{name}{number}", image))
    for file, written in by_file.items():
        _write(root / file, written)


def write_file(file: Path, images: Path, rows: int) -> None:
    """Write one JSON file whose pictures lie in `images`, of other numbers than those of `write_sets`."""
    _write(file, [_row(images, f"{file.stem}{number}", "") for number in range(rows)])


def _write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1))


def _row(images: Path, name: str, folder: str) -> dict:
    """One exchange, as the template `plain` needs it; the picture's path begins with `folder`."""
    rng = np.random.default_rng([ord(letter) for letter in name])
    number, colour = int(rng.integers(10, 100)), str(rng.choice(list(COLOURS)))
    if folder == TEXT:
        return {"id": name, "conversations": _turns(f"What follows {number}?", str(number + 1))}
    picture = images / f"{folder}{name}.jpg"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(number, colour, SHAPES_WH[int(rng.integers(len(SHAPES_WH)))]).save(picture, quality=90)
    turns = _turns("<image>\nWhich number, on which ground?", f"{number} on {colour}")
    return {"id": name, "image": f"{folder}{name}.jpg", "conversations": turns}


def _turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def draw(number: int, colour: str, size_wh: tuple[int, int]) -> Image.Image:
    """A two-digit number in white, in the middle of a ground of one of `COLOURS`."""
    page = Image.new("RGB", size_wh, COLOURS[colour])
    width, height = size_wh
    ImageDraw.Draw(page).text((width // 2, height // 2), str(number), fill="white", anchor="mm", font_size=min(size_wh) // 2)
    return page
