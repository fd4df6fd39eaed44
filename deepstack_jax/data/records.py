"""Examples with their images inside, as ArrayRecord shards and a manifest: what `prepare` writes and training reads fastest.

A folder holds `shard-00000.array_record`, ... and `manifest.json`, which is written last: a folder without it is not finished.
A record is msgpack of [name, [[role, text], ...], [encoded image, ...], info]; inside info, extension 1 is a tuple
(msgpack of its list) and extension 2 an array (msgpack of [dtype, shape, bytes in C order]).
Shards are uncompressed with one record per chunk (images are compressed already), so the same examples give the same bytes.
"""

import bisect
import hashlib
import json
import operator
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import accumulate
from typing import Any, NamedTuple, SupportsIndex

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from deepstack_jax.data import files
from deepstack_jax.data.conversation import Message
from deepstack_jax.data.image import open_image
from deepstack_jax.data.sources import Example, Outline, SampleError, SourceError

MANIFEST = "manifest.json"
SUFFIX = ".array_record"

_FORMAT = "deepstack_jax examples"
_VERSION = 1
_TUPLE, _ARRAY = 1, 2  # msgpack extensions
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0"  # rows are asked for in any order
_BLOCK = 8 << 20


class Shard(NamedTuple):
    """One file as the manifest lists it."""

    file: str
    rows: int
    bytes: int
    sha256: str


class RecordWriter:
    """Writes examples into shards; a context manager. Nothing that is half written carries a final name.

    Left without an exception it writes the manifest, with rows, bytes and images in all; left with one, it leaves a folder
    that readers refuse and that the same command may write again.

    Args:
        folder: a local folder, made if need be, or a URL. Shards of an unfinished run in it are replaced.
        source: what the examples were made from, for the manifest; anything that JSON can hold.
        shard_bytes: size at which a new shard begins.

    Raises:
        SourceError: the folder holds a finished set already, or cannot be written.
    """

    def __init__(self, folder: str, source: Mapping[str, Any], shard_bytes: int = 256 << 20) -> None:
        self.folder, self._source, self._limit = files.absolute(folder), dict(source), shard_bytes
        self._shards: list[Shard] = []
        self._writer: Any = None
        self._rows = self._bytes = self._images = 0
        try:
            self._clear()
            beside = None if files.is_url(self.folder) else self.folder
            self._scratch = tempfile.TemporaryDirectory(dir=beside, prefix=".writing-")
        except OSError as error:
            raise SourceError(f"cannot write to {self.folder}: {error.strerror}; name another folder") from error

    def _clear(self) -> None:
        """Make the folder; remove shards that no manifest names."""
        if not files.is_url(self.folder):
            os.makedirs(self.folder, exist_ok=True)
        elif not files.is_folder(self.folder):
            return
        held = files.names(self.folder)
        if MANIFEST in held:
            raise SourceError(f"{self.folder} holds a finished set of examples already; name another folder or delete it")
        for name in held:
            if name.startswith("shard-") and name.endswith(SUFFIX):
                files.remove(files.under(self.folder, name))

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish_shard()
                if not self._shards:
                    raise SourceError(f"{self.folder}: no example was written; a set needs at least one")
                self._write_manifest()
            elif self._writer is not None:
                self._writer.close()
        finally:
            self._scratch.cleanup()

    def write(self, example: Example) -> None:
        """Append an example; its row number becomes its place in the shards, its `index` is not kept.

        Raises:
            SampleError: an image cannot be read, or `info` holds what msgpack cannot; nothing of the example was written.
        """
        record = encode_example(example)
        if self._writer is None:
            self._writer = ArrayRecordWriter(os.path.join(self._scratch.name, "shard"), _WRITER_OPTIONS)
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise SourceError(f"cannot write to {self.folder}: {error}; is the disk full?") from error
        self._rows += 1
        self._bytes += len(record)
        self._images += len(example.images)
        if self._bytes >= self._limit:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except RuntimeError as error:
            raise SourceError(f"cannot write to {self.folder}: {error}; is the disk full?") from error
        scratch = os.path.join(self._scratch.name, "shard")
        written = _count(scratch)
        if written != self._rows:  # a full disk shows here
            raise SourceError(f"{self.folder}: {written} of {self._rows} rows of a shard were written; is the disk full?")
        shard = Shard(f"shard-{len(self._shards):05d}{SUFFIX}", self._rows, os.path.getsize(scratch), _sha256(scratch))
        files.publish(scratch, files.under(self.folder, shard.file))
        self._shards.append(shard)
        self._writer, self._rows, self._bytes = None, 0, 0

    def _write_manifest(self) -> None:
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "source": self._source,
            "rows": sum(shard.rows for shard in self._shards),
            "images": self._images,
            "bytes": sum(shard.bytes for shard in self._shards),
            "shards": [shard._asdict() for shard in self._shards],
        }
        scratch = os.path.join(self._scratch.name, MANIFEST)
        with open(scratch, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False)
        files.publish(scratch, files.under(self.folder, MANIFEST))


