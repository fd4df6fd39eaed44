"""Samples of WebDataset tar files by random access: members of one name up to its first dot are a record; nothing is unpacked.

| member | what it is |
|---|---|
| `KEY.json` | the record, in any row style; its other keys are carried along |
| `KEY.txt` | the caption of the sample's images, where no record holds a conversation |
| `KEY.jpg`, `KEY.0.png`, ... | the images of the record, in their order; they take the place of paths that the record names |
"""

import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from deepstack_jax.config import LIMITS, LimitsConfig
from deepstack_jax.data.example import IMAGE_MARK, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.columns import short_reason
from deepstack_jax.data.formats.json_records import DECODER
from deepstack_jax.data.formats.styles import IMAGE_KEYS, STYLES, RecordError
from deepstack_jax.printing import label

_IMAGE, _JSON, _TEXT = range(3)
_KINDS = {"json": _JSON, "txt": _TEXT} | dict.fromkeys(
    ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pfm", "jp2", "avif", "qoi"), _IMAGE
)
_NAME = re.compile(r"((?:.*/)?[^/.][^/.]*)\.(?:[^/]*\.)?([^/.]+)", re.DOTALL)  # the key, and the last suffix
_HEADER_BYTES = 1 << 20  # of one member's headers: names and attributes, which are read into memory
_END = bytes(tarfile.BLOCKSIZE)
_BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError, IndexError)  # all that tarfile makes of damaged headers


class TarRecords:
    """Records of tar files (`parts`, in order, of the `path` that the user named); of a URL a copy is kept.

    Opening goes through the headers of all members, not through their content; kept is where each is (17 bytes, and the keys).

    Raises:
      SourceError: a file is no tar or is cut, holds a link or a device, or none holds a sample.
    """

    def __init__(self, path: str, parts: Sequence[str], limits: LimitsConfig = LIMITS) -> None:
        self.path, self._parts, self._limits = path, tuple(parts), limits
        try:
            self._copies = files.in_parallel(files.local_copy, self._parts)
            self._sizes = [files.size(copy) for copy in self._copies]
        except OSError as error:
            raise SourceError(f"cannot read {error.filename or path}: {error.strerror}; check the path") from error
        self._keys: list[str] = []
        self._firsts: list[int] = []  # record of each part that is its first
        starts, members, others = [], [], Counter[str]()
        for part, copy, size in zip(self._parts, self._copies, self._sizes, strict=True):
            self._firsts.append(len(self._keys))
            for member in _members(part, copy, size, others):
                if len(self._keys) == self._firsts[-1] or member.key != self._keys[-1]:
                    self._keys.append(member.key)
                    starts.append(len(members))
                members.append(member[1:])
        if not members:
            raise SourceError(f"{path} holds no samples; expected members such as 0001.jpg and 0001.json or 0001.txt")
        if others:
            held = ", ".join(f"{label(name)} {count:,}" for name, count in others.most_common(8))
            warnings.warn(f"{path}: members that are not read, as images, .json and .txt are: {held}", stacklevel=2)
        self._starts = np.array([*starts, len(members)], np.int64)
        kinds, offsets, sizes = zip(*members, strict=True)
        self._kinds, self._spans = np.array(kinds, np.uint8), np.array([offsets, sizes], np.int64).T

    def __len__(self) -> int:
        return len(self._keys)

    def place(self, index: int) -> str:
        """The file of a record and its number there, for messages."""
        part = self._part(index)
        return f"{self._parts[part]} record {index - self._firsts[part]}"

    def read(self, index: int) -> object:
        """Record `index` as a dict.

        RecordError where its members do not make one, or are beyond the limits; SourceError where the file changed since.
        """
        return self._row(index, with_images=True)

    def scan(self) -> Iterator[object]:
        """All records in order without the images inside; None in place of one that cannot be read."""
        for index in range(len(self)):
            try:
                yield self._row(index, with_images=False)
            except RecordError:
                yield None

    def _row(self, index: int, *, with_images: bool) -> dict[str, Any]:
        held = range(self._starts[index], self._starts[index + 1])
        by_kind = [[member for member in held if self._kinds[member] == kind] for kind in (_IMAGE, _JSON, _TEXT)]
        images, records, texts = by_kind
        for suffix, found in (("json", records), ("txt", texts)):
            if len(found) > 1:
                raise RecordError(f"has {len(found)} members .{suffix}, expected one; merge them or remove the others")
        for members, key, most in (
            (records + texts, "text_bytes", self._limits.text_bytes),
            (held, "row_bytes", self._limits.row_bytes),
        ):
            if (size := int(sum(self._spans[member, 1] for member in members))) > most:
                raise RecordError(
                    f"takes {size:,} bytes, allowed are config.data.limits.{key}={most:,}; raise that, or remove the sample"
                )
        row = _parsed(self._bytes(index, records[0])) if records else {}
        if texts and not any(row.get(style) is not None for style in STYLES):
            row["conversations"] = _captioned(self._bytes(index, texts[0]), len(images))
        if images:
            row = {key: value for key, value in row.items() if key not in IMAGE_KEYS}
            row["images"] = [self._bytes(index, member) for member in images] if with_images else []
        return row if row.get("id") is not None else row | {"id": self._keys[index]}

    def _part(self, index: int) -> int:
        return int(np.searchsorted(self._firsts, index, side="right")) - 1

    def _bytes(self, index: int, member: int) -> bytes:
        part = self._part(index)
        offset, size = map(int, self._spans[member])
        try:
            return files.read_range(self._copies[part], offset, size, self._sizes[part])
        except OSError as error:
            message = f"cannot read {self._parts[part]} any more: {error.strerror}; put it back as it was and start again"
            raise SourceError(message) from error


