"""Held-out rows that are training rows too: scores on them tell what was remembered, not what was learnt."""

import hashlib
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from deepstack_jax.data.example import IMAGE_MARK, Example, Source
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.file_source import FileSource
from deepstack_jax.data.order.mixture import containers
from deepstack_jax.printing import label, plural

SECONDS = 20.0  # that a start may take for it: enough for the 665k rows of LLaVA
_LOOK = 1000  # rows between two looks at the clock


class Overlap(NamedTuple):
    """What was found."""

    rows: list[int]  # numbers of the held-out rows that are trained on: the same turns, or a question, on the same images
    first: str  # id of the first of them
    looked_at: int  # training rows that were compared
    image_rows: list[int]  # numbers of the held-out rows of which an image is trained on, whatever is asked about it


def overlap_line(found: Overlap, rows: int, train_rows: int) -> str:
    """What was found of so many held-out rows, in words; "" where nothing was."""
    if not found.rows and not found.image_rows:
        return ""
    part = "" if found.looked_at >= train_rows else f" ({found.looked_at:,} of them were looked at)"
    said = []
    if found.rows:
        said.append(
            f"{len(found.rows)} of {plural(rows, 'held-out row')} are also among the training rows{part}, as the same row or "
            f"the same question about the same image, the first: {label(found.first)}"
        )
    if more := len({*found.image_rows} - {*found.rows}):
        also = f"{more} more have" if found.rows else f"{more} of {plural(rows, 'held-out row')} have"
        said.append(f"{also} an image that is trained on with other questions{'' if found.rows else part}")
    advice = "hold others out with --config.data.validation=FILE; python -m deepstack_jax.audit lists them"
    return f"{'; '.join(said)}; scores on them tell what was remembered: {advice}"


def find_overlap(held_out: Source, rows: int, train: Source, seconds: float = SECONDS) -> Overlap:
    """Which of the first `rows` held-out rows are among the training rows: the same turns, or a question, on the same images;
    and of which an image is, by its bytes.

    Training rows are looked over by their ids and the paths of their images; only one that has either in common with a
    held-out row is read. So a row is not found that has neither an id nor an image by its path. An image is read where its
    file has the size of another, and last where it lies within its record; one that was encoded again is not found.

    Args:
      seconds: after which no further training rows are looked at.
    """
    seen = _Seen(held_out, rows if (parts := list(containers(train))) else 0)
    found, image_rows, looked_at, ends = set[int](), set[int](), 0, time.monotonic() + seconds
    inside = list[tuple[Source, int]]()  # records whose images, if there are any, lie within them
    for source, taken in parts:
        root = source.image_root if isinstance(source, FileSource) else ""
        for place, outline in enumerate(source.metadata()):
            if not taken[place]:
                continue
            if looked_at % _LOOK == _LOOK - 1 and time.monotonic() > ends:
                break
            looked_at += 1
            paths = [files.under(root, name) for name in outline.images]
            image_rows.update(*map(seen.with_image, paths))
            if outline.name in seen.wanted or seen.paths.intersection(paths):
                found |= seen.alike(source, place)
            if not paths and seen.sizes:
                inside.append((source, place))
    for number, (source, place) in enumerate(inside):
        if time.monotonic() > ends:
            looked_at -= len(inside) - number
            break
        image_rows.update(*(seen.with_image(image) for image in _images(source, place) if isinstance(image, bytes)))
    first = seen.names[min(found)] if found else ""
    return Overlap(sorted(found), first, looked_at, sorted(image_rows))


def _images(source: Source, place: int) -> tuple[Any, ...]:
    try:
        return source[place].images
    except (ValueError, OSError):
        return ()


class _Seen:
    """What held-out rows say and show."""

    def __init__(self, held_out: Source, rows: int) -> None:
        self.known: dict[bytes, list[int]] = {}  # digest of a text -> held-out rows that say it
        self.names, self.pictures = dict[int, str](), dict[int, tuple[str | bytes, ...]]()
        self.sizes: dict[int, set[str]] = {}  # bytes of an image -> paths of those that are not read yet
        self._rows_of: dict[str | bytes, set[int]] = {}  # path, or digest of the content -> held-out rows that show it
        for row in range(rows):
            try:
                example = held_out[row]
            except (ValueError, OSError):  # said elsewhere
                continue
            self.names[row], self.pictures[row] = example.name, _pictures(example)
            for text in _texts(example):
                self.known.setdefault(text, []).append(row)
            for image, known in zip(example.images, self.pictures[row], strict=True):
                self._rows_of.setdefault(known, set()).add(row)
                if (size := _size(image)) is not None:
                    self.sizes.setdefault(size, set()).update([known] if isinstance(known, str) else [])
        self.wanted = {*self.names.values()}
        self.paths = {path for path in self._rows_of if isinstance(path, str)}

    def alike(self, source: Source, place: int) -> set[int]:
        """Held-out rows that say the same as a training row, on the same images."""
        try:
            example = source[place]
        except (ValueError, OSError):
            return set()
        images = _pictures(example)
        return {row for text in _texts(example) for row in self.known.get(text, ()) if _same(images, self.pictures[row])}

    def with_image(self, image: str | bytes) -> set[int]:
        """Held-out rows that show an image of a training row; files are read where one has the size of another."""
        if image in self._rows_of:
            return self._rows_of[image]
        size = _size(image)
        if size is None or size not in self.sizes:
            return set()
        for path in self.sizes[size]:
            self._rows_of.setdefault(_content(path), set()).update(self._rows_of[path])
        self.sizes[size] = set()
        return self._rows_of.get(_content(image if isinstance(image, str) else _digest(image)), set())


def _size(image: object) -> int | None:
    """In bytes; None of what is behind a URL, decoded, or not there."""
    if isinstance(image, bytes):
        return len(image)
    try:
        return os.stat(image).st_size if isinstance(image, str) and not files.is_url(image) else None
    except (OSError, ValueError):
        return None


def _texts(example: Example) -> Iterator[bytes]:
    """Of all turns together, and where there are images, of every question."""
    said = [message.text.replace(IMAGE_MARK, "").strip() for message in example.messages]
    yield _digest(repr(said))
    if example.images:
        yield from (_digest(text) for text, turn in zip(said, example.messages, strict=True) if turn.role == "human")


def _pictures(example: Example) -> tuple[str | bytes, ...]:
    """Of each image its path, or a digest of its content."""
    return tuple(image if isinstance(image, str) else _digest(image) for image in example.images)


def _same(ours: tuple[str | bytes, ...], theirs: tuple[str | bytes, ...]) -> bool:
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(one == other or _content(one) == _content(other) for one, other in pairs)


def _content(picture: str | bytes) -> str | bytes:
    """A digest of the content, also of what is known by its path; the path where it cannot be read."""
    try:
        return _digest(files.read_bytes(picture)) if isinstance(picture, str) else picture
    except OSError:
        return picture


def _digest(content: object) -> bytes:
    data = content if isinstance(content, bytes) else str(content).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).digest()
