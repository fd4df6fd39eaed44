"""From image files to the square uint8 views that the vision tower sees, equal to the official pixels to the bit."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from deepstack_jax.data.formats.image_files import ImageError as ImageError
from deepstack_jax.data.formats.image_files import open_image as open_image
from deepstack_jax.layout.grid import Grid, best_grid, letterbox
from deepstack_jax.layout.modes import MODES

if TYPE_CHECKING:
    from deepstack_jax.config import ImageConfig

SCRATCH_PIXELS = 2**25  # bounds the scratch image of a very long, thin picture
# Otherwise glibc hands its free pages back after an image and faults them in again for the next: a tenth of the time. The free
# of one large block raises its limits (mallopt(3), the dynamic mmap threshold) to 62 MiB kept for reuse, for the whole process.
np.empty(31 * 2**20, np.uint8)

FILTERS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "lanczos", "box", "nearest")}


@dataclass(frozen=True)
class Views:
    """The crops of one image, as the vision tower takes them before normalisation."""

    pixels: np.ndarray  # u8[n, S, S, 3]; view 0 is the global one, then the crops row-major
    grid: Grid | None  # (rows, cols) of the crops, None without crops
    size_wh: tuple[int, int]  # of the original image


def image_grid(size_wh: tuple[int, int], spec: "ImageConfig") -> Grid | None:
    """The (rows, cols) of crops that `make_views` cuts from an image of this (width, height); None where it cuts none."""
    if spec.mode not in MODES:
        raise ValueError(f"image mode {spec.mode!r} is unknown; use one of {', '.join(map(repr, MODES))}")
    if spec.grid not in ("best", "square"):
        raise ValueError(f"image grid {spec.grid!r} is unknown; use one of 'best', 'square'")
    square = spec.grid == "square"
    grids = spec.kind.possible_grids(spec.num_crops, square=square, pinpoints=spec.pinpoints, size=spec.size)
    return best_grid(size_wh, grids, spec.size) if grids else None


def make_views(image: Image.Image, spec: "ImageConfig") -> Views:
    """Cut one image into its global view and its crops (paper section 3.1).

    `deepstack`: the image resized to S x S, then stretched (or letterboxed) over the grid and cut. `anyres`: the same,
    always letterboxed. `hd`: further the crops of the global view and of each cell, both upsampled k = floor(sqrt(num_crops))
    times from the original image. `pad`: one view, squared with the mean colour. `square`: one view, the shorter side
    resized to S and the centre cut. `stretch`: one view, resized to S x S.

    Args:
      image: any PIL image; RGB and L are used as they are.

    Returns:
      Views of n = 1, 1 + rows*cols, or for `hd` (1 + rows*cols) * (1 + k*k) pictures; `hd` orders them global, cells, the
      global view's k*k crops, then those of each cell. ValueError for an image without pixels, or an unknown setting.
    """
    if 0 in image.size:
        size = f"{image.width}x{image.height}"
        raise ValueError(f"image of {size} has no pixels; read files with open_image, which names such a file")
    if image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    size, crop_filter, global_filter = spec.size, _filter(spec.crop_filter), _filter(spec.global_filter)
    grid = image_grid(image.size, spec)
    if grid is None:
        if spec.kind.fill == "stretch":
            whole = image.resize((size, size), global_filter)
        else:
            whole = _centre(image, size, global_filter) if spec.kind.fill == "centre" else _pad(image, spec, global_filter)
        return Views(_cut([(whole, (1, 1), 1)], size), None, image.size)

    rows, cols = grid
    crops_wh = (cols * size, rows * size)
    if spec.kind.letterbox or spec.fit == "letterbox":
        new_wh, offset = letterbox(image.size, crops_wh)
        crops = Image.new(image.mode, crops_wh)
        crops.paste(image.resize(new_wh, crop_filter), offset)
    elif spec.fit == "stretch":
        crops = image.resize(crops_wh, crop_filter)
    else:
        raise ValueError(f"image fit {spec.fit!r} is unknown; use one of 'stretch', 'letterbox'")
    sheets = [(image.resize((size, size), global_filter), (1, 1), 1), (crops, grid, 1)]
    if spec.kind.upsampled:
        up = math.isqrt(spec.num_crops)
        sheets.append((image.resize((up * size, up * size), crop_filter), (1, 1), up))
        sheets.append((image.resize((up * cols * size, up * rows * size), crop_filter), grid, up))
    return Views(_cut(sheets, size), grid, image.size)


def _cut(sheets: list[tuple[Image.Image, Grid, int]], size: int) -> np.ndarray:
    """Tile pictures of rows x cols cells of up x up crops into u8[n, S, S, 3]: cells row-major, each one's crops row-major."""
    counts = [rows * cols * up * up for _, (rows, cols), up in sheets]
    pixels = np.empty((sum(counts), size, size, 3), np.uint8)
    start = 0
    for (sheet, (rows, cols), up), count in zip(sheets, counts, strict=True):
        tiles = np.asarray(sheet).reshape(rows, up, size, cols, up, size, -1).transpose(0, 3, 1, 4, 2, 5, 6)
        out = pixels[start : start + count].reshape(rows, cols, up, up, size, size, 3)
        if tiles.shape[-1] == 3:
            out[...] = tiles
        else:
            for channel in range(3):  # several times faster than broadcasting over a last axis of 3
                out[..., channel] = tiles[..., 0]
        start += count
    return pixels


