"""What can be known of a source before its examples are read: options, files and their versions, images there or missing."""

import hashlib
import json
import os
import posixpath
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import compress
from typing import Any

import numpy as np

from deepstack_jax.config import DataConfig, DataSpec
from deepstack_jax.data.encode.encoder import Encoder
from deepstack_jax.data.example import Source
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.file_source import FileSource
from deepstack_jax.data.order.mixture import Mixture, containers, row_choice
from deepstack_jax.data.shards.reader import SUFFIX
from deepstack_jax.printing import redacted

LOOKED_AT = 64  # records, spread over the source: of one on a network, or drawn; the only ones of earlier versions
COMPARED = 1024  # records, spread over any other source, whose tokens and images must be the same when a run goes on
READ_WHOLE = 2 << 30  # bytes of data files that are read to the last for their digest; of larger ones parts
_PARTS, _PART_BYTES, _READ_BYTES = 256, 64 << 10, 1 << 20
UNUSABLE = "-"  # in place of a digest, of what cannot be used: fixed since, it is still the same data


def describe_options(data: DataConfig, split: str, source: Source, shard_rows: int) -> dict[str, Any]:
    """What the bytes of the shards depend on, besides the content of the files; no path of this machine's root."""
    options: dict[str, Any] = {"split": split, "rows": len(source), "shard_rows": shard_rows}
    if data.generated is not None:
        return options | {f"config.data.{'cards' if data.source == 'cards' else 'synthetic'}": asdict(data.generated)}
    if isinstance(source, Mixture):
        return redacted(options | {f"config.data.sets.{name}": row_choice(entry) for name, entry in data.sets.items()})
    return redacted(options | {f"config.data.{split}": data.file_of(split), "config.data.images": data.images})


def describe_files(data: DataConfig, split: str, source: Source) -> dict[str, str]:
    """Data file as configured -> number, size and last change of the files that it names."""
    return redacted({name: _version(path) for name, path in _named(data, split, source).items()})


def _named(data: DataConfig, split: str, source: Source) -> dict[str, str]:
    """Data file as configured -> its path or URL."""
    if data.generated is not None:
        return {}
    names = {entry.file for entry in data.sets.values()} if isinstance(source, Mixture) else {data.file_of(split)}
    return {name: files.join(data.root, name) for name in sorted(names)}


def describe_data(spec: DataSpec, sources: Mapping[str, Source]) -> dict[str, Any]:
    """What is compared when a run goes on, by split: files, digests of their bytes, and how many records the training data has.

    And of some of its records tokens and images, as "ROW:DIGEST:DIGEST" each; images as encoded bytes.
    """
    known = {split: describe_files(spec.data, split, source) for split, source in sources.items()}
    contents = {
        split: {redacted(name): _digest(path) for name, path in _named(spec.data, split, source).items()}
        for split, source in sources.items()
    }
    train = sources["train"]
    return {"files": known, "contents": contents, "rows": len(train), "looked_at": _look_at(spec, train)}


def _look_at(spec: DataSpec, source: Source) -> str:
    data, encoder = spec.data, Encoder(spec)
    few = data.generated is not None or any(map(files.is_url, (data.root, data.images, data.train)))
    rows = np.unique(np.concatenate([_spread(source, count) for count in (LOOKED_AT, LOOKED_AT if few else COMPARED)]))
    seen = []
    for row in map(int, rows):
        tokens = images = UNUSABLE
        try:
            example = source[row]
            tokens = _short_digest(encoder.text(example).ids.tolist())
            contents = [files.read_bytes(image) if isinstance(image, str) else image for image in example.images]
            if all(isinstance(image, bytes) for image in contents):  # others are drawn from the configuration
                images = _short_digest(contents)
        except (ValueError, OSError):  # what cannot be used is the quarantine's business
            pass
        seen.append(f"{row}:{tokens}:{images}")
    return " ".join(seen)


def _spread(source: Source, count: int) -> np.ndarray:
    return np.linspace(0, len(source) - 1, count, dtype=np.int64)


def _short_digest(parts: list[Any]) -> str:
    seen = hashlib.blake2b(digest_size=4)
    for part in parts:
        seen.update(part if isinstance(part, bytes) else f"{part};".encode())
    return seen.hexdigest()


def _digest(path: str) -> str:
    """Of the bytes of a local path's files, preceded by whether all of them were read; "" of a URL, whose version is known."""
    if files.is_url(path):
        return ""
    names = [name for name in files.named_files(path)[1] if os.path.isfile(name)]
    if os.path.isdir(path):
        names = [name for name in names if name.endswith((".parquet", ".arrow", SUFFIX))]
    sizes = [os.path.getsize(name) for name in names]
    whole = sum(sizes) <= READ_WHOLE
    seen = hashlib.blake2b(digest_size=16)
    for name, size in zip(names, sizes, strict=True):
        seen.update(f"{posixpath.basename(name)}:{size};".encode())
        with open(name, "rb") as file:
            if whole:
                starts, length = range(0, size, _READ_BYTES), _READ_BYTES
            else:
                starts = np.linspace(0, max(0, size - _PART_BYTES), 2 + _PARTS // len(names), dtype=np.int64).tolist()
                length = _PART_BYTES
            for start in starts:
                file.seek(start)
                seen.update(file.read(length))
    return f"{'whole' if whole else 'parts'}:{seen.hexdigest()}"


def describe_texts(spec: DataSpec, source: Source) -> str:
    """What earlier versions kept in place of `looked_at`: a digest of some records as tokens."""
    encoder, seen = Encoder(spec), hashlib.sha256()
    for row in np.unique(_spread(source, LOOKED_AT)):
        try:
            ids = encoder.text(source[int(row)]).ids
        except ValueError:  # what cannot be used is the quarantine's business
            ids = np.zeros(0, np.int32)
        seen.update(f"{row}:{ids.tolist()};".encode())
    return seen.hexdigest()[:16]


def named_images(source: Source) -> tuple[int, list[str]]:
    """How often records name an image by a path, and those that do not exist, each once, in order; opens none of them."""
    paths = []
    for container, taken in containers(source):
        if isinstance(container, FileSource) and container.image_root:
            for record in compress(container.metadata(), taken):
                paths += [files.under(container.image_root, name) for name in record.images]
    return len(paths), files.missing(dict.fromkeys(paths))


def _version(path: str) -> str:
    """Changes with every file that `path` names."""
    system, names = files.named_files(path)
    if files.is_url(path):
        version = hashlib.sha256(json.dumps([system.ukey(name) for name in names]).encode()).hexdigest()[:16]
    else:
        newest = datetime.fromtimestamp(max(os.stat(name).st_mtime for name in names), UTC)
        version = f"changed {newest.isoformat(' ', 'milliseconds')}"
    total = sum(system.size(name) or 0 for name in names)
    return f"{len(names)} file{'' if len(names) == 1 else 's'}, {total:,} bytes, {version}"
