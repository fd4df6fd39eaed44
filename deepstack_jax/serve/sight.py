"""What the model sees of a picture, drawn as `audit` draws it."""

from __future__ import annotations

from typing import Any

from deepstack_jax.audit.cards import make_image_card
from deepstack_jax.audit.inputs import ImageInput
from deepstack_jax.config import Config
from deepstack_jax.data.encode.image import make_views
from deepstack_jax.data.formats.image_files import read_image


def look(source: bytes, config: Config) -> dict[str, Any]:
    """The views of a picture, and which of their tokens enter which layer: title, pictures as data URIs, legend.

    Raises:
      ImageError: it cannot be read.
    """
    picture, _ = read_image(source, config.data)
    views = make_views(picture, config.image)
    layout = config.layout.layout(views.grid, views.size_wh)
    seen = ImageInput(views.size_wh, views.grid, views.pixels, layout.tokens, layout.stack)
    card = make_image_card("Image", picture, seen, config)
    return {
        "title": card.title,
        "pictures": [one._asdict() for one in card.pictures],
        "tags": [tag._asdict() for tag in card.tags],
    }
