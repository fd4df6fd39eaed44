"""Where examples come from: the `Example` that every source yields, and LLaVA JSON files as a random-access source."""

import codecs
import json
import operator
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, SupportsIndex

import numpy as np
from PIL import Image

from deepstack_jax.data.conversation import IMAGE_MARK, ConversationError, Message, parse

_WINDOW_BYTES = 8 << 20
_MAX_ROW_BYTES = 64 << 20
"""A row that does not parse within this much text is malformed; without a bound one missing quote would load the whole file."""

_SPACE = re.compile(r"[ \t\r\n]*")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Example:
    """One conversation with its images, as a source gives it: nothing decoded, templated or tokenised yet.

    Attributes:
        index: row number in its source; becomes `Batch.example_id`.
        name: the id the user knows (JSON "id"), for messages.
        images: in the order of the `<image>` placeholders; each an absolute path, encoded bytes, or decoded pixels
            (`u8[y, x, 3]` or a PIL image).
        messages: the turns, in order.
        info: what a source knows beyond that, e.g. "kinds": one entry per question-answer turn.
    """

    index: int
    name: str
    images: tuple[str | bytes | np.ndarray | Image.Image, ...]
    messages: tuple[Message, ...]
    info: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Random access to examples, as Grain asks of a source."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: SupportsIndex, /) -> Example: ...


class SourceError(ValueError):
    """A data file that cannot be used; nothing of it is trained on."""


class SampleError(SourceError):
    """One row that cannot be used, the others can; `name` is its id, for a quarantine list."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name

    def __reduce__(self):  # the default rebuilds from `args` alone and fails on the way out of a worker process
        return type(self), (str(self), self.name)


class LlavaJson:
    """Rows of a LLaVA JSON file (one array; or one object per line where the name ends in .jsonl), by random access.

    Only the place of each row is kept in memory (12 bytes a row); a row is read and parsed when asked for, so the object is
    cheap to send to worker processes. Images are named, not opened.

    Args:
        path: the JSON file. Rows: `id`, `image` (absent or null = text only; a string, or a list for several), and
            `conversations: [{"from": "human" | "gpt", "value": str}, ...]` with one `<image>` per image.
        image_root: folder that the image paths are relative to.

    Raises:
        SourceError: when the file cannot be read, is not JSON (line, column, last good id), holds no array or no rows.
    """

    def __init__(self, path: str | Path, image_root: str | Path) -> None:
        self.path = os.path.abspath(path)
        self.image_root = os.path.abspath(image_root)
        if not os.path.isdir(self.image_root):
            raise SourceError(f"image root {self.image_root} is not a folder; give the folder that the image paths start from")
        try:
            with open(self.path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                spans = np.fromiter(_row_spans(self.path, file), np.dtype((np.int64, 2)))
        except OSError as error:
            raise SourceError(f"cannot read {self.path}: {error.strerror}; give an existing LLaVA JSON file") from error
        if not len(spans):
            raise SourceError(f"{self.path} holds no rows; expected at least one conversation")
        self._starts = np.ascontiguousarray(spans[:, 0])
        self._lengths = spans[:, 1].astype(np.int32)

    def __len__(self) -> int:
        return len(self._starts)

    def __repr__(self) -> str:  # Grain compares this text when it restores an iterator: no address, no machine's folder
        return f"LlavaJson({os.path.basename(self.path)!r}, rows={len(self)})"

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Row `index`.

        Raises:
            IndexError: outside 0..len-1.
            SampleError: when this row is not a usable conversation; says which row, what is wrong and how to mend it.
            SourceError: when the file changed or vanished since it was opened: the offsets would point anywhere.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside 0..{len(self) - 1} of {self.path}")
        try:
            row = json.loads(self._row_bytes(index).decode("utf-8"))
        except UnicodeDecodeError as error:
            message = f"{self.path} row {index}: not UTF-8 ({error.reason}); save the file as UTF-8"
            raise SampleError(message, f"row {index}") from error
        name = _row_name(row, index)
        try:
            images, messages = _images(row, self.image_root), _messages(row)
            _check_placeholders(messages, len(images))
        except (_RowError, ConversationError) as error:
            raise SampleError(f"{self.path} row {index} (id {name!r}): {error}", name) from None
        return Example(index=index, name=name, images=images, messages=messages)

    def missing_images(self, limit: int) -> list[str]:
        """The first `limit` image files named by usable rows that do not exist, in the order of the rows.

        Looks at names only; a file that exists may still not decode. Rows that raise `SampleError` are left to the reader
        of the rows, who counts them.
        """
        seen: set[str] = set()
        missing: list[str] = []
        for index in range(len(self)):
            try:
                images = self[index].images
            except SampleError:
                continue
            for image in map(str, images):
                if image not in seen and not os.path.isfile(image):
                    missing.append(image)
                seen.add(image)
            if len(missing) >= limit:
                break
        return missing[:limit]

    def _row_bytes(self, index: int) -> bytes:
        try:
            with open(self.path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != self._size:
                    raise SourceError(f"{self.path} changed while in use: {size} bytes, {self._size} when opened; start again")
                file.seek(int(self._starts[index]))
                return file.read(int(self._lengths[index]))
        except OSError as error:
            raise SourceError(f"cannot read {self.path} any more: {error.strerror}; put it back and start again") from error


class _RowError(ValueError):
    """What is wrong with a row, without its place; `LlavaJson` adds file, row and id."""


def _row_name(row: object, index: int) -> str:
    """The row's id as text; "row N" where it has none that can be shown."""
    name = row.get("id") if isinstance(row, dict) else None
    return str(name) if isinstance(name, str | int) and name != "" else f"row {index}"


