"""Write data sets as shards with their images inside: `python -m deepstack_jax.prepare --config=FILE --out=DIR`."""

import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from absl import flags
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from deepstack_jax import cli
from deepstack_jax.config import Config, DataConfig
from deepstack_jax.data.example import SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.shards.reader import MANIFEST, verify
from deepstack_jax.data.synthetic import SPLITS
from deepstack_jax.errors import ConfigError
from deepstack_jax.prepare.chunks import DiskError, Job, ShardChunk, make_chunks, record_bytes, shard_bytes
from deepstack_jax.prepare.folder import BAD, IDENTITY, ShardFolder, too_many_bad
from deepstack_jax.printing import Console
from deepstack_jax.stop_signals import StopSignals

USAGE = """
Write the data of a configuration as ArrayRecord shards with the images inside. Every record is checked as training checks it,
every image decoded once. Stopped at any moment, the same command goes on. What cannot be used is left out: see bad.jsonl.

  python -m deepstack_jax.prepare --config=configs/receipts.py --config.data.root=DIR --out=shards
  python -m deepstack_jax.prepare --config=configs/llava15.py:finetune --config.data.root=DIR --dry-run
  python -m deepstack_jax.prepare --verify=shards

  --config=FILE[:ARGUMENT]   configuration file; --config.KEY=VALUE overrides any key of it
  --out=DIR                  local folder for DIR/train and DIR/validation
  --split=SPLIT              train, validation or both (default: those that the configuration names)
  --workers=N                processes that read and decode (default: one per CPU core); not seen in the bytes
  --shard_rows=1000          records of the source in a shard
  --force                    start over, in place of what an earlier run left in DIR
  --dry-run                  look at files, records, missing images and space; writes nothing, and fails where a run would
  --decode                   with --dry-run: decode every image, too
  --verify=DIR               compare every byte of finished shards with their manifest

Train on them with --config.data.train=DIR/train --config.data.validation=DIR/validation, DIR being absolute.
Exit codes: 0 done; 1 a mistake in the input, said in one line; 75 stopped by SIGTERM and 130 by Ctrl-C, finished shards kept.
"""

_SHOWN = 10  # bad rows or missing images that a dry run names
_LOOKED_ROWS = 100  # at once by a worker in a dry run
_SUMMARY = ("split", "records", "bad", "images", "bytes", "shards", "seconds")
_LOOKED = ("split", "records", "bad", "images named", "files missing", "bytes", "shards")

FLAGS = (
    cli.Flag(flags.DEFINE_string, "out", "", "Folder for the shards."),
    cli.Flag(flags.DEFINE_string, "split", "", "train, validation or both."),
    cli.Flag(flags.DEFINE_integer, "workers", None, "Processes that read and decode.", lower_bound=1),
    cli.Flag(flags.DEFINE_integer, "shard_rows", 1000, "Records of the source in a shard.", lower_bound=1),
    cli.Flag(flags.DEFINE_bool, "force", False, "Start over."),
    cli.Flag(flags.DEFINE_bool, "dry-run", False, "Look and write nothing."),
    cli.Flag(flags.DEFINE_bool, "decode", False, "With --dry-run: decode every image."),
    cli.Flag(flags.DEFINE_string, "verify", "", "Folder of finished shards to check."),
    cli.CONFIG,
)


@dataclass(frozen=True)
class Split:
    """One folder of shards to make."""

    name: str  # train or validation
    job: Job  # without a folder in a dry run that names no --out
    per_row: float  # estimated bytes of a shard that an example takes
    options: dict[str, Any]  # see `ShardFolder`
    inputs: dict[str, str]

    def bytes_of(self, numbers: Iterable[int]) -> int:
        """About how many bytes the shards of these chunks take."""
        rows = [len(self.job.rows(number)) for number in numbers]
        return shard_bytes(sum(rows), len(rows), self.per_row)

    def folder(self, force: bool, *, look: bool = False) -> ShardFolder:
        """The state of its folder, which exists."""
        return ShardFolder(Path(self.job.folder), self.options, self.inputs, force, look)


def main() -> int:
    console, asked = Console(), flags.FLAGS
    if asked.verify:
        return verify_all(asked.verify, console)
    config, look = cli.parse_config(), asked["dry-run"].value
    if not asked.out and not look:
        raise ConfigError("--out is missing; e.g. --out=shards, or look first with --dry-run")
    if files.is_url(asked.out):
        what = f"--out={asked.out} is a URL"
        raise ConfigError(f"{what}; write to a local folder and copy it there: training reads shards from URLs")
    if asked.decode and not look:
        raise ConfigError("--decode belongs to --dry-run; without it every image is decoded anyway")
    max_pixels = config.data.max_pixels if asked.decode or not look else 0
    splits = [open_split(config, name, asked.out, asked.shard_rows, max_pixels, console) for name in chosen_splits(config)]
    run = dry_run if look else prepare
    return run(splits, config.data, asked.workers or os.cpu_count() or 1, console)


