"""A finished folder of shards from any examples, cut at a size: what `prepare` leaves, made without its verb."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from deepstack_jax.data.example import Example
from deepstack_jax.data.shards.codec import encode_example
from deepstack_jax.data.shards.reader import MANIFEST, SUFFIX
from deepstack_jax.data.shards.writer import manifest_of, write_shard


def write_set(
    folder: Path, examples: Iterable[Example], source: Mapping[str, Any] | None = None, shard_bytes: int = sys.maxsize
) -> list[Example]:
    """Write the examples, beginning a new shard wherever one has reached `shard_bytes`; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = list(examples)
    records, shards = [encode_example(example) for example in examples], []
    for number in count():
        taken, size = 0, 0
        while taken < len(records) and size < shard_bytes:
            size, taken = size + len(records[taken]), taken + 1
        if not taken:
            break
        name = f"shard-{number:05d}{SUFFIX}"
        shard = write_shard(folder / name, name, records[:taken])
        assert shard is not None
        shards.append(shard)
        records = records[taken:]
    manifest = manifest_of(shards, source or {}, sum(len(example.images) for example in examples))
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return examples
