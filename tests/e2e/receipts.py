"""Receipt-like JPEGs and their LLaVA JSON, drawn for the tests: lines of text on tall, narrow paper of several shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ((300, 640), (240, 720), (420, 480))  # (width, height) in pixels: grids of 2x2, 3x1 and 2x2 crops and more


def draw_receipts(root: Path, train: int, validation: int) -> Path:
    """Write train.json, val.json (one row per line) and images/ into `root`, ids train0, ..., val0, ...; returns `root`.

    The receipt of every second row for validation comes with the second question.
    """
    (root / "images").mkdir(parents=True)
    for split, count in (("train", train), ("val", validation)):
        rows = []
        for number in range(count):
            name = f"{split}{number}"
            lines = _lines(name)
            _draw(lines, SHAPES[number % len(SHAPES)]).save(root / "images" / f"{name}.jpg", quality=80)
            turns = [
                {"from": "human", "value": "<image>\nTranscribe this receipt."},
                {"from": "gpt", "value": "\n".join(lines)},
            ]
            if split == "val" and number % 2:
                turns[:0] = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "What do you have there?"}]
            rows.append(json.dumps({"id": name, "image": f"images/{name}.jpg", "conversations": turns}))
        (root / f"{split}.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")
    return root


def _lines(name: str) -> list[str]:
    rng = np.random.default_rng([ord(letter) for letter in name])
    items = [
        f"{rng.choice(['TEA', 'RICE', 'SOAP', 'LAMP'])} {rng.integers(1, 9)} x {rng.integers(100, 999) / 100:.2f}"
        for _ in range(3)
    ]
    return [f"SHOP {rng.integers(10, 99)}", *items, f"TOTAL {rng.integers(1000, 9999) / 100:.2f}"]


def _draw(lines: list[str], size_wh: tuple[int, int]) -> Image.Image:
    page = Image.new("L", size_wh, 235)
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        pen.text((20, 30 + 60 * number), line, fill=30, font_size=28)
    return page
