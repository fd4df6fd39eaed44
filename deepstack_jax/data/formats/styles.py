"""Records of the field's data sets, told apart by their keys, into one `Example`; placeholders are made to agree with images.

| key | style | images | where they are |
|---|---|---|---|
| `conversations` | LLaVA: [{"from": "human" or "gpt", "value": text}] | `image` or `images` | at `<image>` in the text |
| `messages` | TRL: [{"role", "content": text or parts}] | `images` or `image` | image parts, else before the first question |
| `texts` | The Cauldron, FineVision: [{"user", "assistant"}] | `images` or `image` | before the first question |
"""

import posixpath
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import unquote

from deepstack_jax.data.example import IMAGE_MARK, RATINGS, Example, Message, RecordMetadata
from deepstack_jax.data.formats import files
from deepstack_jax.errors import UserError
from deepstack_jax.printing import label, plural

IMAGE_KEYS = ("image", "images")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_INLINE = ("image", "image_url", "url", "path", "base64")  # keys of a part of content that brings its image along
_ROLES = {"user": "human", "assistant": "gpt"}


class RecordError(UserError):
    """What is wrong with a record, without its place; the source adds file, record and id."""


def to_example(row: object, index: int, image_root: str) -> Example:
    """The Example of a parsed record of any style, as record `index` of its source.

    Args:
      row: as JSON, parquet or arrow give it: a dict; images as a path, encoded bytes or {"bytes", "path"}, one or a list.
      image_root: absolute folder or URL that image paths start from; "" = there is none.

    Raises:
      RecordError, ConversationError: no conversation, or nothing tells which image belongs where.
    """
    if not isinstance(row, dict):
        raise RecordError(f"is {_kind(row)}, expected an object with id, image and conversations")
    style = _style(row)
    images = tuple(image_value(value, image_root) for value in _image_values(row))
    messages = tuple(_READERS[style](_turns(row[style], style), len(images)))
    check_messages(messages, len(images))
    info = {key: value for key, value in row.items() if value is not None and key not in ("id", *IMAGE_KEYS, style)}
    return Example(index, record_name(row, index), images, messages, info)


def check_messages(messages: tuple[Message, ...], images: int) -> None:
    """Refuse what is not a conversation about so many images, whatever it was read from; RecordError or ConversationError."""
    if not messages:
        raise RecordError("has no turns; expected a question and an answer")
    for number, message in enumerate(messages):
        if message.role not in ("human", "gpt", "system") or not isinstance(message.text, str):
            raise RecordError(f"turn {number}: got {message!r:.120}, expected a human or gpt and its text")
        if message.role == "system" and number:
            raise RecordError(f"turn {number} is a system prompt, expected it first; put it there, or remove the turn")
        if _LONE_SURROGATE.search(message.text):
            raise RecordError(f"turn {number} holds half a surrogate pair, which no tokenizer can encode; remove it")
    for number, (before, message) in enumerate(pairwise(messages), 1):  # which speaker may end it, the use decides
        if message.role == before.role:
            expected = "human" if message.role == "gpt" else "gpt"
            raise RecordError(f"turn {number}: got {message.role!r}, expected {expected!r}; turns alternate, join them")
    first = next((message for message in messages if message.role != "system"), None)
    silent = first if first is not None and first.role == "gpt" else None  # templates drop it, and an image in it
    found = sum(message.text.count(IMAGE_MARK) for message in messages if message is not silent)
    if found != images:  # nothing would tell which image belongs where
        mend = "name the missing images" if found > images else f"put one {IMAGE_MARK} per image into a human turn"
        raise RecordError(
            f"has {found} {IMAGE_MARK} for {plural(images, 'image')}, expected {images}; {mend} or remove the surplus"
        )


def to_metadata(row: object, index: int) -> RecordMetadata:
    """The RecordMetadata of a record, or of the few columns of it that were read; paths that none may have are left out."""
    if not isinstance(row, dict):
        return RecordMetadata(record_name(row, index), (), "")
    try:
        values = _image_values(row)
    except RecordError:
        values = []
    named = [value.get("path") if isinstance(value, dict) and not value.get("bytes") else value for value in values]
    paths = tuple(posixpath.normpath(value) for value in named if isinstance(value, str) and value and not _escapes(value))
    ratings = tuple(_worst(row, name) for name in RATINGS)
    rated = any(rating is not None for rating in ratings)
    return RecordMetadata(record_name(row, index), paths, _source(row), ratings if rated else ())


