"""One Example into token ids, crops and layouts: the work of the data workers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from deepstack_jax.config import DataSpec
from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.data.encode.chat_template import open_template
from deepstack_jax.data.encode.image import make_views
from deepstack_jax.data.encode.labels import CONTROL, IMAGE_TOKEN, EncodedText, encode_conversation
from deepstack_jax.data.encode.templates import Rendered, images_to_front, render
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.data.example import BadExample, Example, ExampleError, Source, SourceError
from deepstack_jax.data.formats.image_files import DEEP, TURNED, read_image
from deepstack_jax.layout.sequence import VisualLayout
from deepstack_jax.printing import plural

REMARKS = (DEEP, TURNED, CONTROL)  # what not everybody expects to be done to images and words: counted, and said once

Made = TypeVar("Made")


def try_record(source: Source, index: int, use: Callable[[Example], Made], *, lost: bool = False) -> Made | BadExample:
    """What `use` makes of record `index`, or why it cannot, by its id; raises OverlongError from `use`.

    Args:
      lost: go on also where the source as a whole cannot be read, which raises SourceError or OSError else.
    """
    name = f"record {index}"
    try:
        example = source[index]
        name = example.name
        return use(example)
    except OverlongError:
        raise
    except ExampleError as error:
        return BadExample(index, error.name, str(error))
    except (ValueError, OSError) as error:
        if isinstance(error, SourceError | OSError) and not lost:
            raise
        return BadExample(index, name, str(error))


class OverlongError(SourceError):
    """An example is longer than a row, and `config.data.overlong` is "error"."""


@dataclass(frozen=True)
class Encoder:
    """Turns examples into rows' content under one configuration. Cheap to send to a worker: the tokenizer is loaded there."""

    spec: DataSpec

    def encode(self, example: Example) -> EncodedExample:
        """The training form of an example; ValueError where it cannot be used, OverlongError where a run stops for it."""
        text = self.text(example)
        pixels, layouts, remarks = self.images(example)
        text = self.fit(example, text, [layout.tokens.size for layout in layouts])
        return EncodedExample(example.index, text.ids, text.supervised, pixels, layouts, (*remarks, *text.remarks))

    def text(self, example: Example) -> EncodedText:
        """Token ids of an example whole, its images not looked at; raises ValueError where it cannot be used."""
        text, tokenizer = self.rendered(example), load_tokenizer(self.spec.data.tokenizer)
        plain = self.spec.data.control_tokens == "text"
        return encode_conversation(text, tokenizer, has_image=bool(example.images), plain_words=plain)

    def rendered(self, example: Example) -> Rendered:
        """The text of an example, not tokenised; ValueError where it has too many images or does not fit the template."""
        many, room = len(example.images), self.spec.data.max_images
        if many > room:  # said before any image is decoded
            raise ExampleError(
                f"{example.name}: {many} images, a row has room for {room}; raise config.data.max_images", example.name
            )
        tokenizer = load_tokenizer(self.spec.data.tokenizer) if self.spec.data.tokenizer else None  # `prepare` may have none
        template = open_template(self.spec.data.template, tokenizer)
        return render(images_to_front(example.messages, template) if example.images else example.messages, template)

    def fit(self, example: Example, text: EncodedText, visual: Sequence[int]) -> EncodedText:
        """The text that a row has room for beside `visual` visual tokens per image, by `config.data.overlong`.

        Only text at the end is cut, never an image: half of an image's tokens would be trained on as if they were all of it.
        ExampleError where it is too long and may not be cut, or nothing to learn would remain; OverlongError where a run stops.
        """
        room, policy = self.spec.data.max_length, self.spec.data.overlong
        takes, slots = np.ones(text.ids.size, np.int64), text.ids == IMAGE_TOKEN
        if slots.sum() != len(visual):
            marks, images = plural(slots.sum(), "image placeholder"), plural(len(visual), "image")
            raise ExampleError(f"{example.name}: {marks} but {images}", example.name)
        takes[slots] = visual
        if takes.sum() <= room:
            return text
        problem = f"{example.name}: {takes.sum()} tokens with its images, a row holds {room}"
        if policy == "error":
            raise OverlongError(f"{problem}; raise config.data.max_length, or set config.data.overlong to 'drop' or 'cut'")
        if policy == "drop":
            raise ExampleError(f"{problem}; raise config.data.max_length", example.name)
        kept = int(np.searchsorted(takes.cumsum(), room, side="right"))
        if slots[kept:].any():
            raise ExampleError(f"{problem}, and an image would be cut; raise config.data.max_length", example.name)
        if not text.supervised[1:kept].any():
            raise ExampleError(f"{problem}, and no answer begins before the cut; raise config.data.max_length", example.name)
        return EncodedText(text.ids[:kept], text.supervised[:kept], text.remarks)

    def images(self, example: Example) -> tuple[tuple[np.ndarray, ...], tuple[VisualLayout, ...], list[str]]:
        """The views u8[n, y, x, 3] and the layout of every image, and remarks; ImageError where one cannot be read."""
        spec = self.spec
        pixels, layouts, remarks = [], [], []
        for source in example.images:
            image, of_image = read_image(source, spec.data)
            views = make_views(image, spec.image)
            pixels.append(views.pixels)
            layouts.append(spec.layout.layout(views.grid, views.size_wh))
            remarks += of_image
        return tuple(pixels), tuple(layouts), remarks
