"""Records of a JSON array or of JSON lines by random access: one pass finds where each record is, reading is a range."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

import numpy as np

from deepstack_jax.config import LIMITS, LimitsConfig
from deepstack_jax.data.example import SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.styles import RecordError, record_name
from deepstack_jax.printing import quote

LINE_SUFFIXES = (".jsonl", ".ndjson")

_WINDOW_BYTES = 8 << 20
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SPACE = re.compile(r"[ \t\r\n]*")


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts: carried as text
        return digits


DECODER = json.JSONDecoder(parse_int=_integer)


class JsonRecords:
    """Records of a JSON file (one array; or one object per line where the name ends in .jsonl), by random access.

    Only the place of each record is kept in memory (12 bytes); it is read and parsed when asked for, so the object is cheap to
    send to worker processes. SourceError where the file is not JSON (line, column, last good id), or holds no records.

    Args:
      limits: what a record may take. Without a bound one missing quote, or a file without line ends, would be loaded whole.
    """

    def __init__(self, path: str, limits: LimitsConfig = LIMITS) -> None:
        self.path = path
        try:
            self._size = files.size(path)
            with files.open_binary(path) as file:
                spans = np.fromiter(_row_spans(path, file, limits.text_bytes), np.dtype((np.int64, 2)))
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}; give an existing JSON file of records") from error
        if not len(spans):
            raise SourceError(f"{path} holds no records; expected at least one conversation")
        self._starts = np.ascontiguousarray(spans[:, 0])
        self._lengths = spans[:, 1].astype(np.int32)

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        """Where record `index` is, for messages."""
        return f"{self.path} record {index}"

    def read(self, index: int) -> object:
        """Record `index`, parsed; RecordError where it is not UTF-8, SourceError where the file changed since it was opened."""
        start, length = int(self._starts[index]), int(self._lengths[index])
        try:
            data = files.read_range(self.path, start, length, self._size)
        except OSError as error:
            message = f"cannot read {self.path} any more: {error.strerror}; put it back as it was and start again"
            raise SourceError(message) from error
        return self._parse(data)

    def scan(self) -> Iterator[object]:
        """All records in order, read in one go; None in place of one that cannot be read."""
        with files.open_binary(self.path) as file:
            for start, length in zip(self._starts.tolist(), self._lengths.tolist(), strict=True):
                file.seek(start)
                try:
                    yield self._parse(file.read(length))
                except RecordError:
                    yield None

    def _parse(self, data: bytes) -> object:
        try:
            return DECODER.decode(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RecordError(f"not UTF-8 ({error.reason}); save the file as UTF-8") from error
        except RecursionError as error:  # opening the file stood a few calls less deep
            raise RecordError("is nested too deep; flatten it") from error
        except ValueError as error:  # it was JSON when the file was opened
            raise SourceError(f"cannot read {self.path} any more: it changed while in use; start again") from error


def _row_spans(path: str, file: IO[bytes], most: int) -> Iterator[tuple[int, int]]:
    """(byte offset, byte length) of every record; raises `SourceError` at the first place that is not JSON."""
    rows, last = 0, None
    head = file.read(4)
    if head.startswith((_GZIP, _ZSTD)):
        raise SourceError(f"{path} is compressed, expected JSON as it is; unpack it")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head:
        raise SourceError(f"{path} is UTF-16 or no text, expected JSON as UTF-8; save it as UTF-8")
    file.seek(3 if head.startswith(codecs.BOM_UTF8) else 0)
    scan = _line_spans(file, most) if path.lower().endswith(LINE_SUFFIXES) else _array_spans(file, most)
    try:
        for last in scan:
            rows += 1
            yield last
    except _SyntaxError as error:
        last_id = "no good record before it" if last is None else f"last good id {quote(_name_of(path, last, rows - 1))}"
        line, column = _line_and_column(path, error.offset)
        where = f"{path} line {line} column {column}"
        raise SourceError(f"{where}: {error} (at record {rows}, {last_id}); fix the file there or write it again") from None


class _SyntaxError(ValueError):
    """What is wrong with the file's syntax, and at which byte."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def _json_failure(error: ValueError | RecursionError, start: int = 0) -> tuple[int, str]:
    """Position and reason; nesting too deep has no position, so `start` is given for it."""
    return (error.pos, error.msg) if isinstance(error, json.JSONDecodeError) else (start, str(error))


