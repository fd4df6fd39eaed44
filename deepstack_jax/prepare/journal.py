"""Which shards of a folder are finished, and what they are made from: so that a run that was killed goes on, and only that one.

While it is made, a folder holds `prepare.json` (input and options), finished shards, and `journal.jsonl` with a line for each.
When it is done it holds `manifest.json`, `bad.jsonl` where rows were left out, and no journal.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepstack_jax.atomic import SCRATCH, write_whole
from deepstack_jax.data.example import ExampleError, SourceError
from deepstack_jax.data.shards.reader import MANIFEST, SUFFIX, ShardSource
from deepstack_jax.prepare.preparing import Bad, Chunk, Job, read_checked

BAD, IDENTITY, JOURNAL = "bad.jsonl", "prepare.json", "journal.jsonl"


class Journal:
    """The state of one folder of shards; a context manager that keeps other runs out of it.

    Args:
        folder: an existing local folder.
        options: what was asked for; goes into the manifest.
        inputs: versions of the files read; with `options` what must not change between a run and the one that goes on.
        force: drop what an earlier run left in the folder, finished or not.
        look: change nothing; raise what a run would raise.

    Attributes:
        chunks: the finished ones by number, whose shards are there in their full size.
        manifest: of a folder that is finished, else None.

    Raises:
        SourceError: another run is at work there; or the folder holds shards of other input or options, or of unknown
            origin: going on would mix two data sets.
    """

    def __init__(
        self, folder: Path, options: Mapping[str, Any], inputs: Mapping[str, str], force: bool = False, look: bool = False
    ) -> None:
        self.folder, self._options, self._look = folder, dict(options), look
        self._lock = os.open(folder, os.O_RDONLY)
        try:
            self._take_lock()
            if not self._begun():
                self._refuse_strangers()
            if force and not look:
                self._clear()
            if not (force and look):
                self._check_identity({"options": dict(options), "inputs": dict(inputs)})
            if not look:
                self._sweep()
            self.manifest = None if force else self._finished()
            self.chunks = {} if force or self.manifest else self._read()
        except OSError as error:
            os.close(self._lock)
            raise SourceError(f"cannot use {folder}: {error.strerror}; mend that, or name another --out") from error
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)  # gives the lock back

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SourceError(f"another prepare is writing to {self.folder}; wait for it, or name another --out") from None
        except OSError:
            return  # some network file systems have no locks

    def _begun(self) -> bool:
        """Whether anything is there that would be lost, or mixed with what is to come."""
        return (self.folder / MANIFEST).exists() or any(_shards(self.folder))

    def _refuse_strangers(self) -> None:
        ours = (IDENTITY, JOURNAL, BAD)
        strange = sorted(p.name for p in self.folder.iterdir() if p.name not in ours and not p.name.startswith(SCRATCH))
        if strange:
            raise SourceError(f"{self.folder} holds {strange[0]}, which is not of a run of prepare; name another --out")

    def _clear(self) -> None:
        # The manifest goes first: without it the rest is not taken for a finished folder.
        for path in [self.folder / MANIFEST, *_shards(self.folder), *(self.folder / n for n in (BAD, JOURNAL, IDENTITY))]:
            path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        for scratch in self.folder.glob(f"{SCRATCH}*"):
            if scratch.is_dir():
                shutil.rmtree(scratch, ignore_errors=True)  # a worker of a run just killed may still be at it
            else:
                scratch.unlink()

    def _check_identity(self, ours: dict[str, Any]) -> None:
        path = self.folder / IDENTITY
        ours = json.loads(json.dumps(ours))
        if not path.exists() and self._begun():
            raise SourceError(f"{self.folder} holds shards of unknown origin; name another --out, or replace them with --force")
        try:
            theirs = json.loads(path.read_text()) if path.exists() else {"options": {}, "inputs": {}}
            there, now = ({**side["options"], **side["inputs"]} for side in (theirs, ours))
        except (ValueError, TypeError, KeyError) as error:
            raise SourceError(f"{path} is damaged ({error}); start over with --force, or name another --out") from error
        changed = [key for key in {**there, **now} if there.get(key) != now.get(key)]
        if changed and not self._begun():
            if self._look:
                return
            (self.folder / JOURNAL).unlink(missing_ok=True)  # rows that were bad, at most
            _publish(path, ours)
        elif changed:
            said = "; ".join(f"{key}: {_short(there, key)} there, {_short(now, key)} now" for key in changed)
            raise SourceError(
                f"{self.folder} was begun with other input or options: {said}; name another --out, or start over with --force"
            )

    def _finished(self) -> dict[str, Any] | None:
        if not (self.folder / MANIFEST).exists():
            return None
        if not self._look:
            (self.folder / JOURNAL).unlink(missing_ok=True)
        try:
            return ShardSource(str(self.folder)).manifest  # looks at the size and the rows of every shard
        except SourceError as error:
            raise SourceError(f"{error}, with --force") from error

    def _read(self) -> dict[int, Chunk]:
        """Finished chunks; a last line that a kill or a full disk cut short is removed, so that the next one stands alone."""
        path = self.folder / JOURNAL
        chunks, good = {}, 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                number, images, size, bad, manifest = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            good += len(line)
            chunk = Chunk(number, images, size, tuple(Bad(*entry) for entry in bad), manifest)
            chunks.pop(number, None)
            if self._is_there(chunk):
                chunks[number] = chunk
        if path.exists() and not self._look:
            os.truncate(path, good)
        return chunks

    def _is_there(self, chunk: Chunk) -> bool:
        for shard in chunk.manifest["shards"] if chunk.manifest else ():
            path = self.folder / shard["file"]
            if not path.exists() or path.stat().st_size != shard["bytes"]:
                return False
        return True

    def left(self, job: Job) -> list[int]:
        """Numbers of the chunks still to make: those not finished, and those of which a bad row can be used by now."""
        mended = [number for number, chunk in self.chunks.items() if any(_is_good(job, bad.row) for bad in chunk.bad)]
        for number in mended:
            del self.chunks[number]
        return [number for number in range(job.chunks) if number not in self.chunks]

    def add(self, chunk: Chunk) -> None:
        """Put a finished chunk on record; OSError where the disk does not take the line."""
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(chunk) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.chunks[chunk.number] = chunk

    def finish(self, rows: int, max_bad_fraction: float) -> dict[str, Any]:
        """Write `bad.jsonl` and then `manifest.json`, which is returned: the folder is done.

        Args:
            rows: of the source.
            max_bad_fraction: share of them that may be left out.

        Raises:
            SourceError: more are bad, or none is good; training would go on with much less than was asked for. The report is
                written, and finished shards are kept.
        """
        chunks = [self.chunks[number] for number in sorted(self.chunks)]
        bad = [entry for chunk in chunks for entry in chunk.bad]
        report = self.folder / BAD
        report.unlink(missing_ok=True)
        if bad:
            _publish(report, *(entry._asdict() for entry in bad))
        problem = too_many_bad(bad, rows, max_bad_fraction)
        if problem:
            raise SourceError(
                f"{problem}; all of them with reasons: {report}; mend them and run the same command, which makes only their "
                "shards again, or allow more"
            )
        parts = [chunk.manifest for chunk in chunks if chunk.manifest]
        manifest = parts[0] | {
            "source": self._options | {"left_out": [entry.row for entry in bad]},
            **{total: sum(part[total] for part in parts) for total in ("rows", "images", "bytes")},
            "shards": [shard for part in parts for shard in part["shards"]],
        }
        kept = {shard["file"] for shard in manifest["shards"]}
        for path in _shards(self.folder):  # of a chunk whose rows all became unusable since it was written
            if path.name not in kept:
                path.unlink()
        self._sweep()
        _publish(self.folder / MANIFEST, manifest, indent=1)
        (self.folder / JOURNAL).unlink()
        self.manifest = manifest
        return manifest


def too_many_bad(bad: Sequence[Bad], rows: int, max_bad_fraction: float) -> str:
    """What to say where more rows than that share of a source cannot be used, or none of them can; else ""."""
    if len(bad) <= max_bad_fraction * rows and len(bad) < rows:
        return ""
    return (
        f"{len(bad):,} of {rows:,} rows cannot be used, config.data.max_bad_fraction={max_bad_fraction:g} allows "
        f"{min(rows - 1, int(max_bad_fraction * rows)):,}; the first: {bad[0].reason}"
    )


def source_rows(manifest: Mapping[str, Any]) -> np.ndarray:
    """i64[rows]: for each example of a finished folder, its row in the source, where rows were left out."""
    source = manifest["source"]
    return np.setdiff1d(np.arange(source["rows"], dtype=np.int64), np.array(source["left_out"], np.int64))


def _is_good(job: Job, row: int) -> bool:
    try:
        read_checked(job, row)
    except ExampleError:
        return False
    return True


def _shards(folder: Path) -> Iterator[Path]:
    return folder.glob(f"shard-*{SUFFIX}")


def _short(side: Mapping[str, Any], key: str) -> str:
    if key not in side:
        return "nothing"
    text = side[key] if isinstance(side[key], str) and side[key] else json.dumps(side[key])
    return text if len(text) <= 200 else f"{text[:197]}..."


def _publish(path: Path, *values: Any, indent: int | None = None) -> None:
    """Write JSON, one value a line, whole or not at all."""
    write_whole(path, "".join(json.dumps(value, indent=indent) + "\n" for value in values))