def chosen_splits(config: Config) -> list[str]:
    """The splits to prepare; one that the configuration does not name is refused when it is opened."""
    asked, data = flags.FLAGS.split, config.data
    if asked not in ("", "both", *SPLITS):
        raise ConfigError(f"--split got {asked!r}, expected train, validation or both")
    named = ["train"] if data.train or data.sets or data.generated else []
    named += ["validation"] if data.validation or data.generated else []
    if not asked and named:
        return named
    return list(SPLITS) if asked in ("", "both") else [asked]


def open_split(config: Config, name: str, out: str, shard_rows: int, max_pixels: int, console: Console) -> Split:
    """Open the data, look at some of it, and say what the sets of a mixture hold."""
    # Imported late, since worker processes import this module: mixtures import Grain, and Grain jax.
    from deepstack_jax.data.encode.sizes import example_check
    from deepstack_jax.data.fingerprint import describe_files, describe_options
    from deepstack_jax.data.open import open_source
    from deepstack_jax.data.order.mixture import Mixture, describe_mixture

    check, checked = example_check(config.data_spec)
    with console.status(f"opening {name} data"):
        source = open_source(config.data, name)
        per_row = record_bytes(source)
        options = describe_options(config.data, name, source, shard_rows) | checked
        inputs = describe_files(config.data, name, source)
    if isinstance(source, Mixture):
        console.print(describe_mixture(source))
        if uneven := [f"{part.name} ({part.config.repeat:g})" for part in source.parts if part.config.repeat != 1]:
            warnings.warn(
                f"shards hold each record once, so training on them goes once through the sets {', '.join(uneven)}; to keep "
                "their repeat, prepare each by itself with --config.data.train=FILE and name the folders in config.data.sets",
                stacklevel=1,
            )
    folder = os.path.join(files.absolute(out), name) if out else ""
    return Split(name, Job(source, shard_rows, folder, check, max_pixels), per_row, options, inputs)


def prepare(splits: Sequence[Split], data: DataConfig, workers: int, console: Console) -> int:
    """Write the shards of every split; returns the exit code."""
    stop = StopSignals()
    out = os.path.dirname(splits[0].job.folder)
    table = new_table(out, _SUMMARY)
    with ExitStack() as stack:
        work = []
        for split in splits:
            cli.writable_folder(split.job.folder, "out")
            folder = stack.enter_context(split.folder(flags.FLAGS.force))
            work.append((split, folder, [] if folder.manifest else folder.left(split.job)))
        check_space(out, [(split, numbers) for split, _, numbers in work])
        for split, folder, numbers in work:
            began = time.perf_counter()
            if folder.manifest is not None:
                console.print(f"{split.name}: finished before, left as it is")
            else:
                write(split, folder, numbers, workers, data.max_bad_fraction, stop, console)
            if stop.received:
                console.print(
                    f"stopped: {len(folder.chunks)} of {split.job.chunks} {split.name} shards are finished and kept; the same "
                    "command goes on from here",
                    soft_wrap=True,
                )
                return stop.exit_code
            assert folder.manifest is not None
            table.add_row(*folder_cells(split.name, folder.manifest), f"{time.perf_counter() - began:.1f}")
    stop.release()
    console.print(table)
    for _, folder, _ in work:
        if (folder.path / BAD).exists():
            console.print(f"left out, with reasons: {folder.path / BAD}", soft_wrap=True)
    words = [f"--config.data.{split.name}={shlex.quote(split.job.folder)}" for split in splits]
    if data.source != "files":
        words.insert(0, "--config.data.source=files")
    console.print(f"to train on them: {' '.join(words)}", soft_wrap=True)
    return cli.EXIT_DONE


def write(
    split: Split,
    folder: ShardFolder,
    numbers: Sequence[int],
    workers: int,
    max_bad_fraction: float,
    stop: StopSignals,
    console: Console,
) -> None:
    """Make the shards that are left, and the manifest unless the run is stopped.

    SourceError where the disk does not take them, saying how much room they need, or too many examples are bad.
    """
    job = split.job
    if folder.chunks:
        console.print(f"{split.name}: {len(folder.chunks)} of {job.chunks} shards were finished before")
    try:
        with progress(split.name, job, numbers, console) as looked:
            make_chunks(job, numbers, workers, folder.add, looked, lambda: stop.received)
        if not stop.received:
            folder.finish(len(job.source), max_bad_fraction)
    except (DiskError, OSError) as error:
        left = [number for number in numbers if number not in folder.chunks]
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SourceError(
            f"cannot write to {job.folder}: {reason}; about {decimal(split.bytes_of(left))} are needed for {len(left)} more of "
            f"{job.chunks} shards, {decimal(free_bytes(job.folder))} are free; make room and run the same command, which keeps "
            "what is finished, or name another --out"
        ) from error