def _too_long(most: int, offset: int) -> _SyntaxError:
    return _SyntaxError(
        f"a record of more than config.data.limits.text_bytes={most:,}, which may be raised if it is not a slip", offset
    )


def _line_spans(file: IO[bytes], most: int) -> Iterator[tuple[int, int]]:
    """Records of a JSON-lines file; blank lines are not records."""
    offset, is_first = file.tell(), True
    while line := file.readline(most + 1):
        if len(line) > most:
            raise _too_long(most, offset)
        start = offset + len(line) - len(line.lstrip())
        text = line.strip().decode("latin-1")
        if is_first and text.startswith("["):
            raise _SyntaxError("one array of records under a name for JSON lines; rename the file, to end in .json", start)
        if text:
            try:
                DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                at, why = _json_failure(error)
                raise _SyntaxError(f"malformed JSON, {why}", start + at) from None
            yield start, len(text)
            is_first = False
        offset += len(line)


def _array_spans(file: IO[bytes], most: int) -> Iterator[tuple[int, int]]:
    """Records of a file that is one JSON array."""
    scan = _Scanner(file, most)
    if scan.peek() != "[":
        raise _SyntaxError(
            "expected one array of records, [{...}, ...]; one object per line needs the suffix .jsonl", scan.offset
        )
    scan.position += 1
    if scan.peek() != "]":
        while True:
            scan.peek()
            yield scan.skip_value()
            if scan.peek() == "]":
                break
            if scan.peek() != ",":
                cut = "the array is cut: the file ends before its ]" if not scan.peek() else "expected , or ] after a record"
                raise _SyntaxError(cut, scan.offset)
            scan.position += 1
    scan.position += 1
    if scan.peek():
        raise _SyntaxError("text after the end of the array", scan.offset)


class _Scanner:
    """Walks JSON text through a window, so that a large file is never in memory as a whole.

    Bytes are read as Latin-1: one character per byte, so positions are byte offsets, and JSON's syntax, all ASCII, is
    untouched. The strings inside come out garbled; records are decoded properly when they are read.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._most = file, most
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
                end = DECODER.raw_decode(self._text, self.position)[1]
            except (ValueError, RecursionError) as error:
                if len(self._text) - self.position <= self._most and self._read_on():
                    continue
                raise self._malformed(error) from None
            if end - self.position > self._most:
                raise _too_long(self._most, self.offset)
            if end < len(self._text) or not self._read_on():  # a number at the window's edge may go on after it
                start, self.position = self.position, end
                return self._base + start, end - start

    def _malformed(self, error: ValueError | RecursionError) -> _SyntaxError:
        at, why = _json_failure(error, self.position)
        cut = why.startswith("Unterminated") or at >= len(self._text.rstrip())
        if cut and len(self._text) - self.position > self._most:
            return _too_long(self._most, self.offset)
        return _SyntaxError(f"{'the array is cut inside a record' if cut else 'malformed JSON'}, {why}", self._base + at)

    def _read_on(self) -> bool:
        """Drop the text already walked and add as much as is still needed; False at the end of the file."""
        pending = len(self._text) - self.position
        more = self._file.read(max(_WINDOW_BYTES, pending))  # doubling keeps one very long record linear
        if more:
            self._base += self.position
            self._text = self._text[self.position :] + more.decode("latin-1")
            self.position = 0
        return bool(more)


def _name_of(path: str, span: tuple[int, int], number: int) -> str:
    with files.open_binary(path) as file:
        file.seek(span[0])
        try:
            return record_name(DECODER.decode(file.read(span[1]).decode("utf-8", "replace")), number)
        except RecursionError:
            return f"record {number}"


def _line_and_column(path: str, offset: int) -> tuple[int, int]:
    """Line and column, both from 1 and in characters, of a byte offset."""
    line, start, at = 1, 0, 0
    with files.open_binary(path) as file:
        while at < offset:
            block = file.read(min(_WINDOW_BYTES, offset - at))
            if b"\n" in block:
                line += block.count(b"\n")
                start = at + block.rfind(b"\n") + 1
            at += len(block)
        file.seek(start)
        return line, len(file.read(offset - start).decode("utf-8", "replace")) + 1
