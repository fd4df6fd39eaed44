"""Which records of a file each set of a mixture takes: by image paths, `data_source` and ratings, looked up once and kept."""

import contextlib
import hashlib
import json
import os
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.markup import escape
from rich.progress import track

from deepstack_jax.atomic import whole_file
from deepstack_jax.data.example import MetadataSource, RecordMetadata
from deepstack_jax.data.formats.files import named_files
from deepstack_jax.printing import Console, label

# Stands for the image path of a record without an image file, so that filters can tell these: text, or embedded images.
TEXT_ROWS = "<text>"

_FORMAT = 3  # of the cached files; a change of it makes old ones unread


@dataclass(frozen=True)
class RowFilter:
    """What of a file a set takes. Empty = no condition; all that are given must hold."""

    keep_images: tuple[str, ...] = ()  # beginnings of paths below the image root; one image under one of them is enough
    drop_images: tuple[str, ...] = ()  # the same; such a record is not wanted, and not missed either
    keep_sources: tuple[str, ...] = ()  # values of the records' "data_source", else "source", else their first turn's
    min_ratings: tuple[int, ...] = ()  # least of the worst rating by each of `RATINGS`; 0 = any

    def drops(self, outline: RecordMetadata) -> bool:
        """Whether the record is named as not wanted."""
        return any(name.startswith(self.drop_images) for name in outline.images or (TEXT_ROWS,))

    def keeps(self, outline: RecordMetadata) -> bool:
        """Whether the record meets the conditions to be kept; `drops` is another question."""
        if self.keep_sources and outline.data_source not in self.keep_sources:
            return False
        return not self.keep_images or any(name.startswith(self.keep_images) for name in outline.images or (TEXT_ROWS,))

    def ratings(self, outline: RecordMetadata) -> tuple[bool, bool]:
        """Whether a rating is lower than asked for, and whether one that is asked for is not known, which drops nothing."""
        known = outline.ratings or (None,) * len(self.min_ratings)
        asked = [(rating, least) for rating, least in zip(known, self.min_ratings, strict=False) if least]
        low = any(rating is not None and rating < least for rating, least in asked)
        return low, any(rating is None for rating, _ in asked)


@dataclass(frozen=True)
class Selection:
    """The records of one file that each filter takes, and what else the file holds."""

    rows: tuple[np.ndarray, ...]  # i32[n] per filter, record numbers of the file in ascending order
    left: Mapping[str, int]  # that no filter takes and none drops, by the first two folders of their image, or data_source
    shared: int  # records that more than one filter takes
    data_sources: Mapping[str, int]  # records of every "data_source"; "" = none is named. Empty where no filter asked.
    low: Sequence[int]  # records per filter that nothing but a rating keeps from it
    unrated: Sequence[int]  # records per filter that it takes although a rating that it asks for is not known


def select(path: str, source: MetadataSource, filters: Sequence[RowFilter], cache: str) -> Selection:
    """The records that each filter takes of the file at `path`, which `source` is opened on.

    A file is looked through once, in one pass for all filters; the answer is kept in the folder `cache` under the file's
    version (path, size, time of the last change) and the filters.
    """
    if all(condition == RowFilter() for condition in filters):
        every = np.arange(len(source), dtype=np.int32)
        none = (0,) * len(filters)
        return Selection((every,) * len(filters), {}, len(source) if len(filters) > 1 else 0, {}, none, none)
    kept = os.path.join(cache, "selections", f"{_key(path, filters)}.npz")
    found = _load(kept, len(filters))
    if found is None:
        found = scan(source, filters, os.path.basename(path.rstrip("/")))
        rest = json.dumps({key: value for key, value in vars(found).items() if key != "rows"})
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next start a pass, nothing else
            os.makedirs(os.path.dirname(kept), exist_ok=True)
            with whole_file(kept) as file:
                np.savez(file, *found.rows, rest=np.array(rest))
    return found


def scan(source: MetadataSource, filters: Sequence[RowFilter], name: str) -> Selection:
    """One pass over the metadata of a file. A record that cannot be read has no images, so it goes with the text-only ones."""
    takers: list[list[int]] = [[] for _ in filters]
    left: Counter[str] = Counter()
    data_sources: Counter[str] = Counter()
    low, unrated, shared = [0] * len(filters), [0] * len(filters), 0
    title, console = f"filtering {escape(label(name))}", Console(stderr=True)
    shown = track(source.metadata(), title, len(source), console=console, transient=True, update_period=0.5)
    for row, outline in enumerate(shown):
        data_sources[outline.data_source] += 1
        taken, dropped = 0, False
        for number, (condition, rows) in enumerate(zip(filters, takers, strict=True)):
            if condition.drop_images and condition.drops(outline):
                dropped = True
            elif condition.keeps(outline):
                is_low, is_unrated = condition.ratings(outline)
                if is_low:
                    low[number] += 1
                    dropped = True
                else:
                    rows.append(row)
                    unrated[number] += is_unrated
                    taken += 1
        shared += taken > 1
        if not taken and not dropped:
            folder = "/".join([*outline.images[0].split("/")[:-1][:2], ""]) if outline.images else ""
            left[folder if outline.images else outline.data_source or TEXT_ROWS] += 1
    return Selection(tuple(np.array(rows, np.int32) for rows in takers), left, shared, data_sources, low, unrated)


def _key(path: str, filters: Sequence[RowFilter]) -> str:
    """Changes with every file of `path` (fsspec's key: name, size, times) and with every filter."""
    system, names = named_files(path)
    versions = [(name, system.ukey(name)) for name in names]
    described = json.dumps([_FORMAT, path, versions, [asdict(condition) for condition in filters]])
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def _load(path: str, filters: int) -> Selection | None:
    """None where there is nothing, or nothing whole."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            rest = json.loads(str(stored["rest"]))
            rows = tuple(stored[f"arr_{number}"] for number in range(filters))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Selection(rows, **rest)
