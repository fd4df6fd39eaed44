"""Examples of any source into ArrayRecord shards, every image decoded once: chunk by chunk, in worker processes.

Chunk i is the examples i*n .. i*n+n-1 of the source in their order and becomes shard i, so that neither the number of workers
nor an interruption shows in the bytes. Examples that cannot be used are left out of their shard and named beside it.
"""

import json
import multiprocessing
import os
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepstack_jax.atomic import SCRATCH, write_whole
from deepstack_jax.config import DataConfig
from deepstack_jax.data.encode.image import ImageError, open_image
from deepstack_jax.data.example import Example, ExampleError, Source, SourceError
from deepstack_jax.data.shards.codec import decode_example, encode_example
from deepstack_jax.data.shards.reader import SUFFIX, Shard
from deepstack_jax.data.shards.writer import write_shard
from deepstack_jax.data.workers import process_pool
from deepstack_jax.printing import cut, one_line

_POLL_SECONDS = 0.2
_RECORD_BYTES = 50  # about what array_record puts around a record
_SHARD_BYTES = 128 << 10  # and around a shard: records and footer are each filled up to 64 KiB
_RUNS, _RUN = 20, 10  # what an estimate looks at: that many runs of that many examples


class DiskError(SourceError):
    """The disk does not take a shard; the message is the reason alone."""


class Bad(NamedTuple):
    """An example that is left out: its number in the source, its id, and why."""

    row: int
    id: str
    reason: str


class ShardChunk(NamedTuple):
    """What became of the examples of one chunk; written beside its shard."""

    number: int
    images: int  # in the good examples
    bad: tuple[Bad, ...]
    shard: Shard | None  # None where nothing was written


