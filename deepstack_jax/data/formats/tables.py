"""Records of parquet files, and of arrow files as Hugging Face `datasets` writes them, by random access."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepstack_jax.config import LIMITS, LimitsConfig
from deepstack_jax.data.example import SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.columns import VALUE_BYTES, carried, scanned, settled, short_reason, to_row, warn_of
from deepstack_jax.data.formats.footers import ColumnChunk, decompressed_bytes, messages_of, read_chunks
from deepstack_jax.data.formats.styles import CONVERSATIONS, IMAGE_KEYS, TURN_SOURCES, Columns, RecordError

_CACHE_BYTES = 128 << 20  # of decoded row groups that a process keeps; the one in use stays, however large it is
_FOOTER_BYTES = 64 << 10  # fetched at once from a remote file: its footer, or the gap between two columns
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_MAX_ROWS = 2**31
_SOURCES = {"data_source", "source"}
_BATCH_ROWS, _STEP_ROWS = 1 << 16, 64  # read at once where texts are dictionaries; where each may be as long as all in the file


class _Groups:
    """Records of files that hold them in groups: row groups, or record batches."""

    path: str  # that the user named
    _parts: tuple[str, ...]

    def _count(self, counts: Sequence[Sequence[int]]) -> None:
        """Take the number of records of every group of every file."""
        rows = [number for part in counts for number in part]
        if not 0 < (total := sum(rows)) <= _MAX_ROWS:
            says = "no records" if not total else f"{total:,} records, if it is believed"
            raise SourceError(f"{self.path} holds {says}; expected at least one conversation, at most {_MAX_ROWS:,}")
        self._part_of = np.repeat(np.arange(len(counts)), [len(part) for part in counts])  # of every group
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])  # first record of every group, and of all

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[int, int]:
        """The group of a record, and its place there; empty groups are passed over."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return group, index - int(self._starts[group])

    def _first(self, group: int) -> tuple[int, int]:
        """The file of a group, and the first group of that file."""
        part = int(self._part_of[group])
        return part, int(np.searchsorted(self._part_of, part))

    def group(self, index: int) -> int:
        """The number of the group that holds a record."""
        return self._find(index)[0]

    def place(self, index: int) -> str:
        """The file of a record and its number there, for messages."""
        part, first = self._first(self._find(index)[0])
        return f"{self._parts[part]} record {index - int(self._starts[first])}"


