"""Several sets of examples as one source, and the order in which an epoch goes through them."""

import operator
import os
import posixpath
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike
from rich.table import Table
from rich.text import Text

from deepstack_jax.config import SetConfig
from deepstack_jax.data.example import RATINGS, Example, ExampleError, MetadataSource, RecordMetadata, Source, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.order.filters import TEXT_ROWS, RowFilter, Selection, select
from deepstack_jax.errors import ConfigError

_COLUMNS = ("set", "file", "found", "rated low", "expected", "paper", "repeat", "per epoch", "")
SHUFFLE_ROUNDS = 8  # with Grain's usual 4, records that are neighbours in the file still lie at preferred distances
_EXACT_TOLERANCE = 0.01
_ROUNDED_ROWS, _ROUNDED_TOLERANCE = 500, 0.10  # what rounding to thousands explains


@dataclass(frozen=True)
class EpochOrder:
    """Which record is at which place of which epoch: computed when asked for, nothing is stored.

    Each set is an endless stream that goes through its records again and again, in a fixed order of its own; an epoch takes
    the next round(size * repeat) records of every stream and shuffles them all together. So a repeat of 2 gives every record
    twice per epoch, 0.5 one half of the records and in the next epoch the other half, 1.5 all of them and one half again.
    ValueError for a set that would give no record, as nobody would notice that it is never seen.
    """

    sizes: tuple[int, ...]  # records of each set; a global record number counts through the sets, one after the other
    repeats: tuple[float, ...]  # how often an epoch goes through each set, above 0
    seed: int  # of the shuffle, at least 0
    shuffle: bool = True  # else the sets come one after the other, in the order of their records

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.repeats) or not self.sizes:
            raise ValueError(f"got {len(self.sizes)} sizes and {len(self.repeats)} repeats; give one of each per set")
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if count < 1:
                repeat = self.repeats[number]
                raise ValueError(f"set {number}: {size} records with repeat {repeat} give none per epoch; raise its repeat")

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows that each set gives per epoch, the same in every epoch."""
        return tuple(round(size * repeat) for size, repeat in zip(self.sizes, self.repeats, strict=True))

    def __len__(self) -> int:
        """Rows per epoch."""
        return sum(self.counts)

    def __call__(self, epoch: int, positions: ArrayLike) -> np.ndarray:
        """The global records, i64 in the shape of `positions`, at these places (0..len-1) of the epoch (from 0)."""
        asked = np.asarray(positions, np.int64)
        places = asked.ravel()
        if places.size and not 0 <= places.min() <= places.max() < len(self):
            outside = places.min() if places.min() < 0 else places.max()
            raise IndexError(f"position {outside} is outside 0..{len(self) - 1} of an epoch")
        if self.shuffle:
            places = self._permuted(places, len(self), 0, epoch)
        sizes, counts = np.array(self.sizes, np.int64), np.array(self.counts, np.int64)
        ends = np.cumsum(counts)
        which = np.searchsorted(ends, places, side="right")
        rows = (epoch * counts[which] + places - (ends - counts)[which]) % sizes[which]
        if self.shuffle:
            # The share of a set that an epoch leaves out must not be a stretch of its file.
            for number in np.flatnonzero(counts % sizes):
                mine = which == number
                rows[mine] = self._permuted(rows[mine], self.sizes[number], 1, int(number))
        return ((np.cumsum(sizes) - sizes)[which] + rows).reshape(asked.shape)

    def _permuted(self, places: np.ndarray, size: int, purpose: int, number: int) -> np.ndarray:
        """Places in a pseudo-random permutation of 0..size-1; neighbouring seeds must not give neighbouring epochs' orders."""
        seed = int(np.random.SeedSequence((self.seed, purpose, number)).generate_state(1)[0])
        from grain.experimental import index_shuffle  # imports jax, which opening a file can do without

        return np.vectorize(index_shuffle, otypes=[np.int64])(places, size - 1, seed, SHUFFLE_ROUNDS)


