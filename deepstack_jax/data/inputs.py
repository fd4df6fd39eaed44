"""What can be known of a source before its examples are read: options, files and their versions, images there or missing."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
from fsspec.core import url_to_fs

from deepstack_jax.config import Config
from deepstack_jax.data import files
from deepstack_jax.data.encode import Encoder
from deepstack_jax.data.file_source import FileSource
from deepstack_jax.data.mixture import Mixture, row_choice
from deepstack_jax.data.sources import Source

LOOKED_AT = 64  # rows, spread over the source


class Named(NamedTuple):
    """The images that the rows of a source name by a path.

    Attributes:
        named: as often as they are named.
        missing: those that do not exist, each once, in order.
    """

    named: int
    missing: list[str]


def describe_options(config: Config, split: str, source: Source, shard_rows: int) -> dict[str, Any]:
    """What the bytes of the shards depend on, besides the content of the files; no path of this machine's root."""
    data = config.data
    options: dict[str, Any] = {"split": split, "rows": len(source), "shard_rows": shard_rows}
    if data.source == "pages":
        return options | {"config.data.synthetic": asdict(data.synthetic)}
    if isinstance(source, Mixture):
        return options | {f"config.data.sets.{name}": row_choice(entry) for name, entry in data.sets.items()}
    name = data.train if split == "train" else data.validation
    return options | {f"config.data.{split}": name, "config.data.images": data.images}


def describe_files(config: Config, split: str, source: Source) -> dict[str, str]:
    """Data file as configured -> number, size and last change of what is behind it."""
    data = config.data
    if data.source == "pages":
        return {}
    if isinstance(source, Mixture):
        named = {entry.file for entry in data.sets.values()}
    else:
        named = {data.train if split == "train" else data.validation}
    return {name: _version(files.join(data.root, name)) for name in sorted(named)}


def describe_texts(config: Config, source: Source) -> str:
    """A digest of what some rows of the training source become as tokens: the same wherever data and tokenizer lie."""
    encoder, seen = Encoder(config), hashlib.sha256()
    for row in np.unique(np.linspace(0, len(source) - 1, LOOKED_AT, dtype=np.int64)):
        try:
            ids = encoder.text(source[int(row)]).ids
        except ValueError:  # what cannot be used is the quarantine's business
            ids = np.zeros(0, np.int32)
        seen.update(f"{row}:{ids.tolist()};".encode())
    return seen.hexdigest()[:16]


def named_images(source: Source) -> Named:
    """Looks whether every image is there that the source names; opens none of them."""
    count, wanted = 0, {}
    for path in _image_paths(source):
        count += 1
        wanted[path] = None
    return Named(count, files.missing(wanted))


def _image_paths(source: Source) -> Iterator[str]:
    taken: dict[int, tuple[Source, np.ndarray]] = {}
    if isinstance(source, Mixture):
        for part in source.parts:  # sets that share a file are looked through together
            _, mask = taken.setdefault(id(part.source), (part.source, np.zeros(len(part.source), bool)))
            mask[part.rows] = True
    else:
        taken[0] = source, np.ones(len(source), bool)
    for container, mask in taken.values():
        if isinstance(container, FileSource) and container.image_root:
            for outline in compress(container.outlines(), mask):
                yield from (files.under(container.image_root, name) for name in outline.images)


def _version(path: str) -> str:
    """Changes with every file behind `path`: a file, a folder, a pattern, or one split of a folder."""
    system, inner = url_to_fs(path)
    if any(mark in path for mark in "*?["):
        names = system.glob(inner)
    else:
        there = system.exists(inner)
        names = system.find(inner if there else posixpath.dirname(inner), maxdepth=2)
    names = sorted(map(str, names)) or [inner]
    if files.is_url(path):
        version = hashlib.sha256(json.dumps([system.ukey(name) for name in names]).encode()).hexdigest()[:16]
    else:
        newest = datetime.fromtimestamp(max(os.stat(name).st_mtime for name in names), UTC)
        version = f"changed {newest.isoformat(' ', 'milliseconds')}"
    total = sum(system.size(name) or 0 for name in names)
    return f"{len(names)} file{'' if len(names) == 1 else 's'}, {total:,} bytes, {version}"
