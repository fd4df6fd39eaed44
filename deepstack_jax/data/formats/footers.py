"""What the footer of a parquet file, and the messages of an arrow file, say of the sizes in it, before anything is decoded.

pyarrow reads the footer too, but asked for the sizes of a column whose statistics are damaged it ends the process: its C++
exception is caught nowhere. Thrift's compact protocol is short enough to be read here.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from deepstack_jax.data.formats import files

_END = 8  # bytes after the footer: its length, and the magic
_MOST = 16 << 20  # bytes of a footer, which takes up to 64 times as much when it is read


class ColumnChunk(NamedTuple):
    """The values of one leaf column in one row group."""

    values: int  # nulls included
    bytes: int  # not compressed
    delta: bool  # whether texts are stored as what distinguishes each from the one before it


def read_chunks(path: str) -> list[list[ColumnChunk]]:
    """Of every row group its chunks, in the order of the leaves; ValueError where that is no footer, or beyond sense."""
    size = files.size(path)
    if size < 2 * _END:
        raise ValueError(f"a file of {size} bytes holds no footer")
    length = int.from_bytes(files.read_range(path, size - _END, 4, size), "little")
    if not 0 < length <= size - _END:
        raise ValueError(f"its footer has {length} bytes of {size}")
    if length > _MOST:
        raise ValueError(f"its footer has {length:,} bytes, allowed are {_MOST:,}; write it with larger row groups")
    try:
        groups = _Compact(files.read_range(path, size - _END - length, length, size)).struct()[4]
        chunks = [[chunk[3] for chunk in group[1]] for group in groups]
        return [
            [ColumnChunk(int(chunk[5]), int(chunk[6]), bool({6, 7} & set(chunk[2]))) for chunk in group] for group in chunks
        ]
    except (IndexError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its footer is damaged ({type(error).__name__})") from error


class _Compact:
    """Reads Thrift's compact protocol: a struct is a dict by field number."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self) -> dict[int, Any]:
        fields, number = {}, 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = kind == 1 if kind <= 2 else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        match kind:
            case 1 | 2 | 3:  # a byte; of a list, also a boolean
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                return self._bytes(8)
            case 8:
                return self._bytes(self._varint())
            case 9 | 10:
                head = self._byte()
                count = head >> 4 if head >> 4 < 15 else self._varint()
                return [self._value(head & 15) for _ in range(count)]
            case 12:
                return self.struct()
            case _:
                raise ValueError(f"its footer holds a value of kind {kind}, which parquet does not have")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise IndexError
        self._at += count
        return self._data[self._at - count : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) >= 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("its footer holds a number of more than 64 bits")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)


class _Flat:
    """Reads flatbuffers as far as needed; pyarrow has verified them when it read what holds them."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def number(self, at: int, width: int) -> int:
        return int.from_bytes(self._data[at : at + width], "little", signed=width > 2)

    def field(self, table: int, which: int) -> int:
        """Where a field of a table is; 0 where it is absent."""
        vtable = table - self.number(table, 4)
        offset = self.number(vtable + 4 + 2 * which, 2) if 4 + 2 * which < self.number(vtable, 2) else 0
        return table + offset if offset else 0

    def followed(self, at: int) -> int:
        return at + self.number(at, 4)

    def structs(self, table: int, which: int, width: int) -> range:
        """Where the structs of a list are."""
        if not self.field(table, which):
            return range(0)
        first = self.followed(self.field(table, which))
        return range(first + 4, first + 4 + width * self.number(first, 4), width)


def messages_of(source: pa.MemoryMappedFile) -> Iterator[pa.ipc.Message]:
    """The dictionaries and batches that the footer of an arrow file lists."""
    end = source.size() - 10  # its length, and the magic
    source.seek(end)
    length = int.from_bytes(source.read(4), "little")
    source.seek(end - length)
    flat = _Flat(source.read(length))
    for listed in (2, 3):
        for at in flat.structs(flat.followed(0), listed, 24):
            source.seek(flat.number(at, 8))
            yield pa.ipc.read_message(source)


def decompressed_bytes(message: pa.ipc.Message) -> int:
    """What the compressed buffers of an arrow message become: a buffer begins with its size then, or with -1. 0 = none is."""
    flat, body = _Flat(message.metadata.to_pybytes()), message.body
    if message.type not in ("record batch", "dictionary"):
        return 0
    batch = flat.followed(flat.field(flat.followed(0), 2))
    if message.type == "dictionary":
        batch = flat.followed(flat.field(batch, 1))
    if body is None or not flat.field(batch, 3):  # its compression
        return 0
    places = [(flat.number(at, 8), flat.number(at + 8, 8)) for at in flat.structs(batch, 2, 16)]
    starts = [body.slice(offset, 8).to_pybytes() for offset, length in places if 0 <= offset <= body.size and length >= 8]
    return sum(max(0, int.from_bytes(start, "little", signed=True)) for start in starts)