def epoch_order(source: Source, seed: int, shuffle: bool) -> EpochOrder:
    """The order of any source's records; one that is not a mixture is gone through once per epoch."""
    if isinstance(source, Mixture):
        return EpochOrder(source.sizes, source.repeats, seed, shuffle)
    return EpochOrder((len(source),), (1.0,), seed, shuffle)


def row_choice(entry: SetConfig) -> dict[str, Any]:
    """What of a set's config decides which records it takes; the rest is expectation and description.

    Ratings that are not asked for stay out: states that were stored before there were any are the same choice.
    """
    choice = {key: getattr(entry, key) for key in ("file", "images", "keep_images", "drop_images", "keep_sources")}
    asked = {f"min_{name}": least for name, least in zip(RATINGS, _min_ratings(entry), strict=True) if least}
    return choice | asked


def _min_ratings(entry: SetConfig) -> tuple[int, ...]:
    """In the order of `RATINGS`."""
    return entry.min_relevance, entry.min_image_correspondence, entry.min_visual_dependency, entry.min_formatting


def _row_filter(entry: SetConfig) -> RowFilter:
    least = _min_ratings(entry)
    return RowFilter(entry.keep_images, entry.drop_images, entry.keep_sources, least if any(least) else ())


@dataclass(frozen=True)
class MixturePart:
    """One set of a mixture: the records i32[n] that it takes of its source, and what its config says."""

    name: str
    source: MetadataSource
    rows: np.ndarray
    config: SetConfig
    low: int = 0  # records that are the set's but for a rating


