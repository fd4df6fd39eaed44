"""Small pictures of rows, for logs and pages."""

import base64
from collections.abc import Callable
from io import BytesIO

from PIL import Image

from deepstack_jax.config import DataConfig
from deepstack_jax.data.encode.encoder import try_record
from deepstack_jax.data.example import BadExample, Example, Source
from deepstack_jax.data.formats.image_files import read_image


def thumbnails(source: Source, row: int, data: DataConfig, side: int, most: int) -> list[Image.Image]:
    """The first `most` pictures of a row, their longest side at most `side` pixels; none where they cannot be read."""

    def draw(example: Example) -> list[Image.Image]:
        return [_shrunk(read_image(image, data)[0], side) for image in example.images[:most]]

    drawn = try_record(source, row, draw, lost=True)
    return [] if isinstance(drawn, BadExample) else drawn


def _shrunk(picture: Image.Image, side: int) -> Image.Image:
    picture = picture.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def data_uri(picture: Image.Image) -> str:
    """The picture as a WebP inside a URI, so that a page needs no other file."""
    out = BytesIO()
    picture.save(out, "WEBP", quality=70, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


Pictures = Callable[[int], list[str]]
"""Row -> its pictures as URIs."""


def pictures_of(source: Source | None, data: DataConfig, side: int, most: int) -> Pictures:
    """Those of a source's rows, each drawn when it is asked for; none without a source."""
    if source is None:
        return lambda _: []
    return lambda row: [data_uri(picture) for picture in thumbnails(source, row, data, side, most)]