def _images(row: object, root: str) -> tuple[str, ...]:
    """Absolute image paths of a row, each inside `root` (links inside the root may lead anywhere: the user set them)."""
    if not isinstance(row, dict):
        raise _RowError(f"is a {_json_type(row)}, expected an object with id, image and conversations")
    value = row.get("image")
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name:
            raise _RowError(f"image is {name!r}, expected a path relative to the image root, or a list of them")
        if posixpath.isabs(name) or posixpath.normpath(name).split("/")[0] == "..":
            raise _RowError(f"image {name!r} leaves the image root {root}; make it a path relative to the root")
    return tuple(os.path.join(root, posixpath.normpath(name)) for name in names)


def _messages(row: Any) -> tuple[Message, ...]:
    """The turns of a row, as they stand."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise _RowError('has no conversations; expected [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]')
    messages = parse(turns)
    for number, message in enumerate(messages):
        if _LONE_SURROGATE.search(message.text):
            raise _RowError(f"turn {number} holds half a surrogate pair, which no tokenizer can encode; remove that character")
    return messages


def _check_placeholders(messages: tuple[Message, ...], images: int) -> None:
    """One `<image>` per image: with any other count there is no telling which image belongs where."""
    spoken = messages[1:] if messages[0].role == "gpt" else messages  # templates drop a leading answer, and an image in it
    found = sum(message.text.count(IMAGE_MARK) for message in spoken)
    if found != images:
        mend = "name the missing images" if found > images else f"put one {IMAGE_MARK} per image into a human turn"
        raise _RowError(f"has {found} {IMAGE_MARK} for {images} images, expected {images}; {mend} or remove the surplus")


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]


def _row_spans(path: str, file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(byte offset, byte length) of every row; raises `SourceError` at the first place that is not JSON."""
    rows, last = 0, None
    file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
    scan = _line_spans(file) if path.endswith(".jsonl") else _array_spans(file)
    try:
        for last in scan:
            rows += 1
            yield last
    except _SyntaxError as error:
        last_id = "no good row before it" if last is None else f"last good id {_row_name(_read_row(path, last), rows - 1)!r}"
        line, column = _line_and_column(path, error.offset)
        where = f"{path} line {line} column {column}"
        raise SourceError(f"{where}: {error} (at row {rows}, {last_id}); mend the file there or write it again") from None


