"""Conversations to token ids, and which tokens are trained.

That is read off the characters of the rendered conversation, never off token counts, so that no tokenizer, template or answer
can shift the labels ("tokenization mismatch" upstream, which blanks the sample).
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from deepstack_jax.data.encode.templates import Rendered
from deepstack_jax.data.encode.tokenizer import Tokenizer
from deepstack_jax.data.example import IMAGE_MARK, ConversationError

IMAGE_TOKEN = -200
CONTROL = "texts whose words hold control tokens such as </s>, read as letters; data.control_tokens=tokens: as upstream does"


@dataclass(frozen=True)
class EncodedText:
    ids: np.ndarray  # i32[n], IMAGE_TOKEN where an image is
    supervised: np.ndarray  # bool[n]
    remarks: tuple[str, ...] = ()  # CONTROL, if it holds


def encode_with_images(
    text: str,
    tokenizer: Tokenizer,
    *,
    has_image: bool = True,
    words: Sequence[tuple[int, int]] = (),
    bos: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids i32[n], with `bos` BOS once at the front, and offsets i32[n, 2]; IMAGE_TOKEN where the text says "<image>".

    The chunks between images are tokenized one by one, as upstream does: each starts like a text of its own. With
    `has_image=False` (a record without images) a literal "<image>" is ordinary text. Inside the spans `words` control
    tokens are read as the letters they are written in.
    """
    ids, offsets = [], []
    if bos and tokenizer.bos_id is not None:
        ids.append(np.array([tokenizer.bos_id], np.int32))
        offsets.append(np.zeros((1, 2), np.int32))
    position = 0
    for number, chunk in enumerate(text.split(IMAGE_MARK) if has_image else [text]):
        if number:
            ids.append(np.array([IMAGE_TOKEN], np.int32))
            offsets.append(np.array([[position, position + len(IMAGE_MARK)]], np.int32))
            position += len(IMAGE_MARK)
        chunk_ids, chunk_offsets = tokenizer.encode(chunk)
        inside = [(start - position, end - position) for start, end in words]
        if plain := control_spans(chunk, chunk_ids, chunk_offsets, inside, tokenizer):
            chunk_ids, chunk_offsets = tokenizer.encode(chunk, plain)
        ids.append(chunk_ids)
        offsets.append(chunk_offsets + np.int32(position))
        position += len(chunk)
    return np.concatenate(ids), np.concatenate(offsets)


def control_spans(
    text: str, ids: np.ndarray, offsets: np.ndarray, words: Sequence[tuple[int, int]], tokenizer: Tokenizer
) -> list[tuple[int, int]]:
    """Where the text, inside `words`, spells out what became one of the tokenizer's control tokens."""
    found = []
    if words:
        for at in np.flatnonzero(np.isin(ids, list(tokenizer.control_tokens))):
            start, end = offsets[at].tolist()
            spelt = _same_letters(text[start:end]) == _same_letters(tokenizer.control_tokens[int(ids[at])])
            if spelt and any(first <= start and end <= last for first, last in words):  # not an unknown letter's <unk>
                found.append((start, end))
    return found


def _same_letters(text: str) -> str:
    """Equal for what a tokenizer's normaliser may take for equal."""
    return unicodedata.normalize("NFKC", text).strip().casefold()


def encode_conversation(
    rendered: Rendered, tokenizer: Tokenizer, *, has_image: bool = True, plain_words: bool = False
) -> EncodedText:
    """Token ids and which of them are trained: those that overlap a supervised span.

    A token without characters goes with the character that follows it. BOS and images are never trained. ConversationError
    where nothing would be trained: such a sample only dilutes a batch and hides a broken record.

    Args:
      plain_words: control tokens inside the turns' words are read as text (`config.data.control_tokens`).
    """
    encode = partial(encode_with_images, rendered.text, tokenizer, has_image=has_image, bos=rendered.bos)
    ids, offsets = encode()
    remarks = ()
    if plain_words and control_spans(rendered.text, ids, offsets, rendered.words, tokenizer):
        ids, offsets = encode(words=rendered.words)
        remarks = (CONTROL,)
    starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    supervised = np.zeros(len(ids), bool)
    for start, end in rendered.spans:
        supervised |= (starts < end) & (ends > start)
    supervised &= ids != IMAGE_TOKEN
    supervised[: 1 if rendered.bos and tokenizer.bos_id is not None else 0] = False
    if not supervised.any():
        raise ConversationError(
            f"no supervised token among {len(ids)}; expected an answer; repair or drop the record; text: {rendered.text!r:.120}"
        )
    return EncodedText(ids, supervised, remarks)