class Mixture:
    """Several sets as one source, by random access: their records one after the other, each once.

    How often an epoch goes through a set is the business of `epoch_order`. Examples carry the number of their record in the
    mixture, and the name of their set in `info["set"]`.
    """

    def __init__(self, parts: Sequence[MixturePart]) -> None:
        self.parts = tuple(parts)
        self.sizes = tuple(len(part.rows) for part in self.parts)
        self.repeats = tuple(part.config.repeat for part in self.parts)
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __repr__(self) -> str:  # Grain compares this text when it restores an iterator: no address, no machine's folder
        return f"Mixture({', '.join(f'{part.name}={len(part.rows)}*{part.config.repeat:g}' for part in self.parts)})"

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Row `index` of the mixture; raises IndexError outside it, and what the set's source raises."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} is outside 0..{len(self) - 1} of {self!r}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[number]
        example = part.source[int(part.rows[index - (self._ends[number] - self.sizes[number])])]
        return replace(example, index=index, info={**example.info, "set": part.name})

    def metadata(self) -> Iterator[RecordMetadata]:
        """Of every record, in order; no image is read."""
        for part in self.parts:
            mine = np.zeros(len(part.source), bool)
            mine[part.rows] = True
            yield from compress(part.source.metadata(), mine)

    def missing_images(self, rows: int) -> list[str]:
        """Image files that do not exist, each once, among about `rows` records, spread evenly over every set.

        Unlike a single file's first records, these show a set whose images were never fetched, or only in part.
        """
        wanted: dict[str, None] = {}
        for part in self.parts:
            looks = min(len(part.rows), max(1, rows // len(self.parts)))
            for row in part.rows[np.linspace(0, len(part.rows) - 1, looks).astype(int)]:
                try:
                    images = part.source[int(row)].images
                except ExampleError:
                    continue  # left to the reader of the records, who counts them
                wanted.update((image, None) for image in images if isinstance(image, str))
        return files.missing(wanted)


def containers(source: Source) -> Iterator[tuple[MetadataSource, np.ndarray]]:
    """What a source is made of, each once, with bool[records] of what it takes of it; nothing where it has no metadata."""
    if isinstance(source, Mixture):
        shared: dict[int, tuple[MetadataSource, np.ndarray]] = {}
        for part in source.parts:
            _, taken = shared.setdefault(id(part.source), (part.source, np.zeros(len(part.source), bool)))
            taken[part.rows] = True
        yield from shared.values()
    elif isinstance(source, MetadataSource):
        yield source, np.ones(len(source), bool)


def open_mixture(
    sets: Mapping[str, SetConfig], root: str, open_files: Callable[[str, str], MetadataSource], cache: str = ""
) -> Mixture:
    """The mixture of `sets`, each file opened once, with a warning for everything that is not as the sets say.

    Args:
      root: folder or URL that files and image roots start from.
      open_files: path and image root -> source.
      cache: folder where the records that filters take are kept; "" = the package's.

    Raises:
      ConfigError: files or image folders are missing: all are named at once, with where to get them.
      SourceError: a file cannot be read, or a set has no records; going on would train on another mixture than asked for.
    """
    _check_present(sets, root)
    by_file: dict[tuple[str, str], list[str]] = {}
    for name, entry in sets.items():
        by_file.setdefault((entry.file, entry.images), []).append(name)
    chosen: dict[str, MixturePart] = {}
    for (file, images), names in by_file.items():
        path = files.join(root, file)
        source = open_files(path, files.join(root, images))
        filters = [_row_filter(sets[name]) for name in names]
        selection = select(path, source, filters, cache or files.cache_folder())
        for name, rows, low in zip(names, selection.rows, selection.low, strict=True):
            if not len(rows):
                left, data_sources = _listed(selection.left) or "nothing", _listed(selection.data_sources)
                raise SourceError(
                    f"set {name} takes none of the {len(source)} records of {path}; left over, by image folder or data_source: "
                    f"{left}; every data_source: {data_sources}; correct its keep_images, drop_images or keep_sources "
                    f"({TEXT_ROWS!r} names records without an image file)"
                    + (f", or ask for lower ratings: {low:,} records have lower ones" if low else "")
                )
            chosen[name] = MixturePart(name, source, rows, sets[name], low)
        _warn_of_rows(path, names, filters, selection)
    parts = [chosen[name] for name in sets]
    for part in parts:
        if problem := unexpected_count(part):
            warnings.warn(f"set {part.name}: {problem}", stacklevel=2)
    return Mixture(parts)


def unexpected_count(part: MixturePart) -> str:
    """What is wrong with the number of a set's records, in a line; "" where it is as expected, or nothing is known of it."""
    found, expected, exact = len(part.rows) + part.low, part.config.rows, part.config.exact
    off = abs(found - expected)
    allowed = _EXACT_TOLERANCE * expected if exact else min(_ROUNDED_ROWS, _ROUNDED_TOLERANCE * expected)
    if not expected or off <= allowed:
        return ""
    known = "exactly" if exact else "rounded to thousands"
    return (
        f"{found:,} records found, {expected:,} expected ({known}); {part.config.file} is cut, or another release: get it "
        f"again, or set config.data.sets.{part.name}.rows"
    )


def describe_mixture(mixture: Mixture) -> Table:
    """Found against expected records, per set and in all; "paper" is what the paper prints, "per epoch" what training sees."""
    configs = [part.config for part in mixture.parts]
    counts = epoch_order(mixture, 0, False).counts
    rows = []
    for part, entry, count in zip(mixture.parts, configs, counts, strict=True):
        known = f"{'' if entry.exact else '~'}{entry.rows:,}" if entry.rows else "?"
        verdict = Text("not as expected", "bold red") if unexpected_count(part) else Text("ok" if entry.rows else "", "green")
        paper = f"{entry.paper:,}" if entry.paper else ""
        found, low = f"{len(part.rows):,}", f"{part.low:,}" if part.low else ""
        rows.append((part.name, entry.file, found, low, known, paper, f"{entry.repeat:g}", f"{count:,}", verdict))
    expected = [entry.rows for entry in configs]
    # The sum of those that are known would be taken for the whole.
    known, paper = f"{sum(expected):,}" if all(expected) else "?", sum(entry.paper for entry in configs)
    low, paper = (f"{number:,}" if number else "" for number in (sum(part.low for part in mixture.parts), paper))
    rows.append(("all", "", f"{len(mixture):,}", low, known, paper, "", f"{sum(counts):,}", ""))

    table = Table(title="Training mixture", title_justify="left")
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows)]
    for column in used:
        table.add_column(_COLUMNS[column], justify="left" if column in (0, 1) else "right")
    for row in rows:
        table.add_row(*(row[column] for column in used), end_section=row is rows[-2])
    return table


