"""A sequence as text to read: every token's own characters, special tokens and images as labels, and what is supervised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from deepstack_jax.audit.inputs import ModelInput
from deepstack_jax.batch import NEWLINE, ZERO
from deepstack_jax.data.encode.chat_template import SPECIAL
from deepstack_jax.data.encode.templates import AnyTemplate
from deepstack_jax.data.encode.tokenizer import HALF_CHARACTER, Tokenizer, known_ids

_CONTEXT = 8  # tokens before a token that tell whether its text starts with a space


@dataclass(frozen=True)
class PromptPiece:
    """What one place of the sequence reads as: usually one token, several where they make up one character or an image."""

    kind: str  # text | special | image
    text: str
    supervised: bool
    hint: str  # position and id


def special_names(tokenizer: Tokenizer, template: AnyTemplate) -> dict[int, str]:
    """By id, how special tokens are shown: those of the template as it writes them, the tokenizer's own by their role."""
    marks = sorted(set(SPECIAL.findall(template.fixed)))
    ids = {mark: known_ids(mark, tokenizer) for mark in marks}
    names = {found[0]: mark for mark, found in ids.items() if len(found) == 1}
    roles = {tokenizer.pad_id: "PAD", tokenizer.bos_id: "BOS", tokenizer.eos_id: "EOS"}
    return names | {id: role for id, role in roles.items() if id is not None}


def prompt_runs(sample: ModelInput, tokenizer: Tokenizer, names: Mapping[int, str]) -> list[tuple[bool, list[PromptPiece]]]:
    """The whole sequence in order, as runs of (supervised, pieces); special tokens without one of the names show their id.

    Joined, the texts are what the model reads: they come from the token ids, not from the conversation.
    """
    pieces: list[PromptPiece] = []
    before: list[int] = []
    position = 0
    for image, places in groupby(sample.image_of.tolist()):
        count = len(list(places))
        if image >= 0:
            pieces.append(_image(sample, image, position, count))
        else:
            ids = sample.tokens[position : position + count].tolist()
            pieces += _text(sample, ids, position, token_texts(ids, tokenizer, before), names)
            before = ids[-_CONTEXT:]
        position += count
    return [(supervised, list(run)) for supervised, run in groupby(pieces, key=lambda piece: piece.supervised)]


def token_texts(ids: Sequence[int], tokenizer: Tokenizer, before: Sequence[int] = ()) -> list[str | None]:
    """The characters that each token adds; None for a special token, "" where a later one completes the character.

    A tokenizer decodes whole texts: a token alone may lose its space, and half a character shows as a replacement character.
    So each is read off the growth of the text after a few tokens before it.

    Args:
      ids: of a stretch of text, at whose end every character is complete.
      before: ids of the text before it, if any.
    """
    roles = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    found: list[str | None] = []
    context, pending = list(before), []
    for number, id in enumerate(ids):
        settled = tokenizer.decode(context)
        after = tokenizer.decode([*context, *pending, id])
        if id in roles or (not pending and after == settled):
            if pending:  # bytes that no further one completes
                found[-1], pending = tokenizer.decode(context + pending)[len(settled) :], []
            found.append(None)
            continue
        pending.append(id)
        if after.endswith(HALF_CHARACTER) and number + 1 < len(ids):
            found.append("")
            continue
        found.append(after[len(settled) :])
        context, pending = (context + pending)[-_CONTEXT:], []
    return found


def _text(
    sample: ModelInput, ids: list[int], position: int, texts: list[str | None], names: Mapping[int, str]
) -> list[PromptPiece]:
    """The pieces of a stretch of text that begins at `position`."""
    pieces, waiting = [], []
    for here, (id, text) in enumerate(zip(ids, texts, strict=True), position):
        waiting.append(id)
        if text == "":
            continue
        first = here + 1 - len(waiting)
        hint = f"position {here}, id {id}" if first == here else f"positions {first} to {here}, ids {waiting}"
        kind, text = ("special", names.get(id, f"#{id}")) if text is None else ("text", text)
        pieces.append(PromptPiece(kind, text, bool(sample.supervised[here]), hint))
        waiting = []
    return pieces


def _image(sample: ModelInput, image: int, position: int, count: int) -> PromptPiece:
    tokens = sample.images[image].tokens
    newlines, zeros = int(np.sum(tokens == NEWLINE)), int(np.sum(tokens == ZERO))
    extra = [f"{newlines:,} newlines"] * (newlines > 0) + [f"{zeros:,} exact zeros"] * (zeros > 0)
    text = f"image {image + 1}: {count:,} visual tokens" + (f", {' and '.join(extra)} among them" if extra else "")
    return PromptPiece("image", text, False, f"positions {position} to {position + count - 1}")
