"""Columns of tables as Python values: which are carried, as what, and how much they take before they are made.

Strangers' files are read too: nothing is made before its size is known, and no offset is followed before it is checked.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.example import SourceError
from deepstack_jax.data.formats.styles import RecordError

_SCANNED_ROWS = 256  # rows that an outline turns into Python values at once
VALUE_BYTES = 8  # what any value takes at least, once it is one of Python's
_UNDECODABLE = (pa.ArrowException, ValueError, OverflowError)


def carried(path: str, columns: Mapping[str, pa.DataType], needed: Sequence[str]) -> list[str]:
    """Names of the columns that are read; a warning names the others, a SourceError one that the rows need."""
    others = {name: kind for name, kind in columns.items() if _plain(kind) is None}
    for name in needed:
        if name in others:
            raise SourceError(f"{path}: column {name} is {others[name]!s:.80}, expected texts, bytes, lists and structs")
    for name, kind in others.items():
        warn_of(path, [name], f"have the type {kind!s:.80}")
    return [name for name in columns if name not in others]


def warn_of(path: str, columns: Sequence[str], why: str) -> None:
    names = f"{', '.join(columns):.200}"
    warnings.warn(f"{path}: columns that are not carried along, since they {why}: {names}", stacklevel=2)


def settled(table: pa.Table, most: int) -> pa.Table | None:
    """The table as plain values, which rows are then read from fast; None where all of it takes more than `most` bytes."""
    try:
        if sum(map(_bytes, table.columns)) <= most:
            return pa.table([_cast(column) for column in table.columns], table.schema.names)
    except _UNDECODABLE:
        pass  # a value of some row: found when that is read
    return None


def to_row(row: pa.Table | pa.RecordBatch, most: int | None, needed: Sequence[str]) -> dict[str, Any]:
    """A table of one row as Python values, RecordError where they take more than `most` bytes; `most` None: it is settled."""
    values, size = {}, 0
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            if isinstance(column, pa.Array):
                column.validate(full=True)  # unchecked, damaged offsets would lead anywhere in memory
            size += _bytes(column) if most is not None else 0
            if most is not None and size > most:
                raise RecordError(
                    f"takes {size:,} bytes, allowed are config.data.limits.row_bytes={most:,}; raise that, or remove the row"
                )
            values[name] = _cast(column)[0].as_py()
        except RecordError:
            raise
        except _UNDECODABLE as error:
            if name in needed:
                raise RecordError(f"cannot be decoded ({short_reason(error)}); fetch or write the file again") from error
            warnings.warn(f"column {name:.80} has values that cannot be carried along ({short_reason(error)})", stacklevel=2)
    return values


def scanned(batch: pa.RecordBatch, limits: LimitsConfig, needed: Sequence[str], *, mapped: bool) -> Iterator[object]:
    """The rows of a batch, some at once; None in place of one that cannot be decoded. `mapped`: as it is stored in a file."""
    for start in range(0, len(batch), _SCANNED_ROWS):
        part = batch.slice(start, _SCANNED_ROWS)
        try:
            if mapped:
                part.validate(full=True)
            if sum(map(_bytes, part.columns)) <= limits.row_bytes:
                columns = [_cast(column).to_pylist() for column in part.columns]
                yield from [dict(zip(part.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]
                continue
        except _UNDECODABLE:
            pass  # look for it row by row
        for number in range(len(part)):
            try:
                yield to_row(part.slice(number, 1), limits.row_bytes, needed)
            except RecordError:
                yield None


def _cast(column: Any) -> Any:
    plain = _plain(column.type)
    return column if plain == column.type else column.cast(plain)


@lru_cache(maxsize=1024)
def _plain(kind: pa.DataType) -> pa.DataType | None:
    """The type as which a column is read: dates and the like become text, also inside lists and structs; None = not at all."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if types.is_struct(kind):
        plain = [(field.name, _plain(field.type)) for field in kind]
        if all(inner == field.type for field, (_, inner) in zip(kind, plain, strict=True)):
            return kind
        kept = [(name, inner) for name, inner in plain if inner is not None]
        return pa.struct(kept) if kept else None
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _plain(kind.value_type)
        if inner is None or inner == kind.value_type:
            return None if inner is None else kind
        return pa.list_(inner, kind.list_size) if types.is_fixed_size_list(kind) else pa.large_list(inner)
    if types.is_map(kind):
        key, item = _plain(kind.key_type), _plain(kind.item_type)
        return None if key is None or item is None else _as_pairs(kind, key, item)
    if types.is_dictionary(kind):
        plain = types.is_primitive(kind.value_type) and _plain(kind.value_type) == kind.value_type
        if _is_view(kind.value_type):
            return kind  # cannot be cast
        return kind.value_type if plain or _has_lengths(kind.value_type) else None
    if types.is_temporal(kind) or types.is_decimal(kind):
        return None if types.is_interval(kind) else pa.string()
    if types.is_nested(kind) or types.is_run_end_encoded(kind):
        return None  # views of lists, unions: few values may be meant any number of times
    return kind


def _bytes(array: Any) -> int:
    """What the values take when each is written out: in the file one may be meant many times, and nulls take nothing there."""
    if isinstance(array, pa.ChunkedArray):
        return sum(map(_bytes, array.chunks))
    own, kind, types = VALUE_BYTES * len(array), array.type, pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return own + _bytes(array.storage)
    if types.is_dictionary(kind) and _has_lengths(kind.value_type):
        used, times = (pair.to_numpy() for pair in array.indices.drop_null().value_counts().flatten())
        return own + int(_lengths(array.dictionary, used) @ times)
    if types.is_struct(kind):
        return own + sum(map(_bytes, array.flatten()))
    if types.is_map(kind):
        return _bytes(array.cast(_as_pairs(kind)))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return own + _bytes(array.flatten())
    if _is_view(kind):
        return own + int(_lengths(array, np.arange(len(array))).sum())
    return own + array.nbytes


def _lengths(texts: Any, which: np.ndarray) -> np.ndarray:
    """i64[n]: how many bytes some of the texts have."""
    if _is_view(texts.type):  # 16 bytes each, the first four are the length
        return np.frombuffer(texts.buffers()[1], np.int32)[4 * (texts.offset + which)].astype(np.int64)
    return pc.call_function("binary_length", [texts.take(pa.array(which))]).fill_null(0).to_numpy().astype(np.int64)


def _is_view(kind: pa.DataType) -> bool:
    return pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)


def _has_lengths(kind: pa.DataType) -> bool:
    types = pa.types
    known = (types.is_string, types.is_binary, types.is_large_string, types.is_large_binary, _is_view)
    return any(is_kind(kind) for is_kind in known)


def _as_pairs(kind: pa.MapType, key: pa.DataType | None = None, item: pa.DataType | None = None) -> pa.DataType:
    return pa.list_(pa.struct([("key", key or kind.key_type), ("value", item or kind.item_type)]))


def short_reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
