"""Which questions a held-out row holds, and what can be known to be wrong with them before any is asked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from string import ascii_uppercase
from typing import Any

import numpy as np

from deepstack_jax.config import Config, DataConfig
from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.data.encode.chat_template import open_template
from deepstack_jax.data.encode.encoder import Encoder, try_record
from deepstack_jax.data.encode.sizes import header_layouts, measure
from deepstack_jax.data.encode.templates import AnyTemplate, checked_turns, get_template, images_to_front
from deepstack_jax.data.encode.tokenizer import Tokenizer, load_tokenizer
from deepstack_jax.data.example import IMAGE_MARK, BadExample, ConversationError, Example, Source
from deepstack_jax.data.formats.image_files import image_size
from deepstack_jax.generate.options import RequestError
from deepstack_jax.generate.prompts import CutImage, Turn, encode_turns


@dataclass(frozen=True)
class Question:
    """A prompt of a row, by its number in the source, and what is right to say to it."""

    row: int
    id: str  # that the user knows
    turn: int  # which question of the row, from 0
    kind: str  # group in which its scores are also averaged; "all" = none
    turns: tuple[Turn, ...]  # the conversation up to the question, which is the last turn
    references: tuple[str, ...]  # right answers
    problem: str = ""  # why it cannot be asked; "" where it can
    options: tuple[str, ...] = ()  # of a multiple choice, in the order of their letters
    # What reading the answer, numbers of the set and files for its server need beyond that; as JSON has it
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the options: what the likelihoods are compared of, where a task chooses so."""
        return tuple(ascii_uppercase[: len(self.options)])

    @property
    def words(self) -> str:
        """The question without its images."""
        return self.turns[-1].words.replace(IMAGE_MARK, "").strip()


def answered_turns(example: Example, images: Sequence[Any], template: AnyTemplate) -> list[Question]:
    """Every answered question of a row, the true answers of the turns before it given.

    Args:
      images: those of the row, in whatever form they are to be asked.

    Raises:
      ConversationError: nothing is answered, speakers do not alternate, or images and placeholders differ in number.
    """
    messages = images_to_front(example.messages, template) if images else example.messages
    if messages and messages[0].role == "gpt":  # it answers nothing, and templates drop it
        messages = messages[1:]
    shown = [0, *accumulate(message.text.count(IMAGE_MARK) if images else 0 for message in messages)]
    if messages and shown[-1] != len(images):
        raise ConversationError(
            f"{example.name}: {shown[-1]} {IMAGE_MARK} in the text, expected {len(images)}, one per image; name the "
            "missing images, or write the missing placeholders"
        )
    found, turns = list[Question](), list[Turn]()
    for number, message in enumerate(messages):
        mine = images[shown[number] : shown[number + 1]]
        if message.role == "gpt":
            checked_turns(messages[:number], complete=False)  # raises where speakers do not alternate
            problem = "its answer holds an image, which no words can match" if mine else ""
            turn, kind = len(found), _kind(example, len(found))
            found.append(Question(example.index, example.name, turn, kind, tuple(turns), (message.text,), problem))
        turns.append(Turn(message.role, message.text, mine))
    if not found:
        raise ConversationError(f"{example.name}: no answered question; add an answer, or remove the row")
    return found


def _kind(example: Example, turn: int) -> str:
    """What the source calls this question; "all" where it has no name, as a stranger's row may hold anything."""
    kinds = example.info.get("kinds")
    kind = kinds[turn] if isinstance(kinds, list | tuple) and turn < len(kinds) else None
    return kind if isinstance(kind, str) else "all"


def encode_for_row(
    turns: Sequence[Turn], config: Config, tokenizer: Tokenizer, *, placed: bool = True, answer: str = ""
) -> EncodedExample:
    """A prompt as a row of a training run holds it; RequestError where that, or the model with the answer, has no room."""
    data = config.data
    template = open_template(data.template, tokenizer)
    prompt = encode_turns(turns, config, tokenizer, template, data.exif, placed=placed, answer=answer)
    room = min(config.data.max_length, config.decoder.max_positions - config.evaluation.max_new_tokens)
    if prompt.length > room:
        raise RequestError(
            f"a prompt of {prompt.length} tokens with its images, expected {room} at most; raise config.data.max_length"
        )
    return prompt


def uninterrupted(config: Config) -> Config:
    """The same, but a row that is too long is left out and counted: no reason to lose a run that has begun."""
    overlong = "drop" if config.data.overlong == "error" else config.data.overlong
    return replace(config, data=replace(config.data, overlong=overlong))


def check_rows(source: Source, config: Config) -> list[BadExample]:
    """Held-out rows of which a run cannot use all, for the loss or as questions, as far as shows before images are decoded.

    Raises:
      OverlongError: a row is too long, and the configuration says to stop then.
    """
    encoder = Encoder(config.data_spec)
    tokenizer = load_tokenizer(config.data.tokenizer)
    template = open_template(config.data.template, tokenizer)
    no_pixels = np.zeros(0, np.uint8)

    def check(example: Example) -> BadExample | None:
        measure(example, encoder)
        images = [CutImage(no_pixels, layout) for layout in header_layouts(example, config.data_spec)]
        for question in answered_turns(example, images, template):
            try:
                if question.problem:
                    raise RequestError(question.problem)
                encode_for_row(question.turns, config, tokenizer)
            except RequestError as error:
                return BadExample(example.index, example.name, f"turn {question.turn}: {error}")
        return None

    return _bad(source, range(min(config.evaluation.examples, len(source))), check)


def check_questions(
    source: Source,
    rows: range,
    data: DataConfig,
    questions: Callable[[Example, Sequence[Any], AnyTemplate], object] = answered_turns,
) -> list[BadExample]:
    """Rows that no model can be asked, as far as shows before one is loaded and images are decoded."""

    def check(example: Example) -> None:
        questions(example, example.images, get_template("v1"))
        for image in example.images:
            image_size(image, data)

    return _bad(source, rows, check)


def _bad(source: Source, rows: range, check: Callable[[Example], BadExample | None]) -> list[BadExample]:
    return [bad for row in rows if (bad := try_record(source, row, check, lost=True)) is not None]
