"""Rows of parquet files, and of arrow files as Hugging Face `datasets` writes them, by random access."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepstack_jax.data import files
from deepstack_jax.data.normaliser import IMAGE_KEYS, RowError, check_columns
from deepstack_jax.data.sources import SourceError

_CACHE_BYTES = 128 << 20
"""Decoded row groups that a process keeps; the one in use stays, however large it is."""
_FOOTER_BYTES = 64 << 10  # fetched at once from a remote file: its footer, or the gap between two columns
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class ParquetRows:
    """Rows of parquet files, read by row group.

    A shuffled reader decodes a row group for a row: fast as long as row groups are small (`datasets` writes 100 rows with
    images). Only the place of each row group is kept in memory.

    Args:
        path: what the user named, for messages.
        parts: the files in order, local paths or URLs.

    Raises:
        SourceError: a file cannot be read, is no parquet or cut short, lacks the columns of every row style, has others than
            the first file, or all are empty.
    """

    def __init__(self, path: str, parts: Sequence[str]) -> None:
        self.path, self._parts = path, tuple(parts)
        footers: list[_Footer] = files.in_parallel(_read_footer, self._parts)
        for part, footer in zip(self._parts, footers, strict=True):
            if footer.columns.keys() != footers[0].columns.keys():
                theirs = sorted(footer.columns.keys() ^ footers[0].columns.keys())
                raise SourceError(f"{part} and {self._parts[0]} differ in the columns {theirs}; name files of one table")
        problem = check_columns(list(footers[0].columns))
        if problem:
            raise SourceError(f"{path} {problem}")
        self._outlined = [name for name, short in footers[0].columns.items() if short]
        self._sizes = np.array([footer.size for footer in footers], np.int64)
        rows = [(part, group, count) for part, footer in enumerate(footers) for group, count in enumerate(footer.rows)]
        self._groups = np.array([(part, group) for part, group, _ in rows], np.int32).reshape(-1, 2)
        self._starts = np.concatenate([[0], np.cumsum([count for *_, count in rows], dtype=np.int64)])
        if not len(self):
            raise SourceError(f"{path} holds no rows; expected at least one conversation")
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_tables")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def place(self, index: int) -> str:
        """The file of row `index` and its row there, for messages."""
        group = self._group_of(index)
        part = self._groups[group, 0]
        first = np.searchsorted(self._groups[:, 0], part)
        return f"{self._parts[part]} row {index - int(self._starts[first])}"

    def read(self, index: int) -> object:
        """Row `index` as a dict.

        Raises:
            RowError: its row group does not decode; the others may.
            SourceError: the file changed or vanished since it was opened.
        """
        group = self._group_of(index)
        return self._table(group).slice(index - int(self._starts[group]), 1).to_pylist()[0]

    def scan(self) -> Iterator[object]:
        """All rows in order, only the columns that are short and that an outline needs."""
        if not self._outlined:
            yield from ({} for _ in range(len(self)))
            return
        for part in self._parts:
            try:
                with _open_parquet(part) as parquet:
                    for batch in parquet.iter_batches(columns=self._outlined):
                        yield from batch.to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise _failure(part, error) from error

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1  # empty row groups are passed over

    def _table(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._tables:
                self._tables[group] = self._decode(group)
                while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > _CACHE_BYTES:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(group)
            return self._tables[group]

    def _decode(self, group: int) -> pa.Table:
        part, number = self._groups[group].tolist()
        path = self._parts[part]
        try:
            size = files.size(path)
            if size != self._sizes[part]:
                raise SourceError(f"{path} changed while in use: {size} bytes, {self._sizes[part]} when opened; start again")
            with _open_parquet(path) as parquet:
                return parquet.read_row_group(number)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise SourceError(f"cannot read {path} any more: {error.strerror}; put it back and start again") from error
            raise RowError(f"row group {number} cannot be read ({_one_line(error)}); fetch or write the file again") from error


class ArrowRows:
    """Rows of arrow IPC files (streams, as `datasets` writes them, or files), mapped into memory: read without copying.

    Args:
        path: what the user named, for messages.
        parts: the files in order, local paths or URLs; of a URL a copy is kept (`files.local_copy`).

    Raises:
        SourceError: a file cannot be read, is no arrow or cut short, lacks the columns of every row style, or all are empty.
    """

    def __init__(self, path: str, parts: Sequence[str]) -> None:
        self.path, self._parts = path, tuple(parts)
        try:
            self._copies = files.in_parallel(files.local_copy, self._parts)
        except OSError as error:
            raise SourceError(f"cannot read {error.filename or path}: {error.strerror}; check the path") from error
        self._map()
        if not len(self):
            raise SourceError(f"{path} holds no rows; expected at least one conversation")

    def _map(self) -> None:
        self._batches = [_map_arrow(part, copy) for part, copy in zip(self._parts, self._copies, strict=True)]
        self._flat = [batch for batches in self._batches for batch in batches]
        self._starts = np.concatenate([[0], np.cumsum([len(batch) for batch in self._flat], dtype=np.int64)])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_parts": self._parts, "_copies": self._copies, "_rows": len(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state.pop("_rows")
        self.__dict__.update(state)
        self._map()
        if len(self) != rows:
            raise SourceError(f"{self.path} changed while in use: {len(self)} rows, {rows} when opened; start again")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def place(self, index: int) -> str:
        """The file of row `index` and its row there, for messages."""
        for part, batches in zip(self._parts, self._batches, strict=True):
            rows = sum(map(len, batches))
            if index < rows:
                return f"{part} row {index}"
            index -= rows
        raise IndexError(index)

    def read(self, index: int) -> object:
        """Row `index` as a dict; RowError where its bytes are no valid data."""
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            row = self._flat[batch].slice(index - int(self._starts[batch]), 1)
            row.validate(full=True)  # unchecked, damaged offsets would lead anywhere in memory
            return row.to_pylist()[0]
        except (pa.ArrowException, ValueError) as error:
            raise RowError(f"cannot be decoded ({_one_line(error)}); fetch or write the file again") from error

    def scan(self) -> Iterator[object]:
        """All rows in order, only the columns that are short and that an outline needs."""
        for batch in self._flat:
            names = [field.name for field in batch.schema if _is_short(field)]
            yield from batch.select(names).to_pylist() if names else ({} for _ in range(len(batch)))


class _Footer(NamedTuple):
    """What a parquet file says of itself."""

    rows: list[int]  # of each row group
    columns: dict[str, bool]  # name -> whether an outline reads it
    size: int  # bytes of the file


def _read_footer(path: str) -> _Footer:
    try:
        with _open_parquet(path) as parquet:
            groups = [parquet.metadata.row_group(number).num_rows for number in range(parquet.metadata.num_row_groups)]
            return _Footer(groups, {field.name: _is_short(field) for field in parquet.schema_arrow}, files.size(path))
    except (pa.ArrowException, OSError) as error:
        raise _failure(path, error) from error


def _open_parquet(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(files.open_binary(path, _FOOTER_BYTES) if files.is_url(path) else path)


def _is_short(field: pa.Field) -> bool:
    """Whether an outline reads this column: the id, the data_source, and images that are paths."""
    kind = field.type.value_type if pa.types.is_list(field.type) or pa.types.is_large_list(field.type) else field.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return field.name in ("id", "data_source") or (field.name in IMAGE_KEYS and is_text)


def _map_arrow(path: str, copy: str) -> list[pa.RecordBatch]:
    """The record batches of a file; none of their bytes are read yet."""
    try:
        source = pa.memory_map(copy)
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            schema = reader.schema
        else:
            source.seek(max(0, source.size() - len(_END_OF_STREAM)))
            ended = source.read() == _END_OF_STREAM  # a cut between two batches shows nowhere else
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            batches, schema = list(reader), reader.schema
            if not ended:
                raise pa.ArrowInvalid(f"its end mark is missing after {sum(map(len, batches))} rows")
    except (pa.ArrowException, OSError) as error:
        raise _failure(path, error) from error
    problem = check_columns(schema.names)
    if problem:
        raise SourceError(f"{path} {problem}")
    return batches


def _failure(path: str, error: Exception) -> SourceError:
    """What to say of a file that cannot be read; pyarrow's own OSError is about the content and carries no number."""
    if isinstance(error, OSError) and error.errno:
        return SourceError(f"cannot read {path}: {error.strerror}; check the path")
    return SourceError(f"{path} is damaged, cut short or of another format ({_one_line(error)}); fetch or write it again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
