"""One Example into token ids, crops and layouts: the work of the data workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepstack_jax.config import Config
from deepstack_jax.data.conversation import get_template, normalise, render
from deepstack_jax.data.image import make_views, open_image
from deepstack_jax.data.rows import EncodedExample
from deepstack_jax.data.sources import Example, SampleError
from deepstack_jax.data.tokenize import encode_conversation, encode_with_images, load_tokenizer
from deepstack_jax.layout.sequence import VisualLayout


@dataclass(frozen=True)
class BadExample:
    """An example that could not be used, and why; its place in the batch stays blank."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Encoder:
    """Turns examples into rows' content under one configuration. Cheap to send to a worker: the tokenizer is loaded there."""

    config: Config

    def __call__(self, example: Example) -> EncodedExample | BadExample:
        """The training form of an example; everything that is wrong with it comes back as BadExample with the reason."""
        try:
            return self.encode(example)
        except ValueError as error:
            return BadExample(example.index, example.name, str(error))

    def encode(self, example: Example) -> EncodedExample:
        """Like the call, but raises ValueError on an example that cannot be used."""
        self._check_images(example)
        template, tokenizer = get_template(self.config.data.template), load_tokenizer(self.config.data.tokenizer)
        messages = normalise(example.messages, template) if example.images else example.messages
        text = encode_conversation(render(messages, template), tokenizer, has_image=bool(example.images))
        encoded = EncodedExample(example.index, text.ids, text.supervised, *self._images(example))
        room = self.config.data.max_length
        if encoded.length > room:
            raise SampleError(
                f"{example.name}: {encoded.length} tokens with its images, a row holds {room}; raise config.data.max_length",
                example.name,
            )
        return encoded

    def questions(self, example: Example) -> list[tuple[EncodedExample, str]]:
        """One generation prompt per answered turn, with the true answers of the turns before it, and the expected answer."""
        self._check_images(example)
        template, tokenizer = get_template(self.config.data.template), load_tokenizer(self.config.data.tokenizer)
        messages = normalise(example.messages, template) if example.images else example.messages
        images = self._images(example)
        prompts = []
        for turn, message in enumerate(messages):
            if message.role != "gpt" or turn == 0:
                continue
            text = render(messages[:turn], template, complete=False).text
            ids, _ = encode_with_images(text, tokenizer, has_image=bool(example.images))
            prompts.append((EncodedExample(example.index, ids, np.zeros(ids.size, bool), *images), message.text))
        return prompts

    def _check_images(self, example: Example) -> None:
        """Refuse what the row has no room for before any image is decoded."""
        room = self.config.data.max_images
        if len(example.images) > room:
            raise SampleError(
                f"{example.name}: {len(example.images)} images, a row has room for {room}; raise config.data.max_images",
                example.name,
            )

    def _images(self, example: Example) -> tuple[tuple[np.ndarray, ...], tuple[VisualLayout, ...]]:
        config = self.config
        pixels, layouts = [], []
        for source in example.images:
            views = make_views(open_image(source), config.image)
            pixels.append(views.pixels)
            layouts.append(config.layout.layout(views.grid, views.size_wh))
        return tuple(pixels), tuple(layouts)
