"""Views put together again, and colours over them that tell where every encoded token goes."""

from __future__ import annotations

import base64
import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

from deepstack_jax.audit.inputs import ImageInput, Layer
from deepstack_jax.layout.sequence import LayoutSpec

# Told apart on white paper, on photographs and with any colour vision; more layers than that go around the colour circle.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC3D8F", "#56B4E9", "#D55E00", "#8F7700", "#6A51A3")
TINT, FAINT, DIM = 0.5, 0.35, 0.72  # how much of the pixels a layer's colour covers, the same close up, and the gray of unused
GRAY = (90, 90, 90)
LARGEST, SMALLEST = 672, 400  # longest side of a picture in the page, in pixels
CLOSE_UP = 420


def layer_colours(count: int) -> np.ndarray:
    """u8[K, 3], one colour per layer in the order of the layers."""
    if count <= len(PALETTE):
        return np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in PALETTE[:count]], np.uint8).reshape(-1, 3)
    golden = 0.618034  # neighbours in the order get far hues
    rgb = [colorsys.hls_to_rgb(k * golden % 1, (0.38, 0.55)[k % 2], 0.75) for k in range(count)]
    return np.round(np.array(rgb) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Sheet:
    """Views that were cut from one picture, put together again, with what becomes of their tokens.

    Attributes:
      name: what it shows. index: i64[rows, cols] the views. pixels: u8[Y, X, 3].
      sequence: bool[R, Q] tokens that stand in the sequence. injected: bool[K, R, Q] tokens that are added at each layer.
      crop: side of a view in pixels. token: side of a token in pixels; a view's last pixels belong to none where it does not
        divide.
    """

    name: str
    index: np.ndarray
    pixels: np.ndarray
    sequence: np.ndarray
    injected: np.ndarray
    crop: int
    token: int

    @property
    def unused(self) -> int:
        """Tokens that reach nothing."""
        return int((~(self.sequence | self.injected.any(axis=0))).sum())

    def scaled(self, factor: int) -> Sheet:
        """The same with every pixel repeated, so that a small picture can be marked finely."""
        pixels = self.pixels.repeat(factor, axis=0).repeat(factor, axis=1)
        return Sheet(self.name, self.index, pixels, self.sequence, self.injected, self.crop * factor, self.token * factor)

    def owners(self) -> tuple[np.ndarray, np.ndarray]:
        """i64[Y] and i64[X]: the token row and column that every pixel row and column belongs to, or -1."""
        side = self.sequence.shape[0] // self.index.shape[0]
        inside = np.arange(self.crop) // self.token
        lines = [np.add.outer(np.arange(count) * side, inside) for count in self.index.shape]
        rows, cols = (np.where(inside < side, line, -1).ravel() for line in lines)
        return rows, cols


def make_sheets(image: ImageInput, layers: Sequence[Layer], spec: LayoutSpec, token: int) -> list[Sheet]:
    """The pictures that an image's views were cut from: the global view, the crops, and for DeepStack-HD both upsampled.

    `token` is the side in pixels of what one encoded token covers.
    """
    sequence, injected = image.uses(layers, spec.patches)
    sequence = sequence.reshape(-1, spec.side, spec.side)
    injected = injected.reshape(len(layers), len(image.pixels), spec.side, spec.side)

    def sheet(name: str, index: np.ndarray) -> Sheet:
        by_layer = [assemble(uses, index) for uses in injected]
        joined = np.stack(by_layer) if by_layer else np.zeros((0, *(spec.side * np.array(index.shape))), bool)
        return Sheet(
            name, index, assemble(image.pixels, index), assemble(sequence, index), joined, image.pixels.shape[1], token
        )

    return [sheet(name, index) for name, index in _view_places(image, spec)]


def assemble(parts: np.ndarray, index: np.ndarray) -> np.ndarray:
    """parts[n, y, x, ...] at the places of index i64[rows, cols], as one [rows * y, cols * x, ...]."""
    rows, cols = index.shape
    y, x = parts.shape[1:3]
    return parts[index].swapaxes(1, 2).reshape(rows * y, cols * x, *parts.shape[3:])


def paint(sheet: Sheet, colours: np.ndarray, strength: float = TINT) -> np.ndarray:
    """The sheet u8[Y, X, 3] with every token in the colour of its layer, in stripes where it has several; what stands in the
    sequence alone stays as it is, what is not used turns gray.
    """
    rows, cols = sheet.owners()
    held = np.logical_and.outer(rows >= 0, cols >= 0)
    rows, cols = rows.clip(0)[:, None], cols.clip(0)[None]
    shares = np.concatenate([sheet.injected, np.zeros((1, *sheet.sequence.shape), bool)])
    by_use = np.argsort(~shares, axis=0, kind="stable")  # a token's own layers first
    count = np.where(held, shares.sum(axis=0)[rows, cols], 0)
    stripe = np.arange(sheet.pixels.shape[1])[None] % sheet.crop % sheet.token * count // sheet.token
    layer = np.where(count > 0, by_use[stripe, rows, cols], len(colours))
    tint = np.concatenate([colours, np.array([GRAY], np.uint8)])[layer].astype(np.float32)
    cover = np.where(count > 0, strength, np.where(held & sheet.sequence[rows, cols], 0, DIM)).astype(np.float32)[..., None]
    return np.round(sheet.pixels * (1 - cover) + tint * cover).astype(np.uint8)


def with_seams(picture: Image.Image, views: tuple[int, ...]) -> Image.Image:
    """The picture with a fine line along the borders of its (rows, cols) views."""
    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    for colour, width in (("white", 3), ("black", 1)):
        for row in range(1, views[0]):
            y = round(row * picture.height / views[0])
            pen.line([(0, y), (picture.width, y)], fill=colour, width=width)
        for col in range(1, views[1]):
            x = round(col * picture.width / views[1])
            pen.line([(x, 0), (x, picture.height)], fill=colour, width=width)
    return picture


def fit(picture: Image.Image, largest: int = LARGEST, smallest: int = SMALLEST) -> Image.Image:
    """The picture in a size for the page: large ones shrunk smoothly, small ones enlarged by a whole factor."""
    longest = max(picture.size)
    if longest > largest:
        picture = picture.copy()
        picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
        return picture
    factor = enlargement(longest, smallest)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def enlargement(longest: int, smallest: int = SMALLEST) -> int:
    """The whole factor that brings a longest side up to about `smallest` pixels."""
    return max(1, round(smallest / longest))


def data_uri(picture: Image.Image) -> str:
    """The picture as a WebP inside a URI, so that the page needs no other file."""
    out = BytesIO()
    picture.convert("RGB").save(out, "WEBP", quality=78, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def followed_position(image: ImageInput, layers: Sequence[Layer], spec: LayoutSpec, token: int) -> int | None:
    """The place among the image's visual tokens that gets the most detailed pixels added, the one worth looking at closely;
    None if nothing is added anywhere. `token` is the side in pixels of what one encoded token covers.
    """
    added = image.stack[np.array([layer.group for layer in layers], int)]
    if not (added >= 0).any():
        return None
    views, reach = len(image.pixels), spec.side * token
    tiles = image.pixels[:, :reach, :reach].astype(np.int16).reshape(views, spec.side, token, spec.side, token, 3)
    steps = (np.abs(np.diff(tiles, axis=axis)).sum(axis=(2, 4, 5)) for axis in (2, 4))  # strokes count, a single edge hardly
    detail = np.add(*steps).ravel()
    return int(np.where(added >= 0, detail[added], 0).sum(axis=0).argmax())


def place_of(sheet: Sheet, encoded: int, spec: LayoutSpec) -> tuple[int, int] | None:
    """Token row and column of an encoded token (view * P + token) in the sheet; None for a sentinel or what is not in it."""
    where = np.argwhere(sheet.index == encoded // spec.patches)
    if encoded < 0 or not len(where):
        return None
    (row, col), (y, x) = where[0].tolist(), divmod(encoded % spec.patches, spec.side)
    return row * spec.side + y, col * spec.side + x


def close_up(sheet: Sheet, colours: np.ndarray, places: Sequence[tuple[int, int]], layers: Sequence[Layer]) -> Image.Image:
    """The neighbourhood of some tokens, enlarged; these are framed, and every token that one layer gets tells which."""
    rows, cols = sheet.sequence.shape
    (top, left), (bottom, right) = np.min(places, axis=0) - 2, np.max(places, axis=0) + 3
    top, left, bottom, right = max(0, int(top)), max(0, int(left)), min(rows, int(bottom)), min(cols, int(right))
    y, x = (_pixel(sheet, line) for line in ((top, bottom - 1), (left, right - 1)))
    window = Image.fromarray(paint(sheet, colours, FAINT)[y[0] : y[1], x[0] : x[1]])
    factor = max(1, round(CLOSE_UP / max(window.size)))
    window = window.resize((window.width * factor, window.height * factor), Image.Resampling.NEAREST)
    pen, side = ImageDraw.Draw(window), sheet.token * factor

    def corner(row: int, col: int) -> tuple[int, int]:
        starts = _pixel(sheet, (col, col))[0] - x[0], _pixel(sheet, (row, row))[0] - y[0]
        return starts[0] * factor, starts[1] * factor

    if side >= 18:
        for row, col in np.argwhere(sheet.injected.sum(axis=0) == 1).tolist():
            if top <= row < bottom and left <= col < right:
                number = layers[int(sheet.injected[:, row, col].argmax())].number
                x_at, y_at = (start + side // 9 + 2 for start in corner(row, col))
                size = max(12, side // 4)
                pen.text((x_at, y_at), str(number), "white", font_size=size, anchor="lt", stroke_width=2, stroke_fill="black")
    for row, col in places:
        _frame(pen, corner(row, col), side, max(4, side // 12))
    return window


def framed(sheet: Sheet, place: tuple[int, int] | None) -> Image.Image:
    """The sheet's pixels, one token framed, in a size for the page."""
    factor = enlargement(max(sheet.pixels.shape))
    picture = Image.fromarray(sheet.scaled(factor).pixels)
    if place is not None:
        col, row = (_pixel(sheet, (at, at))[0] * factor for at in reversed(place))
        _frame(ImageDraw.Draw(picture), (col, row), sheet.token * factor, max(4, max(picture.size) // 90))
    return fit(picture)


def _pixel(sheet: Sheet, tokens: tuple[int, int]) -> tuple[int, int]:
    """The pixels from the beginning of the first to the end of the last of two token rows (or columns)."""
    side = sheet.sequence.shape[0] // sheet.index.shape[0]
    first, last = (at // side * sheet.crop + at % side * sheet.token for at in tokens)
    return first, last + sheet.token


def _frame(pen: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, width: int) -> None:
    """A black frame with a white line in it: seen on any picture."""
    x, y = corner
    pen.rectangle([x, y, x + side - 1, y + side - 1], outline="black", width=width)
    inner = max(1, width // 2)
    gap = width // 4
    pen.rectangle([x + gap, y + gap, x + side - 1 - gap, y + side - 1 - gap], outline="white", width=inner)


def _view_places(image: ImageInput, spec: LayoutSpec) -> list[tuple[str, np.ndarray]]:
    """Which views make up which picture, in the order of `data.image.make_views`; every view is in one.

    Raises:
      ValueError: the image has another number of views; colours would lie over the wrong pixels.
    """
    places = [("global view", np.zeros((1, 1), int))]
    if image.grid is not None:
        rows, cols = image.grid
        cells = 1 + np.arange(rows * cols).reshape(rows, cols)
        places.append(("cells" if spec.mode == "hd" else "crops", cells))
        if spec.mode == "hd":
            up, first = spec.upsampling, 1 + rows * cols
            upsampled = (first + np.arange((1 + rows * cols) * up**2)).reshape(-1, up, up)
            places.append(("global view, upsampled", upsampled[0]))
            places.append(("cells, upsampled", assemble(upsampled[1:], cells - 1)))
    if sum(index.size for _, index in places) != len(image.pixels):
        raise ValueError(f"{len(image.pixels)} views do not make up {[index.shape for _, index in places]}")
    return places
