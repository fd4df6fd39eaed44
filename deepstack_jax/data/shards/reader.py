"""Examples from a folder of ArrayRecord shards, whose `manifest.json` is written last: without it a folder is not finished."""

import bisect
import hashlib
import operator
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple, SupportsIndex

from array_record.python.array_record_module import ArrayRecordReader

from deepstack_jax.config import LIMITS, LimitsConfig
from deepstack_jax.data.example import ConversationError, Example, ExampleError, RecordMetadata, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.styles import RecordError
from deepstack_jax.data.shards.codec import decode_example

MANIFEST = "manifest.json"
SUFFIX = ".array_record"

FORMAT = "deepstack_jax examples"
VERSION = 1

_READER_OPTIONS = "readahead_buffer_size:0"  # records are asked for in any order
_COMPRESSED = -1
_SHARD_NAME = re.compile(r"shard-\d{5,9}" + re.escape(SUFFIX))


class Shard(NamedTuple):
    """A file of records, as the manifest lists it."""

    file: str
    rows: int
    bytes: int
    sha256: str


class ShardSource:
    """Examples of a finished folder, local or at a URL, by random access over all shards; images come as encoded bytes.

    Only the manifest is pickled; each process opens the shards that it reads. Of a folder at a URL, each shard that is read
    is copied once (`files.local_copy`).

    Raises:
      SourceError: no manifest or none of ours, a shard missing, cut short or with another number of records than the manifest
          says: all of them are named. Content is not compared; `verify` does.
    """

    def __init__(self, folder: str, limits: LimitsConfig = LIMITS) -> None:
        self.folder, self._limits = files.absolute(folder), limits
        self.manifest = read_manifest(self.folder)
        self._shards = [Shard(**shard) for shard in self.manifest["shards"]]
        _refuse(self.folder, _problems(self.folder, self._shards))
        self._ends = list(accumulate(shard.rows for shard in self._shards))
        self._readers = files.ProcessCache()

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:  # Grain compares this text when it restores an iterator: no address, no machine's folder
        digest = hashlib.sha256("".join(shard.sha256 for shard in self._shards).encode()).hexdigest()[:16]
        return f"ShardSource(records={len(self)}, sha256={digest!r})"

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Example `index`.

        ExampleError where the record is damaged, unusable or beyond the limit; SourceError where its shard is lost.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} is outside 0..{len(self) - 1} of {self.folder}")
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number] - self._shards[number].rows)
        reader, where = self._reader(number), f"{files.under(self.folder, self._shards[number].file)} record {row}"
        try:
            record = reader.read([row])[0]
            if len(record) > self._limits.row_bytes:
                most = f"config.data.limits.row_bytes={self._limits.row_bytes:,}"
                raise ExampleError(f"{where} takes {len(record):,} bytes, allowed are {most}; raise that", f"record {index}")
            return decode_example(record, index)
        except (ExampleError, MemoryError):
            raise
        except (RecordError, ConversationError) as error:
            raise ExampleError(f"{where}: {error}", f"record {index}") from error
        except Exception as error:  # what msgpack, numpy and array_record raise on damaged bytes is nearly anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            raise ExampleError(f"{where}: damaged ({reason}); fetch or prepare it again", f"record {index}") from error

    def metadata(self) -> Iterator[RecordMetadata]:
        """Name and data_source of every example; reads everything, since a record is read as a whole."""
        for index in range(len(self)):
            try:
                example = self[index]
            except ExampleError as error:
                yield RecordMetadata(error.name, (), "")
                continue
            source = example.info.get("data_source")
            yield RecordMetadata(example.name, (), source if isinstance(source, str) else "")

    def missing_images(self, rows: int) -> list[str]:
        """None: the images are inside."""
        return []

    def _reader(self, number: int) -> Any:
        with self._readers.lock:
            if number not in self._readers:
                self._readers[number] = self._open(self._shards[number])
            return self._readers[number]

    def _open(self, shard: Shard) -> Any:
        path = files.under(self.folder, shard.file)
        try:
            copy = files.local_copy(path)
        except OSError as error:
            raise SourceError(f"cannot read {path} any more: {error.strerror}; put it back, start again") from error
        rows = count_records(copy)
        if rows != shard.rows:
            raise SourceError(f"{path} changed while in use: {rows} records, {shard.rows} in {MANIFEST}; start again")
        return ArrayRecordReader(copy, options=_READER_OPTIONS, file_reader_buffer_size=32768)


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of a finished folder; SourceError where there is none of ours."""
    path = files.under(files.absolute(folder), MANIFEST)
    try:
        manifest = files.read_json(path)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; a folder without it is not finished, prepare it again"
        raise SourceError(message) from error
    except ValueError as error:
        raise SourceError(f"{path} is not JSON ({error}); fetch it again, or prepare the folder again") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise SourceError(f"{path} says format, version {found}, expected {(FORMAT, VERSION)}; prepare it with this release")
    try:
        shards = [Shard(**shard) for shard in manifest["shards"]]
        for shard in shards:  # a name may lead nowhere else
            if not (isinstance(shard.file, str) and _SHARD_NAME.fullmatch(shard.file) and isinstance(shard.sha256, str)):
                raise ValueError(f"file {shard.file!r:.80}, expected shard-00000{SUFFIX} and its sha256")
            if not all(type(number) is int and 0 < number < 2**50 for number in (shard.rows, shard.bytes)):
                raise ValueError(f"{shard.file} with {shard.rows!r:.40} records, {shard.bytes!r:.40} bytes")
        rows = sum(shard.rows for shard in shards)
        whole = 0 < rows == manifest["rows"]
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path} lacks or misnames an entry ({error!s:.200}); prepare the folder again") from error
    if not whole:
        raise SourceError(f"{path} lists {rows} records in shards and {manifest['rows']} in all; prepare the folder again")
    return manifest


def verify(folder: str) -> dict[str, Any]:
    """Read every byte of a folder and compare it with its manifest, which is returned; SourceError names all that differs."""
    folder = files.absolute(folder)
    manifest = read_manifest(folder)
    shards = [Shard(**shard) for shard in manifest["shards"]]
    problems = _problems(folder, shards)
    for shard in shards:
        path = files.under(folder, shard.file)
        if not any(problem.startswith(shard.file) for problem in problems) and sha256_of(path) != shard.sha256:
            problems.append(f"{shard.file} has other content than when it was written")
    _refuse(folder, problems)
    return manifest


def _problems(folder: str, shards: list[Shard]) -> list[str]:
    """What is wrong with the shards by size and, on this machine, by number of records; each begins with the file's name."""

    def look(path: str) -> int | str:
        try:
            return files.size(files.held(folder, path.rpartition("/")[2]))
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    problems = []
    paths = [files.under(folder, shard.file) for shard in shards]
    for shard, path, size in zip(shards, paths, files.in_parallel(look, paths), strict=True):
        count = shard.rows if files.is_url(path) or size != shard.bytes else count_records(path)
        if isinstance(size, str):
            problems.append(f"{shard.file} {size}")
        elif size != shard.bytes:
            problems.append(f"{shard.file} has {size} of {shard.bytes} bytes")
        elif count == _COMPRESSED:
            problems.append(f"{shard.file} is compressed, which `prepare` never does,")
        elif count != shard.rows:
            problems.append(f"{shard.file} has {count} readable records of {shard.rows}")
    return problems


def _refuse(folder: str, problems: list[str]) -> None:
    if problems:
        raise SourceError(f"{folder}: {'; '.join(problems)}; fetch these shards again or prepare the folder again")


def count_records(path: str) -> int:
    """Records of a local shard by its footer; 0 where that cannot be read, _COMPRESSED where a record might be of any size."""
    reader = ArrayRecordReader(path, options=_READER_OPTIONS, file_reader_buffer_size=32768)
    try:
        if reader.ok() and "uncompressed" not in str(reader.writer_options_string()):
            return _COMPRESSED
        return reader.num_records() if reader.ok() else 0
    finally:
        if reader.ok():
            reader.close()


def sha256_of(path: str) -> str:
    with files.open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
