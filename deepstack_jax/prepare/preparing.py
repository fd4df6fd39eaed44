"""Examples of any source into ArrayRecord shards, every image decoded once: chunk by chunk, in worker processes.

Chunk i is the rows i*n .. i*n+n-1 of the source in their order and becomes shard i, so that neither the number of workers nor
an interruption shows in the bytes. Rows that cannot be used are left out of their shard and named.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from deepstack_jax.atomic import SCRATCH
from deepstack_jax.config import DataConfig
from deepstack_jax.data.encode.image import ImageError, open_image
from deepstack_jax.data.example import Example, ExampleError, Source, SourceError
from deepstack_jax.data.shards.codec import decode_example, encode_example
from deepstack_jax.data.shards.reader import SUFFIX, RecordWriter, read_manifest
from deepstack_jax.data.workers import ignore_signals_exit_with_parent
from deepstack_jax.printing import cut, one_line

"""How folders of shards begin that are being written; a kill leaves them behind."""

_LOOK_SECONDS = 0.2  # between two looks at the workers
_RECORD_BYTES = 50  # about what array_record puts around a record
_SHARD_BYTES = 128 << 10  # and around a shard: records and footer are each filled up to 64 KiB
_RUNS, _RUN = 20, 10  # what an estimate looks at: that many runs of that many rows


class DiskError(SourceError):
    """The disk does not take a shard; the message is the reason alone."""


class Bad(NamedTuple):
    """A row that is left out."""

    row: int
    id: str
    reason: str


class Chunk(NamedTuple):
    """What became of the rows of one chunk.

    Attributes:
        number: of the chunk and its shard.
        images: in the rows that are good.
        bytes: of their records.
        bad: the other rows.
        manifest: of the shard, as `records` writes it; None where nothing was written.
    """

    number: int
    images: int
    bytes: int
    bad: tuple[Bad, ...]
    manifest: dict[str, Any] | None


@dataclass(frozen=True)
class Job:
    """What to make shards of.

    Attributes:
        source: random access, cheap to pickle.
        shard_rows: rows of a chunk.
        folder: an existing local folder for the shards; "" = look at the rows and write nothing.
        check: what else an example must stand: raises ValueError where a run could not use it.
        max_pixels: of the largest image that is decoded; 0 = look no further into any than `check` does.
    """

    source: Source
    shard_rows: int
    folder: str = ""
    check: Callable[[Example], object] = id
    max_pixels: int = DataConfig.max_pixels

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-len(self.source) // self.shard_rows)

    def rows(self, number: int) -> range:
        """Rows of the source in a chunk."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, len(self.source)))


def read_checked(job: Job, row: int) -> tuple[Example, int]:
    """Row `row` as a shard holds it, and the bytes of its record.

    Raises:
        ExampleError: it is no usable conversation, cannot be stored, fails the check, or an image of it does not decode.
        SourceError: what the source raises when all of it is lost.
    """
    original = job.source[row]
    record = encode_example(original)
    stored = decode_example(record, row)
    for image, named in zip(stored.images, original.images, strict=True) if job.max_pixels else ():
        try:
            open_image(image, max_pixels=job.max_pixels)  # what is stored, not the file, which may change meanwhile
        except ImageError as error:
            where = f"image {named}" if isinstance(named, str) else "an embedded image"
            why = str(error).partition(": ")[2]  # behind what was read, which is nameless bytes here
            raise ExampleError(f"{original.name}: cannot read {where}: {why}; mend or remove it", original.name) from error
    try:
        job.check(stored)
    except SourceError:
        raise
    except ValueError as error:
        raise ExampleError(f"{original.name}: {error}", original.name) from error
    return stored, len(record)


def record_bytes(source: Source) -> float:
    """About how many bytes of a shard a row takes, from some rows drawn from the source.

    Raises:
        SourceError: none of them can be used, and there are more: before a long run fails at its end.
    """
    rows: Sequence[int] = range(len(source))
    if len(rows) > _RUNS * _RUN:  # short runs: of a table, or over a network, single rows cost a block each
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
            f"none of {len(rows)} rows drawn from the data can be used; the first: {reasons[0]}; point to the data with "
            "--config.data.root=DIR and to its images with --config.data.images=FOLDER"
        )
    return sum(sizes) / len(rows)


