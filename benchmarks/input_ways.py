"""Ways from an image file to what the vision tower takes, each run in a process of its own for benchmarks/input_pipeline.py.

`python -m benchmarks.input_ways WAY` reads lines of "time FILE", "digest FILE" or "versions" and answers each with a line.

A process holds the libraries of its way only, so that one environment may have the authors' torch and transformers.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from deepstack_jax.layout.grid import best_grid, candidate_grids

SIDE, NUM_CROPS = 336, 4
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
PROCESSOR = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}

# As `deepstack_jax.data.encode.image` does for its process, so that no way is slowed by how memory happens to be handed back.
np.empty(31 * 2**20, np.uint8)

Way = Callable[[Path], Any]


def plain_views(path: Path) -> list[Image.Image]:
    """What the official `process_anyres_image` hands to the image processor: the global view and the crops, row-major."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    rows, cols = best_grid(image.size, candidate_grids(NUM_CROPS), SIDE)
    sheet = image.resize((cols * SIDE, rows * SIDE), Image.Resampling.BICUBIC)
    corners = [(col * SIDE, row * SIDE) for row in range(rows) for col in range(cols)]
    crops = [sheet.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]
    return [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), *crops]


def normalised(pixels: np.ndarray) -> np.ndarray:
    """u8[..., 3] -> f32[..., 3], in the official order of operations, which decides the last bit."""
    return ((pixels * (1 / 255)).astype(np.float32) - MEAN) / STD


def authors() -> Way:
    """The authors' repository itself, where it and torch are installed."""
    process = import_module("llava.mm_utils").process_anyres_image
    processor = import_module("transformers").CLIPImageProcessor(**PROCESSOR)
    return lambda path: process(Image.open(path).convert("RGB"), processor, num_crops=NUM_CROPS)[0].numpy()


def transformers() -> Way:
    preprocess = partial(import_module("transformers").CLIPImageProcessorPil(**PROCESSOR).preprocess, return_tensors="np")
    return lambda path: np.stack([preprocess(view)["pixel_values"][0] for view in plain_views(path)])


def plain_numpy() -> Way:
    return lambda path: np.stack([normalised(np.asarray(view)).transpose(2, 0, 1) for view in plain_views(path)])


def pil() -> Way:
    return lambda path: np.stack([np.asarray(view) for view in plain_views(path)])


def ours() -> Way:
    image, config = import_module("deepstack_jax.data.encode.image"), import_module("deepstack_jax.config")
    spec = config.ImageConfig(size=SIDE, num_crops=NUM_CROPS)
    return lambda path: image.make_views(image.open_image(path), spec).pixels


def decode_and_resize() -> Way:
    open_image = import_module("deepstack_jax.data.encode.image").open_image

    def way(path: Path) -> list[Image.Image]:
        image = open_image(path)
        rows, cols = best_grid(image.size, candidate_grids(NUM_CROPS), SIDE)
        return [image.resize(size, Image.Resampling.BICUBIC) for size in ((SIDE, SIDE), (cols * SIDE, rows * SIDE))]

    return way


def decode() -> Way:
    return import_module("deepstack_jax.data.encode.image").open_image


# Those up to `ours` yield pixels, f32[n, 3, S, S] or u8[n, S, S, 3].
WAYS: dict[str, Callable[[], Way]] = {
    made.__name__: made for made in (authors, transformers, plain_numpy, pil, ours, decode_and_resize, decode)
}


def digest(pixels: np.ndarray) -> str:
    """A hash of the pixels as f32[n, 3, S, S], equal for equal pixels whatever form a way gives them."""
    if pixels.dtype == np.uint8:
        pixels = normalised(pixels).transpose(0, 3, 1, 2)
    return f"{pixels.dtype}{list(pixels.shape)} {hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()}"


def timed(way: Way, path: Path) -> str:
    """Seconds by the wall clock and of CPU time that one file takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    way(path)
    return f"{time.perf_counter() - wall} {time.process_time() - cpu}"


def versions() -> str:
    """What decides the speed in this process."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "numpy", "pillow"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found) + (" with libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "")


def main(name: str) -> None:
    way = WAYS[name]()
    for line in sys.stdin:
        task, _, file = line.rstrip("\n").partition(" ")
        answers = {"time": partial(timed, way), "digest": lambda path: digest(way(path)), "versions": lambda _: versions()}
        print(answers[task](Path(file)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
