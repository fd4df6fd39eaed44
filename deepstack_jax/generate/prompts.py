"""From images and words to the rows of a batch whose sizes repeat, so that a new prompt compiles nothing."""

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.encode.batch_rows import EncodedExample, ExampleSize, fill
from deepstack_jax.data.encode.chat_template import open_template
from deepstack_jax.data.encode.image import make_views
from deepstack_jax.data.encode.labels import encode_with_images
from deepstack_jax.data.encode.templates import AnyTemplate, render
from deepstack_jax.data.encode.tokenizer import Tokenizer
from deepstack_jax.data.example import IMAGE_MARK, ConversationError, Message
from deepstack_jax.data.formats.image_files import read_image
from deepstack_jax.generate.options import RequestError
from deepstack_jax.layout.sequence import VisualLayout
from deepstack_jax.printing import plural

SMALLEST = 32  # tokens of the shortest bucket


class CutImage(NamedTuple):
    """An image as the model takes it."""

    pixels: np.ndarray  # u8[views, y, x, 3]
    layout: VisualLayout
    remarks: tuple[str, ...] = ()  # see `EncodedExample`


class Turn(NamedTuple):
    """One side's words in a conversation, and the images that came with them."""

    role: str  # human | gpt; the first may be system
    words: str
    images: Sequence[Any] = ()


def image_list(images: Any) -> Any:
    """The images of a prompt as a list, where one alone stands for a list of one, and None for none; else what was given."""
    if images is None:
        return ()
    return [images] if isinstance(images, str | bytes | PathLike | np.ndarray | Image.Image) else images


def bucket(size: int) -> int:
    """The next of 32, 48, 64, 96, 128, 192, ...: at most half as much again, and few enough to be compiled once each."""
    power = max(SMALLEST, 1 << (size - 1).bit_length())
    return power * 3 // 4 if power > SMALLEST and power * 3 // 4 >= size else power


def find_template(name: str, tokenizer: Tokenizer | None = None) -> AnyTemplate:
    """The template of that name; the special tokens of the tokenizer are what a chat template may write.

    Raises:
      RequestError: there is none; the nearest is named.
    """
    try:
        return open_template(name, tokenizer)
    except ValueError as error:
        raise RequestError(f"{error}; choose one with template=NAME") from error


def cut_image(source: Any, config: Config, exif: str) -> CutImage:
    """The views of one image and its layout; `exif` as in `Options`. What is cut already stays as it is.

    Raises:
      ImageError: the image cannot be read; it is named.
    """
    if isinstance(source, CutImage):
        return source
    image, remarks = read_image(source, replace(config.data, exif=exif))
    views = make_views(image, config.image)
    return CutImage(views.pixels, config.layout.layout(views.grid, views.size_wh), remarks)


def place_images(prompt: str, images: int, template: AnyTemplate) -> str:
    """The user's turn: images that the prompt does not place itself come first, each on a line of its own, as upstream.

    Raises:
      RequestError: the prompt has placeholders, but not one per image. Which image is meant would be a guess.
    """
    marks = prompt.count(IMAGE_MARK)
    if marks == images:
        return prompt
    if marks:
        raise RequestError(
            f"the prompt has {plural(marks, f'{IMAGE_MARK} placeholder')} for {plural(images, 'image')}; write one per image, "
            f"or none and they come first; prompt: {prompt!r:.80}"
        )
    return f"{template.image}\n" * images + prompt if prompt else "\n".join([template.image] * images)