def shard_bytes(rows: int, shards: int, per_row: float) -> int:
    """About how many bytes the shards of so many rows take."""
    return round(rows * per_row) + shards * _SHARD_BYTES


def make_chunk(job: Job, number: int, tick: Callable[[], None]) -> Chunk:
    """Check the rows of a chunk and write its shard, which appears under its name when it is whole.

    Args:
        job: what to make.
        number: of the chunk.
        tick: called after every row; what it raises ends the chunk without a trace.

    Raises:
        DiskError: the shard cannot be written; nothing of it is left.
        SourceError: the source is lost.
    """
    bad: list[Bad] = []
    images = size = 0

    def good() -> Iterator[Example]:
        nonlocal images, size
        for row in job.rows(number):
            try:
                example, length = read_checked(job, row)
            except ExampleError as error:
                bad.append(Bad(row, cut(error.name), one_line(str(error))))
            except SourceError as error:
                raise _LostSource(str(error)) from error
            else:
                images, size = images + len(example.images), size + length
                yield example
            tick()

    if job.folder:
        manifest = _write_shard(good(), job.folder, f"shard-{number:05d}{SUFFIX}")
    else:
        manifest = None
        for _ in good():
            pass
    return Chunk(number, images, size, tuple(bad), manifest)


class _LostSource(SourceError):
    """Tells an error of what is read from one of what is written."""


def _write_shard(examples: Iterator[Example], folder: str, name: str) -> dict[str, Any] | None:
    """The manifest of one shard, `name`, with the examples; None where there are none."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
            first = next(examples, None)
            if first is None:
                return None
            with RecordWriter(scratch, {}, shard_bytes=sys.maxsize) as writer:
                for example in chain([first], examples):
                    writer.write(example)
            manifest = read_manifest(scratch)
            (shard,) = manifest["shards"]
            os.replace(os.path.join(scratch, shard["file"]), os.path.join(folder, name))
            shard["file"] = name
            return manifest
    except _LostSource:
        raise
    except (SourceError, OSError, RuntimeError) as error:  # array_record has RuntimeErrors alone
        cause = error.__cause__ or error
        said = cause.strerror if isinstance(cause, OSError) else ""
        raise DiskError(said or str(cause).split(";")[0]) from error


def make_chunks(
    job: Job,
    numbers: Sequence[int],
    workers: int,
    take: Callable[[Chunk], None],
    looked: Callable[[int], None],
    stopped: Callable[[], bool],
) -> None:
    """Make chunks in worker processes, until all are made or `stopped` says so; what is half made then is dropped.

    Args:
        job: what to make.
        numbers: of the chunks.
        workers: processes, at least 1.
        take: called here with every chunk made, in the order in which they end.
        looked: called here about five times a second with the number of rows looked at.
        stopped: asked as often.

    Raises:
        DiskError, SourceError: of the first chunk that fails; the others are dropped.
    """
    if not numbers:
        return
    # Spawned, not forked: the caller may have threads. Of its own modules a worker imports the one that was started.
    context = multiprocessing.get_context("spawn")
    rows, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(min(workers, len(numbers)), context, _start_worker, (job, rows, stop)) as pool:
        try:
            waiting = _submit(pool, numbers)
            while waiting and not stopped():
                done, waiting = wait(waiting, _LOOK_SECONDS, FIRST_COMPLETED)
                looked(rows.value)
                for future in done:
                    take(future.result())
        except BrokenProcessPool as error:
            raise SourceError(
                "a worker process was killed, by the system if memory ran out; run the same command again with fewer --workers"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, numbers: Sequence[int]) -> set:
    """Start the workers. They inherit the blocked signals, so that a Ctrl-C cannot hit one before it knows to ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        return {pool.submit(_work, number) for number in numbers}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stopped(Exception):
    """Ends a chunk that nobody waits for any more."""


_worker: tuple[Job, Any, Any]
"""Of a worker process: its job, the shared number of rows looked at, the event that ends it."""


def _start_worker(job: Job, rows: Any, stop: Any) -> None:
    global _worker
    ignore_signals_exit_with_parent()
    warnings.simplefilter("ignore")  # Pillow's: what does not decode is reported, the rest is as training sees it
    _worker = job, rows, stop


def _work(number: int) -> Chunk:
    job, rows, stop = _worker

    def tick() -> None:
        with rows.get_lock():
            rows.value += 1
        if stop.is_set():
            raise _Stopped

    return make_chunk(job, number, tick)