def _source(row: dict[str, Any]) -> str:
    """The set that a record was taken from: as it says itself, else as its first turn does in the Cauldron's style."""
    turns = row.get("texts")
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    found = (row.get("data_source"), row.get("source"), first.get("source"))
    return next((value for value in found if isinstance(value, str)), "")


def _worst(row: dict[str, Any], name: str) -> float | None:
    """The worst rating of a record's turns by this name; None = none is known."""
    listed = row.get(f"{name}_ratings")
    values = [row.get(f"{name}_min"), *(listed if isinstance(listed, list) else ())]
    known = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return min(known, default=None)


def record_name(row: object, index: int) -> str:
    """The row's id as text; "row N" where it has none that can be shown."""
    name = row.get("id") if isinstance(row, dict) else None
    if not isinstance(name, str | int) or name == "":
        return f"record {index}"
    return str(name).encode("utf-8", "backslashreplace").decode()  # half a surrogate could not be written into any report


def check_columns(columns: list[str]) -> str:
    """What is wrong with the columns of a table, as the end of a sentence; "" where its records can be conversations."""
    if twice := [name for name in needed_keys() if columns.count(name) > 1]:
        return f"has the column {twice[0]} {columns.count(twice[0])} times, expected once; rename or remove the others"
    if set(columns) & set(_READERS):
        return ""
    return f"has the columns {', '.join(columns) or '(none)'}; expected one of {', '.join(_READERS)}, rename the one that is it"


def needed_keys() -> tuple[str, ...]:
    """What of a record decides what is trained on, or how it is chosen and named; everything else is carried along."""
    return ("id", "data_source", *IMAGE_KEYS, *_READERS)


class Columns(NamedTuple):
    """What the rows of a table are read for."""

    needed: tuple[str, ...]  # without which a row is of no use
    outline: tuple[str, ...]  # that a pass over all rows reads
    problem: Callable[[list[str]], str]  # what is wrong with the table's columns; "" where nothing is
    alone: bool = False  # other columns are not read

    @staticmethod
    def of(needed: tuple[str, ...], outline: tuple[str, ...]) -> "Columns":
        """Those of a table that must hold all of `needed`, of which nothing else is read."""

        def problem(columns: list[str]) -> str:
            lost = [name for name in needed if name not in columns]
            return f"has no column {', '.join(lost)}, but {', '.join(columns)}; name a table that has it" if lost else ""

        return Columns(needed, outline, problem, alone=True)


def _style(row: dict[str, Any]) -> str:
    found = [key for key in _READERS if row.get(key) is not None]
    if len(found) > 1:
        raise RecordError(f"has {' and '.join(found)}, expected one of them; remove the one that is not to be trained on")
    if not found:
        held = label(", ".join(map(str, row))) or "nothing"
        raise RecordError(f"has no conversations, messages or texts, but {held}; name the turns by one of these keys")
    return found[0]


def _turns(value: object, style: str) -> list[dict[str, Any]]:
    """Turns one by one, also where `datasets` stored them column by column: {"from": [...], "value": [...]}."""
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise RecordError(
                f"has columns of turns that differ in length ({label(', '.join(map(str, value)))}); write the table again"
            )
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise RecordError(f"has no {style}; expected {_EXPECTED[style]}")
    return value


def _image_values(row: dict[str, Any]) -> list[Any]:
    """What the record gives for each image, unread."""
    given = [key for key in IMAGE_KEYS if row.get(key) is not None and row[key] != []]
    if len(given) > 1:
        raise RecordError("has image and images, expected one of them; remove the other")
    value = row[given[0]] if given else []
    return value if isinstance(value, list) else [value]


