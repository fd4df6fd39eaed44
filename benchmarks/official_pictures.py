"""The pictures that `official_cases.py` (in its own environment) and `parity_table.py` both use. Imports numpy and PIL only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def pictures() -> list[Image.Image]:
    """The pictures of the goldens and a wide one of noise."""
    noise = np.random.default_rng(5).integers(0, 256, (33, 90, 3), dtype=np.uint8)
    stored = [Image.open(GOLDEN / "images" / f"img{i}.png").convert("RGB") for i in (0, 1)]
    return [*stored, Image.fromarray(noise)]