def encode_turns(
    turns: Sequence[Turn],
    config: Config,
    tokenizer: Tokenizer,
    template: AnyTemplate,
    exif: str,
    *,
    placed: bool = False,
    answer: str = "",
) -> EncodedExample:
    """A conversation with an open question as token ids and crops, ready to be placed in a batch.

    Args:
      exif: as in `Options`.
      placed: the words hold their placeholders, as a row of data does; a "<image>" too many is a word there.
      answer: how an answer begins that is read as well; its tokens are supervised.

    Raises:
      RequestError: a turn of the wrong types, a word that the tokenizer has no id for, or another number of placeholders than
        of images. ImageError: an image cannot be read.
    """
    messages: list[Message] = []
    cut: list[CutImage] = []
    for role, words, images in turns if template.takes_system else _system_first(turns):
        if not isinstance(images, list | tuple) or not isinstance(words, str):
            got = f"{type(images).__name__} and {type(words).__name__}"
            raise RequestError(f"a prompt is a list of images and a string, got {got}; give it so")
        if role == "human" and not placed:
            words = place_images(words, len(images), template)
        messages.append(Message(role, words))
        cut += [cut_image(image, config, exif) for image in images]
    try:
        asked = render(messages, template, complete=False)
    except ConversationError as error:
        raise RequestError(str(error)) from error
    plain = asked.words if config.data.control_tokens == "text" else ()
    text = asked.text + (template.opening + answer if answer else "")
    try:
        ids, offsets = encode_with_images(text, tokenizer, has_image=bool(cut), words=plain, bos=asked.bos)
    except ValueError as error:
        raise RequestError(f"the tokenizer cannot read the prompt: {error}") from error
    return replace(example(ids, cut), supervised=offsets[:, 1] > len(asked.text))


def prompt_text(turns: Sequence[Turn], template: AnyTemplate) -> str:
    """What `encode_turns` reads where the words hold their placeholders, as text; an image is "<image>"."""
    given = turns if template.takes_system else _system_first(turns)
    return render([Message(turn.role, turn.words) for turn in given], template, complete=False).text


def _system_first(turns: Sequence[Turn]) -> Sequence[Turn]:
    """A system turn in front of the first question's words, for a template that has no place for it."""
    if len(turns) < 2 or turns[0].role != "system" or turns[1].role != "human":
        return turns
    return [turns[1]._replace(words=f"{turns[0].words}\n\n{turns[1].words}"), *turns[2:]]


def example(ids: np.ndarray, images: Sequence[CutImage]) -> EncodedExample:
    """Token ids i32[n], IMAGE_TOKEN where an image is, with the images."""
    pixels, layouts = tuple(cut.pixels for cut in images), tuple(cut.layout for cut in images)
    return EncodedExample(-1, ids.astype(np.int32), np.zeros(ids.size, bool), pixels, layouts)


def check_context(length: int, max_new_tokens: int, config: Config, name: str = "the prompt", most: int | None = None) -> None:
    """Raise RequestError where prompt and answer do not fit the context that the weights were trained for.

    `length` counts the prompt's tokens with its images. Positions beyond the context give noise that looks like words. `most`
    is a smaller context that there is room for, as in a server.
    """
    context = config.decoder.max_positions if most is None else most
    if length + max_new_tokens <= context:
        return
    shorten = "shorten the prompt or give fewer images"
    move = f"lower max_new_tokens to {context - length}, or shorten the prompt" if length < context else shorten
    whose = "model" if most is None else "server"
    answer = f" and the answer up to {max_new_tokens}" if max_new_tokens else ""
    raise RequestError(
        f"{name} takes {length} tokens with its images{answer}, the context of this {whose} is {context}; {move}"
    )


class PromptShape(NamedTuple):
    """What of prompts decides which program reads them."""

    length: int  # tokens of a row, images and padding included
    images: int  # that a row has room for


def pad_prompts(
    examples: Sequence[EncodedExample], config: Config, *, rows: int | None = None, shape: PromptShape | None = None
) -> Batch:
    """One prompt per row, right padded; rows beyond the prompts (to `rows`) stay blank.

    Without `shape` the length is a bucket, and crop slots and visual tokens are counted by the image-richest prompt: text alone
    costs nothing in the vision tower.
    """
    if shape is None:
        shape = PromptShape(bucket(max(one.length for one in examples)), max(len(one.layouts) for one in examples))
    spec = config.data_spec
    sizes = spec.padded_shape(rows or len(examples), shape.length)
    sizes = sizes._replace(crops=shape.images * spec.layout.max_views, visual=shape.images * spec.layout.max_tokens)
    batch = fill(sizes, [[(one, ExampleSize())] for one in examples], spec.layout.patches).batch
    return batch._replace(example_id=batch.example_id.astype(np.int32))