def image_value(value: object, root: str) -> str | bytes:
    """Encoded bytes, or an absolute path inside `root` (links inside the root may lead anywhere: the user set them)."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        if value.get("path") is None:
            raise RecordError("image holds neither bytes nor a path, expected one of them; write the table again")
        value = value["path"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value or "\0" in value or _LONE_SURROGATE.search(value):
        raise RecordError(f"image is {value!r:.80}, expected a path relative to the image root, or a list of them")
    if value.startswith("data:"):
        raise RecordError(f"image {value!r:.40} is its content, expected a path; write it to a file, or as bytes into a table")
    if not root:
        raise RecordError(f"image {value!r:.200} is a path, but there is no image root; give the folder that it starts from")
    read_as = [value, unquote(value)] if files.is_url(root) else [value]  # some servers decode "%2e%2e" by themselves
    if any(map(_escapes, read_as)):
        raise RecordError(f"image {value!r:.200} leaves the image root {root}; make it a path relative to the root")
    if files.is_url(value) or (files.is_url(root) and any(mark in value for mark in ("::", "?", "#"))):
        raise RecordError(f"image {value!r:.200} is not a path under the image root {root}; put it there and name its path")
    return files.under(root, posixpath.normpath(value))


def _escapes(name: str) -> bool:
    return posixpath.isabs(name) or posixpath.normpath(name).split("/")[0] == ".."


def _llava(turns: list[dict[str, Any]], _images: int) -> list[Message]:
    for number, turn in enumerate(turns):
        role, text = turn.get("from"), turn.get("value")
        if role not in ("human", "gpt", "system") or not isinstance(text, str):
            expected = "{'from': 'human' or 'gpt', 'value': text}"
            raise RecordError(f"turn {number}: got {turn!r:.120}; expected {expected}")
    return [Message(turn["from"], turn["value"]) for turn in turns]


def _trl(turns: list[dict[str, Any]], images: int) -> list[Message]:
    messages = []
    for number, turn in enumerate(turns):
        role = turn.get("role")
        if role not in (*_ROLES, "system"):
            raise RecordError(f"turn {number}: role is {role!r:.40}, expected 'user' or 'assistant'; remove or rename the turn")
        messages.append(Message(_ROLES.get(role, "system"), _content(turn.get("content"), number, images)))
    return _images_first(messages, images) if all(isinstance(turn["content"], str) for turn in turns) else messages


def _content(content: object, turn: int, images: int) -> str:
    """Text of a TRL message: its parts one after the other, as chat templates join them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RecordError(f"turn {turn}: content is {_kind(content)}, expected a text or a list of parts")
    pieces = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if not images and isinstance(part, dict) and any(part.get(key) for key in _INLINE):
            names = label(", ".join(map(str, part)))
            raise RecordError(
                f"turn {turn}: an image inside content ({names}); name it in `images` of the record, in the parts' order, "
                'and leave {"type": "image"} in its place'
            )
        if kind == "image":
            pieces.append(IMAGE_MARK)
        elif kind == "text" and isinstance(text, str):
            pieces.append(text)
        else:
            expected = '{"type": "text", "text": ...} or {"type": "image"}'
            raise RecordError(f"turn {turn}: part {part!r:.80} of content, expected {expected}; write it as one of them")
    return "".join(pieces)


def _cauldron(turns: list[dict[str, Any]], images: int) -> list[Message]:
    messages = []
    for number, turn in enumerate(turns):
        for key, role in _ROLES.items():
            if not isinstance(turn.get(key), str):
                raise RecordError(f"texts {number}: {key} is {_kind(turn.get(key))}, expected a text; fix or remove the turn")
            messages.append(Message(role, turn[key]))
    return _images_first(messages, images)


_READERS: dict[str, Callable[[list[dict[str, Any]], int], list[Message]]] = {
    "conversations": _llava,
    "messages": _trl,
    "texts": _cauldron,
}
STYLES = tuple(_READERS)
TURN_SOURCES = re.compile(r"texts\..+\.source")
"""Path of the leaf of a table that holds the sources of turns."""
_RATED = tuple(f"{name}_{end}" for name in RATINGS for end in ("min", "ratings"))
CONVERSATIONS = Columns(needed_keys(), ("id", "data_source", "source", *IMAGE_KEYS, *_RATED), check_columns)
_EXPECTED = {
    "conversations": '[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]',
    "messages": '[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]',
    "texts": '[{"user": ..., "assistant": ...}]',
}


def _images_first(messages: list[Message], images: int) -> list[Message]:
    """All images in front of the first question, where the style has no placeholders and the record none of its own."""
    first = next((number for number, message in enumerate(messages) if message.role == "human"), None)
    if first is not None and not any(IMAGE_MARK in message.text for message in messages):
        messages[first] = Message("human", f"{IMAGE_MARK}\n" * images + messages[first].text)
    return messages


def _kind(value: object) -> str:
    """The value's type by JSON's name, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
