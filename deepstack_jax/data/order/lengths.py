"""The length index: how much of a row every example of a source takes, measured once without decoding images, and kept."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import Progress

from deepstack_jax.atomic import whole_file
from deepstack_jax.config import DataSpec
from deepstack_jax.data.encode.batch_rows import ExampleSize
from deepstack_jax.data.encode.encoder import Encoder, try_record
from deepstack_jax.data.encode.sizes import measure
from deepstack_jax.data.example import BadExample, Source, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.workers import process_pool
from deepstack_jax.printing import Console

CHUNK = 512  # records measured between two saves: a second or two, which is also how long Ctrl-C takes
UNKNOWN = ExampleSize()  # of an example that cannot be used: it takes a place among a row's examples, and no room

_VERSION = 1  # of what the numbers mean
_DATA_KEYS = (
    "template",
    "max_length",
    "max_images",
    "overlong",
    "max_pixels",
    "exif",
    "control_tokens",
)  # that sizes depend on


def measure_rows(rows: range, source: Source, encoder: Encoder) -> np.ndarray:
    """Sizes i32[n, 3] of some records of a source; UNKNOWN where an example cannot be used. Raises as `try_record`."""
    found = [try_record(source, row, partial(measure, encoder=encoder)) for row in rows]
    return np.array([UNKNOWN if isinstance(size, BadExample) else size for size in found], np.int32).reshape(-1, 3)


def length_index(source: Source, spec: DataSpec, console: Console | None = None) -> np.ndarray:
    """Sizes i32[rows, 3] (see `ExampleSize`) of every example of a source, from the cache where they are known.

    Measuring is spread over `config.data.workers` processes and saved every CHUNK records: stopped, it goes on from there.

    Raises:
      SourceError: the source cannot be read, the cache cannot be written, or more of the records than
        `config.data.max_bad_fraction` cannot be used: the run would find out later, one batch at a time.
    """
    file = Path(files.cache_folder()) / "lengths" / f"{_key(source, spec)}.npy"
    sizes = _load(file, len(source))
    if sizes is not None:
        return sizes
    encoder, chunks = Encoder(spec), file.with_suffix("")
    sizes = _measure_all(source, encoder, chunks, console or Console(stderr=True))
    if not (problem := too_many_bad(sizes, source, encoder)):
        _save(file, sizes)
    shutil.rmtree(chunks, ignore_errors=True)  # after a problem, too: what could not be used is looked at again next time
    if problem:
        raise SourceError(problem)
    return sizes


def check_examples(source: Source, spec: DataSpec, limit: int = 64) -> None:
    """Stop (SourceError) before compilation where half of some examples cannot be used: the data is of another kind."""
    rows = np.unique(np.linspace(0, len(source) - 1, limit, dtype=np.int64)).tolist()
    measured = [try_record(source, row, partial(measure, encoder=Encoder(spec))) for row in rows]
    reasons = [one.reason for one in measured if isinstance(one, BadExample)]
    if len(reasons) > max(spec.data.max_bad_fraction, 0.5) * len(rows):
        raise SourceError(
            f"{len(reasons)} of {len(rows)} examples looked at cannot be used; fix them, or choose the template that they are "
            f"written for with --config.data.template=NAME; the first: {'; '.join(reasons[:3])}"
        )


def too_many_bad(sizes: np.ndarray, source: Source, encoder: Encoder) -> str:
    """What to say, with the first reasons, where more records than `config.data.max_bad_fraction` cannot be used; else ""."""
    bad = np.flatnonzero(sizes[:, 0] == 0)
    allowed = encoder.spec.data.max_bad_fraction
    if len(bad) <= allowed * len(sizes):
        return ""
    again = {row: try_record(source, row, partial(measure, encoder=encoder)) for row in bad[:3].tolist()}
    found = [one.reason if isinstance(one, BadExample) else f"record {row} can be used by now" for row, one in again.items()]
    reasons = "; ".join(found)
    return (
        f"{len(bad)} of {len(sizes)} examples cannot be used, more than config.data.max_bad_fraction={allowed}; fix them, "
        f"or allow more; the first: {reasons}"
    )


def _measure_all(source: Source, encoder: Encoder, folder: Path, console: Console) -> np.ndarray:
    """Measure chunk by chunk; chunks that an earlier attempt left in `folder` are taken over."""
    rows = len(source)
    chunks = [range(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK)]
    files_of = {chunk: folder / f"{chunk.start:09d}.npy" for chunk in chunks}
    found = {chunk: _load(files_of[chunk], len(chunk)) for chunk in chunks}
    parts = {chunk: sizes for chunk, sizes in found.items() if sizes is not None}
    missing = [chunk for chunk in chunks if chunk not in parts]
    workers = min(encoder.spec.data.workers, len(missing) // 4)  # a process starts as slowly as a few chunks are measured
    with Progress(console=console, transient=True, disable=len(missing) < 4) as progress:
        task = progress.add_task("measuring examples", total=rows, completed=sum(map(len, chunks)) - sum(map(len, missing)))
        for chunk, sizes in zip(missing, _measured(missing, source, encoder, workers), strict=True):
            parts[chunk] = sizes
            _save(files_of[chunk], sizes)
            progress.advance(task, len(chunk))
    return np.concatenate([parts[chunk] for chunk in chunks])


def _measured(chunks: Iterable[range], source: Source, encoder: Encoder, workers: int) -> Iterator[np.ndarray]:
    """`measure_rows` of every chunk, in order, in worker processes if there are any."""
    if not workers:
        yield from map(partial(measure_rows, source=source, encoder=encoder), chunks)
        return
    lost = (
        f"one of {workers} processes that measure examples was killed, perhaps for want of memory; lower "
        "config.data.workers; the same command goes on from here"
    )
    with process_pool(workers, partial(measure_rows, source=source, encoder=encoder), lost) as submit:
        for future in [submit(chunk) for chunk in chunks]:
            yield future.result()


def _key(source: Source, spec: DataSpec) -> str:
    """Names the index by all that it depends on: records, tokenizer, template, and how images become tokens.

    Of the records, what a source keeps of them (where each one is) and a few texts are looked at; an example whose size turns
    out to be another one all the same is noticed when it is put into its row.
    """
    data, layout = spec.data, spec.layout
    looked_at = np.unique(np.linspace(0, len(source) - 1, 64, dtype=np.int64))
    texts = [try_record(source, int(row), lambda one: repr((one.name, len(one.images), one.messages))) for row in looked_at]
    known = {
        "version": _VERSION,
        "source": hashlib.sha256(pickle.dumps(source, protocol=4)).hexdigest(),
        "rows": [one.reason if isinstance(one, BadExample) else one for one in texts],
        "tokenizer": _tokenizer_version(data.tokenizer),
        "data": [getattr(data, key) for key in _DATA_KEYS],
        "image": asdict(spec.image),
        "layout": asdict(layout),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]


def _tokenizer_version(spec: str) -> str:
    """The configured name, and the size and time of every file that it may stand for."""
    path = Path(spec).expanduser()
    found = sorted(path.glob("*token*")) if os.path.isdir(path) else [Path(spec.removeprefix("words:@"))]  # words: no name
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found if os.path.isfile(file)]
    return repr((spec, stats))


def _load(file: Path, rows: int) -> np.ndarray | None:
    """Stored sizes; None where there are none, or not of so many records."""
    try:
        sizes = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return sizes if sizes.shape == (rows, 3) and sizes.dtype == np.int32 else None


def _save(file: Path, sizes: np.ndarray) -> None:
    """Write whole or not at all, also where several hosts write the same file at once; SourceError where it cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as out:
            np.save(out, sizes)
    except FileNotFoundError:  # another host has finished first, and has removed the folder of parts
        return
    except OSError as error:
        raise SourceError(
            f"cannot keep the length index in {file.parent}: {error.strerror}; set DEEPSTACK_CACHE to a writable folder"
        ) from error