class ParquetRecords(_Groups):
    """Records of parquet files (`parts`, in order, of the `path` that the user named), read by row group.

    A shuffled reader decodes a row group for a row: fast as long as row groups are small (`datasets` writes 100 rows with
    images). Only the place of each row group is kept in memory.

    Raises:
      SourceError: a file is not parquet or is cut short, lacks columns that are wanted, has others than the first file,
        has a row group beyond the limit, or all are empty.
    """

    def __init__(self, path: str, parts: Sequence[str], limits: LimitsConfig = LIMITS, wanted: Columns = CONVERSATIONS) -> None:
        self.path, self._parts, self._limits, self._needed = path, tuple(parts), limits, wanted.needed
        self._footers: list[_Footer] = files.in_parallel(_read_footer, self._parts)
        first = self._footers[0]
        for part, footer in zip(self._parts, self._footers, strict=True):
            if footer.columns.keys() != first.columns.keys():
                theirs = sorted(footer.columns.keys() ^ first.columns.keys())
                raise SourceError(f"{part} and {self._parts[0]} differ in the columns {theirs}; name files of one table")
        if problem := wanted.problem(list(first.names)):
            raise SourceError(f"{path} {problem}")
        read = {name: kind for name, kind in first.columns.items() if name in wanted.needed or not wanted.alone}
        self._columns = carried(path, read, wanted.needed)
        self._check_groups()
        self._outlined = [name for name in self._columns if _is_outlined(name, first.columns[name], wanted)]
        self._by_turn = "texts" in self._columns and not _SOURCES & set(self._outlined)  # these may say where they are from
        self._count([footer.rows for footer in self._footers])
        self._tables = files.ProcessCache()  # of row groups: the table, and what a row of it may take

    def _check_groups(self) -> None:
        """Leave out the columns that nobody needs where a row group would not fit with them; refuse it where it never does."""
        most = self._limits.group_bytes
        for part, footer in zip(self._parts, self._footers, strict=True):
            for group, sizes in enumerate(footer.sizes):
                needed = sum(sizes.get(name, 0) for name in self._columns if name in self._needed)
                if needed > most:
                    raise SourceError(
                        f"{part} row group {group} takes {needed:,} bytes, allowed are "
                        f"config.data.limits.group_bytes={most:,}; write it with fewer rows in a row group, or raise that"
                    )
                if sum(sizes.get(name, 0) for name in self._columns) > most:
                    others = [name for name in self._columns if name not in self._needed]
                    self._columns = [name for name in self._columns if name in self._needed]
                    warn_of(self.path, others, f"go beyond config.data.limits.group_bytes={most:,}")

    def read(self, index: int) -> object:
        """Record `index` as a dict.

        RecordError where its row group does not decode, or it is beyond the limit; SourceError where the file changed since.
        """
        group, row = self._find(index)
        table, most = self._table(group)
        return to_row(table.slice(row, 1), most, self._needed)

    def scan(self) -> Iterator[object]:
        """All rows in order, only the columns that are short and that an outline needs."""
        for part, footer in zip(self._parts, self._footers, strict=True):
            outlined = [*self._outlined, *(footer.turn_sources if self._by_turn else ())]
            if not outlined:
                yield from ({} for _ in range(sum(footer.rows)))
                continue
            try:
                with _open_parquet(part, footer.texts) as parquet:
                    for group in range(len(footer.rows)):  # lists of texts cannot be read across two groups at once
                        for batch in parquet.iter_batches(footer.step, [group], outlined):
                            yield from scanned(batch, self._limits, self._needed, mapped=False)
            except (pa.ArrowException, OSError) as error:
                raise _failure(part, error) from error

    def _table(self, group: int) -> tuple[pa.Table, int | None]:
        """A row group, and what a row of it may take; None where all together take less."""
        with self._tables.lock:
            if group not in self._tables:
                table, most = self._decode(group), self._limits.row_bytes
                plain = settled(table, most)
                self._tables[group] = (table, most) if plain is None else (plain, None)
                while len(self._tables) > 1 and sum(table.nbytes for table, _ in self._tables.values()) > _CACHE_BYTES:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(group)
            return self._tables[group]

    def _decode(self, group: int) -> pa.Table:
        part, first = self._first(group)
        path, footer, number = self._parts[part], self._footers[part], group - first
        try:
            size = files.size(path)
            if size != footer.size:
                raise SourceError(f"{path} changed while in use: {size} bytes, {footer.size} when opened; start again")
            with _open_parquet(path, footer.texts) as parquet:
                table = self._read_group(parquet, number, footer.step)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise SourceError(f"cannot read {path} any more: {error.strerror}; put it back and start again") from error
            reason = f"row group {number} cannot be read ({short_reason(error)}); fetch or write the file again"
            raise RecordError(reason) from error
        if len(table) != footer.rows[number]:
            raise RecordError(f"row group {number} has {len(table)} rows of {footer.rows[number]}; fetch or write it again")
        return table

    def _read_group(self, parquet: pq.ParquetFile, number: int, step: int) -> pa.Table:
        batches, size, most = [], 0, self._limits.group_bytes
        try:
            if step == _BATCH_ROWS:
                return parquet.read_row_group(number, columns=self._columns)
            for batch in parquet.iter_batches(step, [number], self._columns):
                batches.append(batch)
                size += batch.nbytes
                if size > most:
                    raise RecordError(f"row group {number} takes more than config.data.limits.group_bytes={most:,}; raise that")
            return pa.Table.from_batches(batches).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            needed = [name for name in self._columns if name in self._needed]
            if needed == self._columns or (isinstance(error, OSError) and error.errno):
                raise
            table = parquet.read_row_group(number, columns=needed)  # it may have been a column that nobody needs
            others = [name for name in self._columns if name not in needed]
            warn_of(self.path, others, f"cannot be read ({short_reason(error)})")
            return table