def _check_present(sets: Mapping[str, SetConfig], root: str) -> None:
    """Everything that can be seen to be missing before a file is opened, in one message."""
    missing: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # by origin: paths and sets, each once
    for name, entry in sets.items():
        images = files.join(root, entry.images)
        folders = [files.join(images, start) for start in entry.keep_images if start.endswith("/")]
        wanted = {files.join(root, entry.file): entry.file_from} | dict.fromkeys([images, *folders], entry.images_from)
        for path, origin in wanted.items():
            if not _exists(path):
                paths, names = missing.setdefault(origin or path, ({}, {}))
                paths[path] = names[name] = None
    where, problems = shlex.quote(root or "."), []
    for origin, (paths, names) in missing.items():
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        get = "put it there, or leave the set out" if origin in paths else origin.replace("$ROOT", where)
        word = "set" if len(names) == 1 else "sets"
        problems.append(f"no {', '.join([*paths][:3])}{more} ({word} {', '.join(names)}): {get}")
    if problems:
        elsewhere = "--config.data.root=DIR; one file alone: --config.data.train=FILE"
        raise ConfigError(*problems, f"where the data lies elsewhere than in {where}: {elsewhere}")


def _exists(path: str) -> bool:
    if path.startswith(("http://", "https://")):
        return True  # a web server need not list its folders; opening says what is missing
    try:
        if files.is_file(path) or files.is_folder(path):
            return True
        if any(mark in path for mark in "*?["):
            return bool(files.glob(path))
        folder = posixpath.dirname(path)  # FOLDER/SPLIT: whether there is such a split, opening says
        splits = ("dataset_dict.json", "*.parquet", "data/*.parquet")
        return files.is_folder(folder) and any(files.glob(f"{folder}/{name}") for name in splits)
    except OSError as error:
        raise SourceError(f"cannot reach {path}: {error.strerror}; check the URL and your access") from error


def _warn_of_rows(path: str, names: Sequence[str], filters: Sequence[RowFilter], selection: Selection) -> None:
    """Rows and names that the filters of a file leave over, or have in common."""
    file = os.path.basename(path.rstrip("/"))
    if selection.left:
        warnings.warn(
            f"{file}: {sum(selection.left.values()):,} records belong to none of the sets {', '.join(names)}, by image folder "
            f"or data_source: {_listed(selection.left)}; add a set, or name them in drop_images",
            stacklevel=3,
        )
    if selection.shared:
        warnings.warn(f"{file}: {selection.shared:,} records belong to several of the sets {', '.join(names)}", stacklevel=3)
    for name, condition, unrated in zip(names, filters, selection.unrated, strict=True):
        if unrated:
            warnings.warn(
                f"set {name}: {unrated:,} records of {file} lack a rating that it asks for, and are kept; where that is all of "
                "them, nobody rated this set",
                stacklevel=3,
            )
        if unknown := [value for value in condition.keep_sources if value not in selection.data_sources]:
            warnings.warn(
                f"set {name}: no record of {file} has data_source {', '.join(map(repr, unknown))}; the file has "
                f"{_listed(selection.data_sources)}; correct config.data.sets.{name}.keep_sources",
                stacklevel=3,
            )


def _listed(counts: Mapping[str, int], limit: int = 20) -> str:
    """Names with their numbers of records, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = [f"and {len(ordered) - limit} more"] if len(ordered) > limit else []
    return ", ".join([*(f"{name!r} {count:,}" for name, count in ordered[:limit]), *more])
