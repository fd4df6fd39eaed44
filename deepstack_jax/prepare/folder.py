"""A folder of shards while it is made and when it is done: so that a run that was killed goes on, and only that one.

While it is made it holds `prepare.json` (input and options), and for every finished shard what is known of it, as
`shard-00000.json`. When it is done it holds `manifest.json` in place of those, and `bad.jsonl` where examples were left out.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepstack_jax.atomic import SCRATCH, write_whole
from deepstack_jax.data.example import ExampleError, SourceError
from deepstack_jax.data.shards.reader import MANIFEST, SUFFIX, Shard, ShardSource
from deepstack_jax.data.shards.writer import manifest_of
from deepstack_jax.prepare.chunks import Bad, Job, ShardChunk, read_checked, shard_path

BAD, IDENTITY = "bad.jsonl", "prepare.json"
_JOURNAL = "journal.jsonl"  # where earlier releases kept what is known of the finished shards


class ShardFolder:
    """The state of one existing local folder of shards; a context manager that keeps other runs out of it.

    Args:
      options: what was asked for; goes into the manifest.
      inputs: versions of the files read; with `options` what must not change between a run and the one that goes on.
      force: drop what an earlier run left in the folder, finished or not.
      look: change nothing; raise what a run would raise.

    Raises:
      SourceError: another run is at work there; or the folder holds shards of other input or options, or of unknown
          origin: going on would mix two data sets.
    """

    def __init__(
        self, path: Path, options: Mapping[str, Any], inputs: Mapping[str, str], force: bool = False, look: bool = False
    ) -> None:
        self.path, self._options = path, dict(options)
        self._lock = os.open(path, os.O_RDONLY)
        try:
            _lock(self._lock, path)
            self._refuse_strangers()
            if force and not look:
                self._delete((path / MANIFEST, *self._ours(), path / IDENTITY))  # first the manifest: nothing is finished then
            if not (force and look):
                self._check_identity({"options": dict(options), "inputs": dict(inputs)}, look)
            self.manifest = None if force else self._finished()  # of a folder that is finished
            self.chunks = {} if force or self.manifest else self._read()  # finished ones, whose shards have their full size
            if not look:
                self._sweep()
        except OSError as error:
            os.close(self._lock)
            raise SourceError(f"cannot use {path}: {error.strerror}; fix that, or name another --out") from error
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)  # gives the lock back

    def left(self, job: Job) -> list[int]:
        """Numbers of the chunks still to make: those not finished, and those of which a bad example can be used by now."""
        for number in [number for number, chunk in self.chunks.items() if any(_is_good(job, bad.row) for bad in chunk.bad)]:
            del self.chunks[number]
        return [number for number in range(job.chunks) if number not in self.chunks]

    def add(self, chunk: ShardChunk) -> None:
        """Take a finished chunk into account."""
        self.chunks[chunk.number] = chunk

    def finish(self, rows: int, max_bad_fraction: float) -> None:
        """Write `bad.jsonl` and then `manifest.json`: the folder is done.

        SourceError where more of the `rows` records than that share are bad, or all: training would go on with less than asked
        for. The report is written, and finished shards are kept.
        """
        chunks = [self.chunks[number] for number in sorted(self.chunks)]
        bad, shards = [entry for chunk in chunks for entry in chunk.bad], [chunk.shard for chunk in chunks if chunk.shard]
        report = self.path / BAD
        report.unlink(missing_ok=True)
        if bad:
            write_whole(report, "".join(json.dumps(entry._asdict()) + "\n" for entry in bad))
        if problem := too_many_bad(bad, rows, max_bad_fraction):
            raise SourceError(
                f"{problem}; all of them with reasons: {report}; fix them and run the same command, which makes only their "
                "shards again, or allow more"
            )
        source = self._options | {"left_out": [entry.row for entry in bad]}
        self.manifest = manifest_of(shards, source, sum(chunk.images for chunk in chunks))
        write_whole(self.path / MANIFEST, json.dumps(self.manifest, indent=1) + "\n")
        self._sweep()

    def _ours(self) -> Iterable[Path]:
        """What is there of an unfinished or finished set, but for what the folder is about and the manifest."""
        return *self.path.glob(f"shard-*{SUFFIX}"), *self.path.glob("shard-*.json"), self.path / BAD, self.path / _JOURNAL

    def _begun(self) -> bool:
        """Whether anything is there that would be lost, or mixed with what is to come."""
        return (self.path / MANIFEST).exists() or any(self.path.glob(f"shard-*{SUFFIX}"))

    def _refuse_strangers(self) -> None:
        ours = {path.name for path in self._ours()} | {IDENTITY}
        strange = sorted(p.name for p in self.path.iterdir() if p.name not in ours and not p.name.startswith(SCRATCH))
        if strange and not self._begun():
            raise SourceError(f"{self.path} holds {strange[0]}, which is not of a run of prepare; name another --out")

    def _delete(self, paths: Iterable[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what a kill left half written, and what only an unfinished folder needs."""
        for scratch in self.path.glob(f"{SCRATCH}*"):
            if scratch.is_dir():
                shutil.rmtree(scratch, ignore_errors=True)  # a worker of a run just killed may still be at it
            else:
                scratch.unlink()
        self._delete([self.path / _JOURNAL, *(self.path.glob("shard-*.json") if self.manifest else ())])

    def _check_identity(self, ours: dict[str, Any], look: bool) -> None:
        path = self.path / IDENTITY
        ours = json.loads(json.dumps(ours))
        if not path.exists() and self._begun():
            raise SourceError(f"{self.path} holds shards of unknown origin; name another --out, or replace them with --force")
        try:
            theirs = json.loads(path.read_text()) if path.exists() else {"options": {}, "inputs": {}}
            there, now = ({**side["options"], **side["inputs"]} for side in (theirs, ours))
        except (ValueError, TypeError, KeyError) as error:
            raise SourceError(f"{path} is damaged ({error}); start over with --force, or name another --out") from error
        changed = [key for key in {**there, **now} if there.get(key) != now.get(key)]
        if changed and self._begun():
            said = "; ".join(f"{key}: {_short(there, key)} there, {_short(now, key)} now" for key in changed)
            raise SourceError(
                f"{self.path} was begun with other input or options: {said}; name another --out, or start over with --force"
            )
        if changed and not look:
            self._delete(self._ours())  # examples that were bad, at most
            write_whole(path, json.dumps(ours) + "\n")

    def _finished(self) -> dict[str, Any] | None:
        if not (self.path / MANIFEST).exists():
            return None
        try:
            return ShardSource(str(self.path)).manifest  # looks at the size and the records of every shard
        except SourceError as error:
            raise SourceError(f"{error}, with --force") from error

    def _read(self) -> dict[int, ShardChunk]:
        if (self.path / _JOURNAL).exists():
            warnings.warn(f"{self.path} was begun by an earlier release: its shards are made again", stacklevel=2)
        chunks = {}
        for beside in self.path.glob("shard-*.json"):
            try:
                number, images, bad, shard = json.loads(beside.read_bytes())
                chunk = ShardChunk(number, images, tuple(Bad(*entry) for entry in bad), shard and Shard(*shard))
                path = shard_path(self.path, number)
            except (ValueError, TypeError):  # damaged: it is made again
                continue
            if not chunk.shard or (path.exists() and path.stat().st_size == chunk.shard.bytes):
                chunks[number] = chunk
        return chunks


def too_many_bad(bad: Sequence[Bad], rows: int, max_bad_fraction: float) -> str:
    """What to say where more rows than that share of a source cannot be used, or none of them can; else ""."""
    if len(bad) <= max_bad_fraction * rows and len(bad) < rows:
        return ""
    return (
        f"{len(bad):,} of {rows:,} records cannot be used, config.data.max_bad_fraction={max_bad_fraction:g} allows "
        f"{min(rows - 1, int(max_bad_fraction * rows)):,}; the first: {bad[0].reason}"
    )


def _lock(folder: int, path: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SourceError(f"another prepare is writing to {path}; wait for it, or name another --out") from None
    except OSError:
        return  # some network file systems have no locks


def _is_good(job: Job, row: int) -> bool:
    try:
        read_checked(job, row)
    except ExampleError:
        return False
    return True


def _short(side: Mapping[str, Any], key: str) -> str:
    if key not in side:
        return "nothing"
    text = side[key] if isinstance(side[key], str) and side[key] else json.dumps(side[key])
    return text if len(text) <= 200 else f"{text[:197]}..."
