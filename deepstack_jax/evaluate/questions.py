"""Which questions a held-out row holds, for every evaluator alike, and what can be known to be wrong before any is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from deepstack_jax.config import Config, DataConfig
from deepstack_jax.data.encode.encoder import BadExample, Encoder, try_row
from deepstack_jax.data.encode.labels import encode_with_images
from deepstack_jax.data.encode.templates import (
    IMAGE_MARK,
    ConversationError,
    Message,
    Rendered,
    Template,
    get_template,
    images_to_front,
    render,
)
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.data.example import Example, Source
from deepstack_jax.data.formats.image_files import DEFAULTS, image_size
from deepstack_jax.data.order.lengths import header_layouts, measure


class AnsweredTurn(NamedTuple):
    """One question of a row that has an answer."""

    turn: int  # which question of the row, from 0
    before: tuple[Message, ...]  # the turns up to the question, which is the last
    images: int  # how many of the row's images, from the first on, stand in these turns
    prompt: Rendered  # these turns as a text that the answer follows
    reference: str
    problem: str  # why no words can match it; "" where they can

    @property
    def words(self) -> str:
        """The question without its images."""
        return self.before[-1].text.replace(IMAGE_MARK, "").strip()


def answered_turns(example: Example, template: Template) -> list[AnsweredTurn]:
    """Every answered question of a row, the true answers of the turns before it given.

    Raises:
      ConversationError: nothing is answered, speakers do not alternate, or images and placeholders differ in number.
    """
    messages = images_to_front(example.messages, template) if example.images else example.messages
    if messages and messages[0].role == "gpt":  # it answers nothing, and templates drop it
        messages = messages[1:]
    shown = [*accumulate(message.text.count(IMAGE_MARK) if example.images else 0 for message in messages)]
    if shown and shown[-1] != len(example.images):
        raise ConversationError(
            f"{example.name}: {shown[-1]} {IMAGE_MARK} in the text, expected {len(example.images)}, one per image; name the "
            "missing images, or write the missing placeholders"
        )
    answers = [number for number, message in enumerate(messages) if message.role == "gpt"]
    if not answers:
        raise ConversationError(f"{example.name}: no answered question; add an answer, or remove the row")
    found = []
    for turn, number in enumerate(answers):
        before, reference = messages[:number], messages[number].text
        prompt = render(before, template, complete=False)
        problem = "its answer holds an image, which no words can match" if shown[number] > shown[number - 1] else ""
        found.append(AnsweredTurn(turn, before, shown[number - 1], prompt, reference, problem))
    return found


def prompts(example: Example, config: Config, visual: Sequence[int]) -> Iterator[tuple[AnsweredTurn, np.ndarray] | BadExample]:
    """The questions of a row as token ids i32[n], IMAGE_TOKEN where an image stands; or why one of them cannot be asked.

    Args:
      visual: visual tokens of each image.

    Raises:
      ConversationError: as `answered_turns`. ValueError: the tokenizer has no id for a word.
    """
    tokenizer, room = load_tokenizer(config.data.tokenizer), config.data.max_length
    room = min(room, config.decoder.max_positions - config.evaluation.max_new_tokens)
    for asked in answered_turns(example, get_template(config.data.template)):
        words = asked.prompt.words if config.data.control_tokens == "text" else ()
        ids, _ = encode_with_images(asked.prompt.text, tokenizer, has_image=bool(example.images), words=words)
        length, problem = ids.size + sum(visual[: asked.images]) - asked.images, asked.problem
        if length > room:
            problem = f"a prompt of {length} tokens with its images, expected {room} at most; raise config.data.max_length"
        yield BadExample(example.index, example.name, f"turn {asked.turn}: {problem}") if problem else (asked, ids)


def uninterrupted(config: Config) -> Config:
    """The same, but a row that is too long is left out and counted: no reason to lose a run that has begun."""
    overlong = "drop" if config.data.overlong == "error" else config.data.overlong
    return replace(config, data=replace(config.data, overlong=overlong))


def check_rows(source: Source, config: Config) -> list[BadExample]:
    """Held-out rows of which a run cannot use all, for the loss or as questions, as far as shows before images are decoded.

    Raises:
      OverlongError: a row is too long, and the configuration says to stop then.
    """
    encoder = Encoder(config)

    def check(example: Example) -> BadExample | None:
        measure(example, encoder)
        visual = [layout.tokens.size for layout in header_layouts(example, config)]
        return next((one for one in prompts(example, config, visual) if isinstance(one, BadExample)), None)

    return _bad(source, range(min(config.evaluation.examples, len(source))), check)


def check_questions(source: Source, rows: range, data: DataConfig = DEFAULTS) -> list[BadExample]:
    """Rows that no model can be asked, as far as shows before one is loaded and images are decoded."""

    def check(example: Example) -> None:
        answered_turns(example, get_template("v1"))
        for image in example.images:
            image_size(image, data)

    return _bad(source, rows, check)


def _bad(source: Source, rows: range, check: Callable[[Example], BadExample | None]) -> list[BadExample]:
    return [bad for row in rows if (bad := try_row(source, row, check)) is not None]