def _pad(image: Image.Image, spec: "ImageConfig", resample: Image.Resampling) -> Image.Image:
    """Centre the image in a square of the mean colour and resize that, by strips: the square never exists at full size."""
    size, background = spec.size, tuple(int(channel * 255) for channel in spec.mean)
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    if side == 3:
        square = Image.new("RGB", (3, 3), background)
        square.paste(image, (left, top))
        return _three_rows_as_channels(square).resize((size, size), resample)
    # Pillow resizes the columns of a square first, and a constant row stays constant: only the image's own rows need it.
    narrow = Image.new("RGB", (size, side), background)
    step = max(1, SCRATCH_PIXELS // side)
    for y in range(0, image.height, step):
        strip = image.crop((0, y, image.width, min(y + step, image.height)))
        if image.width < side:
            padded = Image.new("RGB", (side, strip.height), background)
            padded.paste(strip, (left, 0))
            strip = padded
        narrow.paste(strip.resize((size, strip.height), resample), (0, top + y))
    return narrow.resize((size, size), resample)


def _centre(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Resize the shorter side to S and cut the centre: CLIP's own preprocessing."""
    image = _three_rows_as_channels(image)
    width, height = image.size
    new_width = size if width <= height else int(size * width / height)
    new_height = int(size * height / width) if width <= height else size
    left, top = (new_width - size) // 2, (new_height - size) // 2
    if min(width, height) >= size or new_width * new_height <= SCRATCH_PIXELS:
        return image.resize((new_width, new_height), resample).crop((left, top, left + size, top + size))
    # A long thin picture would grow to gigabytes: enlarge only what remains, equal but for the rounding of the box to float32.
    scale_x, scale_y = width / new_width, height / new_height
    x0, x1 = max(0, int(left * scale_x) - 4), min(width, math.ceil((left + size) * scale_x) + 4)  # 4: past every filter's reach
    y0, y1 = max(0, int(top * scale_y) - 4), min(height, math.ceil((top + size) * scale_y) + 4)
    box = (left * scale_x - x0, top * scale_y - y0, (left + size) * scale_x - x0, (top + size) * scale_y - y0)
    return image.crop((x0, y0, x1, y1)).resize((size, size), resample, box)


def _three_rows_as_channels(image: Image.Image) -> Image.Image:
    """Turn the rows of a picture of height 3 into its channels, as transformers' processor does: it takes any u8[3, x, 3] for
    channels first. Such a picture says nothing either way; this keeps "equal to the official pixels" free of exceptions.
    """
    if image.height != 3:
        return image
    return Image.fromarray(np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(1, 2, 0)))


def _filter(name: str) -> Image.Resampling:
    if name not in FILTERS:
        raise ValueError(f"image filter {name!r} is unknown; use one of {', '.join(map(repr, FILTERS))}")
    return FILTERS[name]