class _Member(NamedTuple):
    """A member that is read: the key of its sample, what it is, and where its content lies."""

    key: str
    kind: int
    offset: int
    size: int


class _Headers:
    """A file for tarfile, which reads nothing but headers: no more than `_HEADER_BYTES` between two calls of `next`.

    Names and attributes as long as the file says would fill the memory, and headers that lead back to themselves never end.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell
        self.next()

    def next(self) -> None:
        """The headers of another member begin."""
        self._left = _HEADER_BYTES

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise tarfile.ReadError(f"the headers of a member take more than {_HEADER_BYTES:,} bytes")
        return self._file.read(size)


def _members(path: str, copy: str, size: int, others: Counter[str]) -> Iterator[_Member]:
    """The members to read, in order; the others are counted in `others` by their last suffix. `SourceError` as `TarRecords`."""
    try:
        with files.open_binary(copy) as file:
            headers, end = _Headers(file), 0
            tar = tarfile.TarFile(fileobj=headers, mode="r")  # pyright: ignore[reportArgumentType]
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # or all are kept
                headers.next()
                if not (end < tar.offset <= size and 0 <= member.size <= size - member.offset_data):
                    raise tarfile.ReadError("a member is longer than the file, or leads back")
                end = tar.offset
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise SourceError(
                        f"{path}: member {label(member.name)} is a link, a device or sparse, expected whole files; write it "
                        "again without that"
                    )
                found = _NAME.fullmatch(member.name)
                kind = _KINDS.get(found[2].lower()) if found else None
                if found and kind is not None:
                    yield _Member(found[1], kind, member.offset_data, member.size)
                else:
                    others[f".{found[2]}" if found else "without a suffix"] += 1
            file.seek(tar.offset)
            if file.read(len(_END)) != _END:  # tarfile ends at anything that is no header
                raise tarfile.ReadError(f"its end mark is missing at byte {tar.offset:,}")
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}; check the path") from error
    except _BROKEN as error:
        raise SourceError(f"{path} is damaged, cut short or no tar ({short_reason(error)}); fetch or write it again") from error


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        row = DECODER.decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"its .json is none ({short_reason(error)}); write it again") from error
    if not isinstance(row, dict):
        raise RecordError("its .json is no object, expected one with conversations, or with what goes with a .txt")
    return row


def _captioned(data: bytes, images: int) -> list[dict[str, str]]:
    if not images:
        raise RecordError("is a .txt without an image; expected the caption of one, or a conversation in a .json")
    try:
        caption = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise RecordError(f"its .txt is not UTF-8 ({error.reason}); save it as UTF-8") from error
    return [{"from": "human", "value": "\n".join([IMAGE_MARK] * images)}, {"from": "gpt", "value": caption}]