class RecordShards:
    """Examples of a folder that `RecordWriter` wrote, by random access over all shards; images come as encoded bytes.

    Only the manifest is kept, so the object is cheap to send to workers; each opens the shards that it reads. Of a folder
    behind a URL, each shard that is read is copied once (`files.local_copy`).

    Args:
        folder: local folder or URL.

    Raises:
        SourceError: no manifest or none of ours, a shard missing, cut short or with another number of rows than the manifest
            says: all of them are named. Content is not compared; `verify` does.
    """

    def __init__(self, folder: str) -> None:
        self.folder = files.absolute(folder)
        self.manifest = read_manifest(self.folder)
        self._shards = [Shard(**shard) for shard in self.manifest["shards"]]
        _refuse(self.folder, _problems(self.folder, self._shards))
        self._ends = list(accumulate(shard.rows for shard in self._shards))
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._readers: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_readers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:  # Grain compares this text when it restores an iterator: no address, no machine's folder
        digest = hashlib.sha256("".join(shard.sha256 for shard in self._shards).encode()).hexdigest()[:16]
        return f"RecordShards(rows={len(self)}, sha256={digest!r})"

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Example `index`.

        Raises:
            IndexError: outside 0..len-1.
            SampleError: the record is damaged; the others may be whole.
            SourceError: its shard vanished or changed since the folder was opened.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside 0..{len(self) - 1} of {self.folder}")
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number] - self._shards[number].rows)
        reader = self._reader(number)
        try:
            return decode_example(reader.read([row])[0], index)
        except (RuntimeError, ValueError, TypeError, msgpack.UnpackException) as error:
            where = files.under(self.folder, self._shards[number].file)
            reason = " ".join(str(error).split())[:200]
            raise SampleError(f"{where} row {row}: damaged ({reason}); fetch or prepare it again", f"row {index}") from error

    def outlines(self) -> Iterator[Outline]:
        """Name and data_source of every example; reads everything, since a record is read as a whole."""
        for index in range(len(self)):
            try:
                example = self[index]
            except SampleError as error:
                yield Outline(error.name, (), "")
                continue
            source = example.info.get("data_source")
            yield Outline(example.name, (), source if isinstance(source, str) else "")

    def missing_images(self, rows: int) -> list[str]:
        """None: the images are inside."""
        return []

    def _reader(self, number: int) -> Any:
        with self._lock:
            if number not in self._readers:
                shard = self._shards[number]
                path = files.under(self.folder, shard.file)
                try:
                    copy = files.local_copy(path)
                except OSError as error:
                    raise SourceError(f"cannot read {path} any more: {error.strerror}; put it back, start again") from error
                rows = _count(copy)
                if rows != shard.rows:
                    raise SourceError(f"{path} changed while in use: {rows} rows, {shard.rows} in {MANIFEST}; start again")
                self._readers[number] = ArrayRecordReader(copy, options=_READER_OPTIONS, file_reader_buffer_size=32768)
            return self._readers[number]


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of a finished folder; SourceError where there is none of ours."""
    path = files.under(files.absolute(folder), MANIFEST)
    try:
        manifest = json.loads(files.read_bytes(path))
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; a folder without it is not finished, prepare it again"
        raise SourceError(message) from error
    except ValueError as error:
        raise SourceError(f"{path} is no JSON ({error}); fetch it again, or prepare the folder again") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    if found != (_FORMAT, _VERSION):
        raise SourceError(f"{path} says format, version {found}, expected {(_FORMAT, _VERSION)}; prepare it with this release")
    try:
        shards = [Shard(**shard) for shard in manifest["shards"]]
        rows = sum(shard.rows for shard in shards)
        whole = 0 < rows == manifest["rows"] and all("/" not in shard.file for shard in shards)
    except (KeyError, TypeError) as error:
        raise SourceError(f"{path} lacks or misnames an entry ({error}); prepare the folder again") from error
    if not whole:
        raise SourceError(f"{path} lists {rows} rows in shards and {manifest['rows']} in all; prepare the folder again")
    return manifest


def verify(folder: str) -> dict[str, Any]:
    """Read every byte of a folder and compare it with the manifest, which is returned.

    Raises:
        SourceError: naming every shard that is missing, cut short or has other content; training on it would not repeat.
    """
    folder = files.absolute(folder)
    manifest = read_manifest(folder)
    shards = [Shard(**shard) for shard in manifest["shards"]]
    problems = _problems(folder, shards)
    for shard in shards:
        path = files.under(folder, shard.file)
        if not any(problem.startswith(shard.file) for problem in problems) and _sha256(path) != shard.sha256:
            problems.append(f"{shard.file} has other content than when it was written")
    _refuse(folder, problems)
    return manifest


def encode_example(example: Example) -> bytes:
    """One record: msgpack of name, messages, images (files as they are, pixels as PNG) and info; without the row number."""
    try:
        images = [_image_bytes(image) for image in example.images]
        messages = [[message.role, message.text] for message in example.messages]
        return _pack([example.name, messages, images, dict(example.info)])
    except OSError as error:
        reason = f"cannot read image {error.filename}: {error.strerror or error}; put it there or remove the row"
        raise SampleError(f"{example.name}: {reason}", example.name) from error
    except (TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        message = f"{example.name}: {reason}; expected text, numbers, bytes, arrays, lists and dicts in info"
        raise SampleError(message, example.name) from error


def decode_example(record: bytes, index: int) -> Example:
    """The example of a record, as row `index`; ValueError or TypeError where it is none."""
    name, messages, images, info = _unpack(record)
    return Example(index, name, tuple(images), tuple(Message(role, text) for role, text in messages), info)


def _image_bytes(image: str | bytes | np.ndarray | Image.Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str):
        return files.read_bytes(image)
    buffer = BytesIO()
    open_image(image).save(buffer, "PNG")  # RGB or gray, as training would see it
    return buffer.getvalue()


def _pack(value: object) -> bytes:
    packed = msgpack.packb(value, strict_types=True, default=_extend)
    assert packed is not None  # msgpack's annotation allows for a packer that was given a stream
    return packed


def _extend(value: object) -> msgpack.ExtType:
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, _pack(list(value)))
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return msgpack.ExtType(_ARRAY, _pack([value.dtype.str, list(value.shape), value.tobytes()]))
    raise TypeError(f"got a {type(value).__name__}: {value!r:.80}")


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, ext_hook=_restore, strict_map_key=False)


def _restore(code: int, data: bytes) -> tuple[Any, ...] | np.ndarray:
    if code == _TUPLE:
        return tuple(_unpack(data))
    if code == _ARRAY:
        dtype, shape, content = _unpack(data)
        return np.frombuffer(content, dtype).reshape(shape)
    raise ValueError(f"unknown msgpack extension {code}")


def _problems(folder: str, shards: list[Shard]) -> list[str]:
    """What is wrong with the shards by size and, on this machine, by number of rows; each begins with the file's name."""

    def look(path: str) -> int | str:
        try:
            return files.size(path)
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    problems = []
    paths = [files.under(folder, shard.file) for shard in shards]
    for shard, path, size in zip(shards, paths, files.in_parallel(look, paths), strict=True):
        if isinstance(size, str):
            problems.append(f"{shard.file} {size}")
        elif size != shard.bytes:
            problems.append(f"{shard.file} has {size} of {shard.bytes} bytes")
        elif not files.is_url(path) and _count(path) != shard.rows:
            problems.append(f"{shard.file} has {_count(path)} readable rows of {shard.rows}")
    return problems


def _refuse(folder: str, problems: list[str]) -> None:
    if problems:
        raise SourceError(f"{folder}: {'; '.join(problems)}; fetch these shards again or prepare the folder again")


def _count(path: str) -> int:
    """Rows of a local shard by its footer; 0 where that cannot be read."""
    reader = ArrayRecordReader(path, options=_READER_OPTIONS, file_reader_buffer_size=32768)
    try:
        return reader.num_records() if reader.ok() else 0
    finally:
        if reader.ok():
            reader.close()


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with files.open_binary(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