def dry_run(splits: Sequence[Split], data: DataConfig, workers: int, console: Console) -> int:
    """Read every example, report on every split and write nothing; raises what the run itself would."""
    from deepstack_jax.data.fingerprint import named_images  # late: see `open_split`

    stop, table = StopSignals(), new_table("Dry run, nothing is written", _LOOKED)
    notes, problems, work = list[str](), list[str](), []
    for split in splits:
        job, left, finished = split.job, range(split.job.chunks), False
        if os.path.isdir(job.folder):
            with split.folder(flags.FLAGS.force, look=True) as folder:
                finished = folder.manifest is not None
                left = [] if finished else [number for number in left if number not in folder.chunks]
        work.append((split, left))
        with console.status(f"looking for the images of {split.name}"):
            named, missing = named_images(job.source)
        notes += listed(f"{split.name}: missing", missing)
        chunks: list[ShardChunk] = []
        looks = replace(job, shard_rows=min(job.shard_rows, _LOOKED_ROWS), folder="")
        with progress(split.name, looks, range(looks.chunks), console) as looked:
            make_chunks(looks, range(looks.chunks), workers, chunks.append, looked, lambda: stop.received)
        if stop.received:
            return stop.exit_code
        bad = sorted(entry for chunk in chunks for entry in chunk.bad)
        notes += listed(f"{split.name}: unusable", [entry.reason for entry in bad])
        problem = "" if finished else too_many_bad(bad, len(job.source), data.max_bad_fraction)
        problems += [f"{split.name}: {problem}"] if problem else []
        cells = [split.name, *(f"{number:,}" for number in (len(job.source), len(bad), named, len(missing)))]
        table.add_row(*cells, f"~{decimal(split.bytes_of(range(job.chunks)))}", f"{job.chunks:,}")
    stop.release()
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)
    if flags.FLAGS.out:
        out, needed = files.absolute(flags.FLAGS.out), sum(split.bytes_of(numbers) for split, numbers in work)
        place = existing(out)
        if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot write to {place}; choose another folder with --out=DIR")
        console.print(f"{out}: about {decimal(needed)} are needed, {decimal(free_bytes(out))} are free", soft_wrap=True)
        check_space(out, work)
    if problems:
        raise SourceError(f"{'; '.join(problems)}; fix them, or allow more")
    return cli.EXIT_DONE


def verify_all(out: str, console: Console) -> int:
    """Compare every byte of a folder of shards, or of the splits below it; SourceError names what differs."""
    out = files.absolute(out)
    places = (out, *(files.under(out, name) for name in SPLITS))
    begun = (MANIFEST, IDENTITY)  # of a run that finished there, or began
    folders = [place for place in places if any(files.is_file(files.under(place, name)) for name in begun)]
    if not folders:
        raise ConfigError(f"--verify={out} holds no {MANIFEST}, nor do {' and '.join(SPLITS)} in it; give the --out of a run")
    table = new_table(out, _SUMMARY)
    for folder in folders:
        began = time.perf_counter()
        with console.status(f"reading {folder}"):
            manifest = verify(folder)
        table.add_row(*folder_cells(os.path.basename(folder), manifest), f"{time.perf_counter() - began:.1f}")
    console.print(table)
    console.print("every byte is as the manifest says")
    return cli.EXIT_DONE


def check_space(out: str, work: Sequence[tuple[Split, Sequence[int]]]) -> None:
    """Stop, or warn, before hours of work that the disk has no room for. The need is an estimate, so near misses may try."""
    needed, free = sum(split.bytes_of(numbers) for split, numbers in work), free_bytes(out)
    if needed > 0.8 * free:
        message = f"about {decimal(needed)} are needed in {out}, {decimal(free)} are free; make room, or name another --out"
        if needed > 1.25 * free:
            raise SourceError(message)
        warnings.warn(message, stacklevel=1)


def existing(path: str) -> str:
    """The path, or the innermost folder around it that exists."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def free_bytes(folder: str) -> int:
    """Free on the disk where the folder is, or would be made."""
    return shutil.disk_usage(existing(folder)).free


@contextmanager
def progress(name: str, job: Job, numbers: Sequence[int], console: Console) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; yields what takes the number of rows looked at."""
    total, began = sum(len(job.rows(number)) for number in numbers), time.perf_counter()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[rate]}", TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=total, rate="")

        def looked(rows: int) -> None:
            bar.update(task, completed=rows, rate=f"{rows / (time.perf_counter() - began):,.0f} records/s")

        yield looked


def new_table(title: str, columns: Sequence[str]) -> Table:
    """A table of numbers for each split."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == "split" else "right")
    return table


def folder_cells(name: str, manifest: dict[str, Any]) -> list[str]:
    """Cells of the table for a finished folder."""
    rows, images, source = manifest["rows"], manifest["images"], manifest["source"]
    left_out = len(source["left_out"]) if "left_out" in source else 0
    return [name, f"{rows:,}", f"{left_out:,}", f"{images:,}", decimal(manifest["bytes"]), f"{len(manifest['shards']):,}"]


def listed(title: str, lines: Sequence[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    more = [f"{title}: {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else []
    return [*(f"{title}: {line}" for line in lines[:_SHOWN]), *more]


if __name__ == "__main__":
    cli.run(main, USAGE, FLAGS)