class ArrowRecords(_Groups):
    """Records of arrow IPC files (streams, as `datasets` writes them, or files), mapped into memory: read without copying.

    `parts` are the files, in order, of the `path` that the user named; of a URL a copy is kept. SourceError where one is not
    arrow or is cut short, lacks the columns of every row style, or all are empty.
    """

    def __init__(self, path: str, parts: Sequence[str], limits: LimitsConfig = LIMITS) -> None:
        self.path, self._parts, self._limits = path, tuple(parts), limits
        try:
            self._copies = files.in_parallel(files.local_copy, self._parts)
        except OSError as error:
            raise SourceError(f"cannot read {error.filename or path}: {error.strerror}; check the path") from error
        self._map()

    def _map(self) -> None:
        most = self._limits.group_bytes
        mapped = [_map_arrow(part, copy, most) for part, copy in zip(self._parts, self._copies, strict=True)]
        self._batches = [batch for batches in mapped for batch in batches]
        self._count([list(map(len, batches)) for batches in mapped])

    def __getstate__(self) -> dict[str, Any]:
        kept = {"path": self.path, "_parts": self._parts, "_copies": self._copies, "_limits": self._limits}
        return kept | {"_rows": len(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state.pop("_rows")
        self.__dict__.update(state)
        self._map()
        if len(self) != rows:
            raise SourceError(f"{self.path} changed while in use: {len(self)} records, {rows} when opened; start again")

    def read(self, index: int) -> object:
        """Row `index` as a dict; RecordError where its bytes are not valid data, or more than the limit."""
        batch, row = self._find(index)
        return to_row(self._batches[batch].slice(row, 1), self._limits.row_bytes, CONVERSATIONS.needed)

    def scan(self) -> Iterator[object]:
        """All rows in order, only the columns that are short and that an outline needs."""
        for batch in self._batches:
            names = [field.name for field in batch.schema if _is_outlined(field.name, field.type, CONVERSATIONS)]
            if not _SOURCES & set(names) and "texts" in batch.schema.names:
                names.append("texts")
            rows = scanned(batch.select(names), self._limits, CONVERSATIONS.needed, mapped=True)
            yield from rows if names else ({} for _ in range(len(batch)))


class _Footer(NamedTuple):
    """What a parquet file says of itself."""

    rows: list[int]  # of each row group
    sizes: list[dict[str, int]]  # of each row group: column -> bytes in memory at most, its texts once for all their uses
    columns: dict[str, pa.DataType]
    names: tuple[str, ...]  # of the columns, as often as they are there
    texts: tuple[str, ...]  # paths of the leaves that are read as dictionaries
    turn_sources: tuple[str, ...]  # paths of the leaves that say where turns are from
    step: int  # rows that may be read at once
    size: int  # bytes of the file


def _read_footer(path: str) -> _Footer:
    try:
        chunks = read_chunks(path)
        with _open_parquet(path) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
            columns = {field.name: field.type for field in schema}
            leaves = [parquet.schema.column(number) for number in range(metadata.num_columns)]
            delta = {leaf.path for group in chunks for chunk, leaf in zip(group, leaves, strict=False) if chunk.delta}
            held = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"]
            texts = [path for path in held if path not in delta]  # pyarrow reads the others as they are alone
            rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            for number, (count, group) in enumerate(zip(rows, chunks, strict=True)):
                fewest = min((chunk.values for chunk in group), default=0)
                if len(group) != len(leaves) or not 0 <= count <= fewest:
                    raise ValueError(f"row group {number} has {count} rows, a column in it {fewest} values")
            sizes = [_sizes(group, leaves, schema.names) for group in chunks]
            step = _STEP_ROWS if delta else _BATCH_ROWS
            sources = tuple(path for path in held if TURN_SOURCES.fullmatch(path))
            return _Footer(rows, sizes, columns, tuple(schema.names), tuple(texts), sources, step, files.size(path))
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise _failure(path, error) from error


def _sizes(group: Sequence[ColumnChunk], leaves: Sequence[Any], names: Sequence[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for chunk, leaf in zip(group, leaves, strict=True):
        name = next(name for name in names if leaf.path == name or leaf.path.startswith(f"{name}."))  # it may hold dots itself
        width = max(VALUE_BYTES, leaf.length if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0)
        sizes[name] = sizes.get(name, 0) + chunk.values * width + max(0, chunk.bytes)
    return sizes


def _open_parquet(path: str, texts: Sequence[str] = ()) -> pq.ParquetFile:
    """Texts come as a dictionary: one that is in the file once, and is meant a million times, is in memory once."""
    files.size(path)  # refuses what is not a file
    opened = files.open_binary(path, _FOOTER_BYTES) if files.is_url(path) else path
    return pq.ParquetFile(opened, read_dictionary=list(texts) or None)


def _is_outlined(name: str, kind: pa.DataType, wanted: Columns) -> bool:
    """Whether an outline reads this column; of images those that are paths."""
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    is_text = pa.types.is_string(inner) or pa.types.is_large_string(inner)
    return name in wanted.outline and (name not in IMAGE_KEYS or is_text)


def _map_arrow(path: str, copy: str, most: int) -> list[pa.RecordBatch]:
    """The record batches of a file, of their columns those that are carried; none of their bytes are read yet."""
    try:
        files.size(copy)  # refuses what is not a file
        schema, batches = _read_arrow(path, pa.memory_map(copy), most)
        if problem := CONVERSATIONS.problem(schema.names):
            raise SourceError(f"{path} {problem}")
        names = carried(path, {field.name: field.type for field in schema}, CONVERSATIONS.needed)
    except SourceError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, RecursionError) as error:  # a ValueError: names not in UTF-8
        raise _failure(path, error) from error
    first = [schema.names.index(name) for name in names]  # of a name that nobody needs there may be several columns
    return [batch.select(first) for batch in batches]


def _read_arrow(path: str, source: pa.MemoryMappedFile, most: int) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """A file holds a stream between its magic and its footer, which is compared alone; that of polars has no head."""
    file, start = None, 0
    if source.read(6) == b"ARROW1":
        file, start = pa.ipc.open_file(source), 8
    else:
        source.seek(max(0, source.size() - len(_END_OF_STREAM)))
        if source.read() != _END_OF_STREAM:  # a cut between two batches shows nowhere else
            raise pa.ArrowInvalid("its end mark is missing")
    source.seek(start)
    headless = file is not None and source.read(4) != b"\xff" * 4
    source.seek(start)
    grown = sum(map(decompressed_bytes, messages_of(source) if headless else pa.ipc.MessageReader.open_stream(source)))
    if grown > most:
        raise SourceError(
            f"{path} is compressed and takes {grown:,} bytes in memory, allowed are config.data.limits.group_bytes={most:,}; "
            "write it without compression, or raise that"
        )
    if file is not None and headless:
        return file.schema, [file.get_batch(number) for number in range(file.num_record_batches)]
    source.seek(start)
    reader = pa.ipc.open_stream(source)
    batches = list(reader)
    if file is not None and file.num_record_batches != len(batches):
        raise pa.ArrowInvalid(f"its footer lists {file.num_record_batches} batches, {len(batches)} are there")
    return reader.schema, batches


def _failure(path: str, error: Exception) -> SourceError:
    """What to say of a file that cannot be read; pyarrow's own OSError is about the content and carries no number."""
    if isinstance(error, OSError) and error.errno:
        return SourceError(f"cannot read {path}: {error.strerror}; check the path")
    return SourceError(f"{path} is damaged, cut short or of another format ({short_reason(error)}); fetch or write it again")
