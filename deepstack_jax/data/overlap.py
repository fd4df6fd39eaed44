"""Held-out rows that are training rows too: scores on them tell what was remembered, not what was learnt."""

import hashlib
import time
from collections.abc import Iterator
from typing import NamedTuple

from deepstack_jax.data.example import IMAGE_MARK, Example, Source
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.file_source import FileSource
from deepstack_jax.data.order.mixture import containers

SECONDS = 20.0  # that a start may take for it: enough for the 665k rows of LLaVA
_LOOK = 1000  # rows between two looks at the clock


class Overlap(NamedTuple):
    """What was found."""

    rows: list[int]  # numbers of the held-out rows
    first: str  # id of the first of them
    looked_at: int  # training rows that were compared


def find_overlap(held_out: Source, rows: int, train: Source, seconds: float = SECONDS) -> Overlap:
    """Which of the first `rows` held-out rows are among the training rows: the same turns, or a question, on the same images.

    Training rows are looked over by their ids and the paths of their images; only one that has either in common with a
    held-out row is read. So a row is not found that has neither an id nor an image by its path.

    Args:
      seconds: after which no further training rows are looked at.
    """
    known: dict[bytes, list[int]] = {}  # digest of a text -> held-out rows that say it
    names, pictures = dict[int, str](), dict[int, tuple[str | bytes, ...]]()
    parts = list(containers(train))
    for row in range(rows if parts else 0):
        try:
            example = held_out[row]
        except (ValueError, OSError):  # said elsewhere
            continue
        names[row], pictures[row] = example.name, _pictures(example)
        for text in _texts(example):
            known.setdefault(text, []).append(row)
    wanted, paths = set(names.values()), {path for images in pictures.values() for path in images if isinstance(path, str)}
    found, looked_at, ends = set[int](), 0, time.monotonic() + seconds
    for source, taken in parts:
        root = source.image_root if isinstance(source, FileSource) else ""
        for place, outline in enumerate(source.metadata()):
            if not taken[place]:
                continue
            if looked_at % _LOOK == _LOOK - 1 and time.monotonic() > ends:
                break
            looked_at += 1
            if outline.name not in wanted and not any(files.under(root, name) in paths for name in outline.images):
                continue
            try:
                example = source[place]
            except (ValueError, OSError):
                continue
            images, alike = _pictures(example), {row for text in _texts(example) for row in known.get(text, ())}
            found |= {row for row in alike - found if _same(images, pictures[row])}
    return Overlap(sorted(found), names[min(found)] if found else "", looked_at)


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
