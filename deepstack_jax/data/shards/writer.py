"""Writing shards: uncompressed, one record per chunk (images are compressed already): equal examples give equal bytes."""

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from deepstack_jax.data.shards.reader import FORMAT, VERSION, Shard, count_records, sha256_of

_OPTIONS = "group_size:1,uncompressed"


def write_shard(path: Path, name: str, records: Iterable[bytes]) -> Shard | None:
    """Write records into a new file, to the disk; no file is made without records.

    Returns:
      What the manifest says of it, by `name`; None without records.

    Raises:
      OSError, RuntimeError: it cannot be written; what array_record raises is of the second kind.
    """
    writer, written = None, 0
    try:
        for record in records:
            writer = writer or ArrayRecordWriter(str(path), _OPTIONS)
            writer.write(record)
            written += 1
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        return None
    if (readable := count_records(str(path))) != written:  # a full disk shows here
        raise OSError(errno.ENOSPC, f"{readable} of {written} records of a shard were written")
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return Shard(name, written, path.stat().st_size, sha256_of(str(path)))


def manifest_of(shards: Sequence[Shard], source: Mapping[str, Any], images: int) -> dict[str, Any]:
    """What the manifest of a finished folder says; `source`: what the examples were made from, as JSON can hold it."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": dict(source),
        "rows": sum(shard.rows for shard in shards),
        "images": images,
        "bytes": sum(shard.bytes for shard in shards),
        "shards": [shard._asdict() for shard in shards],
    }
