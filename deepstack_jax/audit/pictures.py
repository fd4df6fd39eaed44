"""Views put together again, and colours over them that tell where every encoded token goes."""

import base64
import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Self

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageOps

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
        return np.array([ImageColor.getrgb(code) for code in PALETTE[:count]], np.uint8).reshape(-1, 3)
    golden = 0.618034  # neighbours in the order get far hues
    rgb = [colorsys.hls_to_rgb(k * golden % 1, (0.38, 0.55)[k % 2], 0.75) for k in range(count)]
    return np.round(np.array(rgb) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Sheet:
    """Views that were cut from one picture, put together again, with what becomes of their tokens."""

    name: str  # what it shows
    index: np.ndarray  # i64[rows, cols] the views
    pixels: np.ndarray  # u8[Y, X, 3]
    sequence: np.ndarray  # bool[R, Q] tokens that are in the sequence
    injected: np.ndarray  # bool[K, R, Q] tokens that are added at each layer
    crop: int  # side of a view in pixels
    token: int  # side of a token in pixels; a view's last pixels belong to none where it does not divide

    @property
    def side(self) -> int:
        """Tokens along a side of a view."""
        return self.sequence.shape[0] // self.index.shape[0]

    @property
    def unused(self) -> int:
        """Tokens that reach nothing."""
        return int((~(self.sequence | self.injected.any(axis=0))).sum())

    def scaled(self, factor: int) -> Self:
        """The same with every pixel repeated, so that a small picture can be marked finely."""
        pixels = self.pixels.repeat(factor, axis=0).repeat(factor, axis=1)
        return replace(self, pixels=pixels, crop=self.crop * factor, token=self.token * factor)

    def owners(self, axis: int) -> np.ndarray:
        """i64[Y] or i64[X]: the token row (axis 0) or column (1) that every pixel row or column belongs to, or -1."""
        inside = np.arange(self.crop) // self.token
        lines = np.add.outer(np.arange(self.index.shape[axis]) * self.side, inside)
        return np.where(inside < self.side, lines, -1).ravel()

    def corner(self, row: int, col: int) -> tuple[int, int]:
        """(x, y) of the first pixel of a token."""
        x, y = (at // self.side * self.crop + at % self.side * self.token for at in (col, row))
        return x, y

    def find(self, encoded: int) -> tuple[int, int] | None:
        """Token row and column of an encoded token (view * P + token); None for a sentinel or what is not in it."""
        view, token = divmod(encoded, self.side**2)
        where = np.argwhere(self.index == view)
        if encoded < 0 or not len(where):
            return None
        (row, col), (y, x) = where[0].tolist(), divmod(token, self.side)
        return row * self.side + y, col * self.side + x


def make_sheets(image: ImageInput, layers: Sequence[Layer], spec: LayoutSpec, token: int) -> list[Sheet]:
    """The pictures that an image's views were cut from: the global view, the crops, and for DeepStack-HD both upsampled.

    `token` is the side in pixels of what one encoded token covers.
    """
    sequence, injected = image.uses(layers, spec.patches)
    sequence = sequence.reshape(-1, spec.side, spec.side)
    injected = injected.reshape(len(layers), len(image.pixels), spec.side, spec.side)

    def sheet(name: str, index: np.ndarray) -> Sheet:
        none = np.zeros((0, *(spec.side * np.array(index.shape))), bool)
        joined = np.stack([assemble(uses, index) for uses in injected]) if len(layers) else none
        pixels, inside = assemble(image.pixels, index), assemble(sequence, index)
        return Sheet(name, index, pixels, inside, joined, image.pixels.shape[1], token)

    return [sheet(name, index) for name, index in _view_places(image, spec)]


def assemble(parts: np.ndarray, index: np.ndarray) -> np.ndarray:
    """parts[n, y, x, ...] at the places of index i64[rows, cols], as one [rows * y, cols * x, ...]."""
    (rows, cols), (y, x) = index.shape, parts.shape[1:3]
    return parts[index].swapaxes(1, 2).reshape(rows * y, cols * x, *parts.shape[3:])


def paint(sheet: Sheet, colours: np.ndarray, strength: float = TINT) -> np.ndarray:
    """The sheet u8[Y, X, 3] with every token in the colour of its layer, in stripes where it has several; what is in the
    sequence alone stays as it is, what is not used turns gray.
    """
    rows, cols = sheet.owners(0), sheet.owners(1)
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


def fit(picture: Image.Image) -> Image.Image:
    """The picture in a size for the page: large ones shrunk smoothly, small ones enlarged by a whole factor."""
    longest = max(picture.size)
    if longest > LARGEST:
        picture = picture.copy()
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        return picture
    return ImageOps.scale(picture, enlargement(longest), Image.Resampling.NEAREST)


def enlargement(longest: int, wanted: int = SMALLEST) -> int:
    """The whole factor that brings a longest side up to about `wanted` pixels."""
    return max(1, round(wanted / longest))


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


def close_up(sheet: Sheet, colours: np.ndarray, places: Sequence[tuple[int, int]], layers: Sequence[Layer]) -> Image.Image:
    """The neighbourhood of some tokens, enlarged; these are framed, and every token that one layer gets tells which."""
    top, left = np.maximum(np.min(places, axis=0) - 2, 0).tolist()
    bottom, right = np.minimum(np.max(places, axis=0) + 3, sheet.sequence.shape).tolist()
    (x, y), (last_x, last_y) = sheet.corner(top, left), sheet.corner(bottom - 1, right - 1)
    window = Image.fromarray(paint(sheet, colours, FAINT)).crop((x, y, last_x + sheet.token, last_y + sheet.token))
    factor = enlargement(max(window.size), CLOSE_UP)
    window = ImageOps.scale(window, factor, Image.Resampling.NEAREST)
    pen, side = ImageDraw.Draw(window), sheet.token * factor

    def corner(row: int, col: int) -> tuple[int, int]:
        token_x, token_y = sheet.corner(row, col)
        return (token_x - x) * factor, (token_y - y) * factor

    if side >= 18:
        for row, col in np.argwhere(sheet.injected.sum(axis=0) == 1).tolist():
            if top <= row < bottom and left <= col < right:
                number = layers[int(sheet.injected[:, row, col].argmax())].number
                (x_at, y_at), inset, size = corner(row, col), side // 9 + 2, max(12, side // 4)
                how = {"font_size": size, "anchor": "lt", "stroke_width": 2, "stroke_fill": "black"}
                pen.text((x_at + inset, y_at + inset), str(number), "white", **how)
    for place in places:
        _frame(pen, corner(*place), side, max(4, side // 12))
    return window


def plain(sheet: Sheet, place: tuple[int, int] | None) -> Image.Image:
    """The sheet's pixels in a size for the page, one token framed, with a fine line along the borders of its views."""
    sheet = sheet.scaled(enlargement(max(sheet.pixels.shape)))
    picture = Image.fromarray(sheet.pixels)
    if place is not None:
        _frame(ImageDraw.Draw(picture), sheet.corner(*place), sheet.token, max(4, max(picture.size) // 90))
    picture = fit(picture)
    (rows, cols), (width, height) = sheet.index.shape, picture.size
    across = [round(row * height / rows) for row in range(1, rows)]
    down = [round(col * width / cols) for col in range(1, cols)]
    pen = ImageDraw.Draw(picture)
    for colour, thick in (("white", 3), ("black", 1)):
        for line in [((0, y), (width, y)) for y in across] + [((x, 0), (x, height)) for x in down]:
            pen.line(line, fill=colour, width=thick)
    return picture


def _frame(pen: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, width: int) -> None:
    """A black frame with a white line in it: seen on any picture."""
    x, y = corner
    for colour, gap, thick in (("black", 0, width), ("white", width // 4, max(1, width // 2))):
        pen.rectangle([x + gap, y + gap, x + side - 1 - gap, y + side - 1 - gap], outline=colour, width=thick)


def _view_places(image: ImageInput, spec: LayoutSpec) -> list[tuple[str, np.ndarray]]:
    """Which views make up which picture, in the order of `data.encode.image.make_views`; every view is in one.

    Raises:
      ValueError: the image has another number of views; colours would lie over the wrong pixels.
    """
    places = [("global view", np.zeros((1, 1), int))]
    if image.grid is not None:
        rows, cols = image.grid
        cells = 1 + np.arange(rows * cols).reshape(rows, cols)
        places.append(("cells" if spec.kind.upsampled else "crops", cells))
        if spec.kind.upsampled:
            up, first = spec.upsampling, 1 + rows * cols
            upsampled = (first + np.arange((1 + rows * cols) * up**2)).reshape(-1, up, up)
            places.append(("global view, upsampled", upsampled[0]))
            places.append(("cells, upsampled", assemble(upsampled[1:], cells - 1)))
    if sum(index.size for _, index in places) != len(image.pixels):
        raise ValueError(f"{len(image.pixels)} views do not make up {[index.shape for _, index in places]}")
    return places