@dataclass(frozen=True)
class Job:
    """What to make shards of."""

    source: Source  # random access, cheap to pickle
    shard_rows: int  # examples of a chunk
    folder: str = ""  # an existing local one for the shards; "" = look at the examples and write nothing
    check: Callable[[Example], object] = id  # what else an example must pass; ValueError where a run could not use it
    max_pixels: int = DataConfig.max_pixels  # of the largest image that is decoded; 0 = look no further than `check` does

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-len(self.source) // self.shard_rows)

    def rows(self, number: int) -> range:
        """Examples of the source in a chunk."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, len(self.source)))


def read_checked(job: Job, row: int) -> tuple[Example, bytes]:
    """Example `row` as a shard holds it, and its record.

    Raises:
      ExampleError: a run could not use it, or it cannot be stored. SourceError: the source as a whole is lost.
    """
    original = job.source[row]
    record = encode_example(original)
    stored = decode_example(record, row)
    for image, named in zip(stored.images, original.images, strict=True) if job.max_pixels else ():
        try:
            open_image(image, max_pixels=job.max_pixels)  # what is stored, not the file, which may change meanwhile
        except ImageError as error:
            where = f"image {named}" if isinstance(named, str) else "an embedded image"
            why = str(error).partition(": ")[2]  # after the name of what was read, which is nameless bytes here
            raise ExampleError(f"{original.name}: cannot read {where}: {why}; fix or remove it", original.name) from error
    try:
        job.check(stored)
    except SourceError:
        raise
    except ValueError as error:
        raise ExampleError(f"{original.name}: {error}", original.name) from error
    return stored, record


def record_bytes(source: Source) -> float:
    """About how many bytes of a shard an example takes, from some drawn from the source.

    SourceError where none of them can be used, and there are more: known before a long run fails at its end.
    """
    rows: Sequence[int] = range(len(source))
    if len(rows) > _RUNS * _RUN:  # short runs: of a table, or over a network, single ones cost a block each
        starts = np.random.default_rng(0).choice(len(source) - _RUN, _RUNS, replace=False)
        rows = np.unique(starts[:, None] + np.arange(_RUN)).tolist()
    sizes, reasons = [], []
    for row in rows:
        try:
            sizes.append(len(encode_example(source[row])) + _RECORD_BYTES)
        except ExampleError as error:
            reasons.append(str(error))
    if not sizes and len(rows) < len(source):
        raise SourceError(
            f"none of {len(rows)} records drawn from the data can be used; the first: {reasons[0]}; point to the data with "
            "--config.data.root=DIR and to its images with --config.data.images=FOLDER"
        )
    return sum(sizes) / len(rows)


def shard_bytes(rows: int, shards: int, per_row: float) -> int:
    """About how many bytes the shards of so many examples take."""
    return round(rows * per_row) + shards * _SHARD_BYTES


def shard_path(folder: str | os.PathLike[str], number: int) -> Path:
    """Where the shard of a chunk is; what is known of it lies beside it, as .json."""
    return Path(folder) / f"shard-{number:05d}{SUFFIX}"


def make_chunk(job: Job, number: int, tick: Callable[[], None]) -> ShardChunk:
    """Check the examples of a chunk and write its shard, named once it is whole and its `ShardChunk` lies beside it.

    `tick` is called after every example; what it raises ends the chunk without a trace, as does a DiskError where the shard
    cannot be written.
    """
    bad: list[Bad] = []
    images = 0

    def good() -> Iterator[bytes]:
        nonlocal images
        for row in job.rows(number):
            try:
                example, record = read_checked(job, row)
            except ExampleError as error:
                bad.append(Bad(row, cut(error.name), one_line(str(error))))
            else:
                images += len(example.images)
                yield record
            tick()

    if not job.folder:
        deque(good(), maxlen=0)
        return ShardChunk(number, images, tuple(bad), None)
    path = shard_path(job.folder, number)
    try:
        with tempfile.TemporaryDirectory(dir=job.folder, prefix=SCRATCH) as scratch:
            shard = write_shard(Path(scratch) / "shard", path.name, good())
            chunk = ShardChunk(number, images, tuple(bad), shard)
            path.unlink(missing_ok=True)  # of an earlier attempt: never beside what is said of this one
            write_whole(path.with_suffix(".json"), json.dumps(chunk))
            if shard:
                os.replace(Path(scratch) / "shard", path)
    except (OSError, RuntimeError) as error:  # array_record has RuntimeErrors alone
        said = error.strerror if isinstance(error, OSError) else ""
        raise DiskError(said or str(error).split(";")[0]) from error
    return chunk


def make_chunks(
    job: Job,
    numbers: Sequence[int],
    workers: int,
    take: Callable[[ShardChunk], None],
    looked: Callable[[int], None],
    stopped: Callable[[], bool],
) -> None:
    """Make chunks in worker processes, until all are made or `stopped` says so; what is half made then is dropped.

    Args:
      take: called here with every chunk made, in the order in which they end.
      looked: called here about five times a second with the number of examples looked at; `stopped` is asked as often.

    Raises:
      DiskError, SourceError: of the first chunk that fails; the others are dropped.
    """
    if not numbers:
        return
    context = multiprocessing.get_context("spawn")
    rows, stop = context.Value("q", 0), context.Event()
    lost = "a worker process was killed, by the system if memory ran out; run the same command again with fewer --workers"
    # Of its own modules a worker imports the one that was started.
    with process_pool(min(workers, len(numbers)), partial(_make_chunk, job, rows, stop), lost) as submit:
        try:
            waiting = {submit(number) for number in numbers}
            while waiting and not stopped():
                done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                looked(rows.value)
                for future in done:
                    take(future.result())
        finally:
            stop.set()


class _Stopped(Exception):
    """Ends a chunk that nobody waits for any more."""


def _make_chunk(job: Job, rows: Any, stop: Any, number: int) -> ShardChunk:
    """In a worker process; `rows` is the shared number of examples looked at, `stop` the event that ends it."""
    warnings.simplefilter("ignore")  # Pillow's: what does not decode is reported, the rest is as training sees it

    def tick() -> None:
        with rows.get_lock():
            rows.value += 1
        if stop.is_set():
            raise _Stopped

    return make_chunk(job, number, tick)