class _SyntaxError(ValueError):
    """What is wrong with the file's syntax, and at which byte."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def _json_failure(error: ValueError | RecursionError, start: int = 0) -> tuple[int, str]:
    """Position and reason; nesting too deep and numbers too long for Python have no position, so `start` stands for it."""
    return (error.pos, error.msg) if isinstance(error, json.JSONDecodeError) else (start, str(error))


def _line_spans(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Rows of a JSON-lines file; blank lines are no rows."""
    offset = file.tell()
    for line in file:
        start = offset + len(line) - len(line.lstrip())
        text = line.strip().decode("latin-1")
        if text:
            try:
                json.loads(text)
            except (ValueError, RecursionError) as error:
                at, why = _json_failure(error)
                raise _SyntaxError(f"malformed JSON, {why}", start + at) from None
            yield start, len(text)
        offset += len(line)


def _array_spans(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Rows of a file that is one JSON array."""
    scan = _Scanner(file)
    if scan.peek() != "[":
        raise _SyntaxError("expected one array of rows, [{...}, ...]; one object per line needs the suffix .jsonl", scan.offset)
    scan.position += 1
    if scan.peek() != "]":
        while True:
            scan.peek()
            yield scan.skip_value()
            if scan.peek() == "]":
                break
            if scan.peek() != ",":
                cut = "the array is cut: the file ends before its ]" if not scan.peek() else "expected , or ] after a row"
                raise _SyntaxError(cut, scan.offset)
            scan.position += 1
    scan.position += 1
    if scan.peek():
        raise _SyntaxError("text after the end of the array", scan.offset)


class _Scanner:
    """Walks JSON text through a window, so that a large file is never in memory as a whole.

    Bytes are read as Latin-1: one character per byte, so positions are byte offsets, and JSON's syntax, all ASCII, is
    untouched. The strings inside come out garbled; rows are decoded properly when they are read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._base = file.tell()
        self._text = ""
        self.position = 0

    @property
    def offset(self) -> int:
        return self._base + self.position

    def peek(self) -> str:
        """The next character that is not white space, moving up to it; "" at the end of the file."""
        while True:
            self.position = _SPACE.match(self._text, self.position).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._read_on():
                return ""

    def skip_value(self) -> tuple[int, int]:
        """(offset, length) of the value that starts here, moving past it; raises `_SyntaxError` where it is malformed."""
        while True:
            try:
                end = _DECODER.raw_decode(self._text, self.position)[1]
            except (ValueError, RecursionError) as error:
                if len(self._text) - self.position < _MAX_ROW_BYTES and self._read_on():
                    continue
                raise self._malformed(error) from None
            if end < len(self._text) or not self._read_on():  # a number at the window's edge may go on behind it
                start, self.position = self.position, end
                return self._base + start, end - start

    def _malformed(self, error: ValueError | RecursionError) -> _SyntaxError:
        at, why = _json_failure(error, self.position)
        cut = why.startswith("Unterminated") or at >= len(self._text.rstrip())
        return _SyntaxError(f"{'the array is cut inside a row' if cut else 'malformed JSON'}, {why}", self._base + at)

    def _read_on(self) -> bool:
        """Drop the text already walked and add as much as is still needed; False at the end of the file."""
        pending = len(self._text) - self.position
        more = self._file.read(max(_WINDOW_BYTES, pending))  # doubling keeps one very long row linear
        if more:
            self._base += self.position
            self._text = self._text[self.position :] + more.decode("latin-1")
            self.position = 0
        return bool(more)


def _read_row(path: str, span: tuple[int, int]) -> object:
    with open(path, "rb") as file:
        file.seek(span[0])
        return json.loads(file.read(span[1]).decode("utf-8", "replace"))


def _line_and_column(path: str, offset: int) -> tuple[int, int]:
    """Line and column, both from 1 and in characters, of a byte offset."""
    with open(path, "rb") as file:
        before = file.read(offset)
    line_start = before.rfind(b"\n") + 1
    return before.count(b"\n") + 1, len(before[line_start:].decode("utf-8", "replace")) + 1
