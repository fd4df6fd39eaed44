"""One of several processes that read an epoch of pages; writes down what it asked the source for, and what all of them said."""

import json
import sys
from pathlib import Path

import jax

from deepstack_jax.config import MeshConfig
from deepstack_jax.data.example import Example
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.data.synthetic import VOCABULARY
from deepstack_jax.parallel.distributed import (
    allgather_str,
    broadcast_str,
    max_over_hosts,
    process_slice,
    sum_over_hosts,
)
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.processes import join_processes
from tests.unit.tiny import tiny_config

PAGES = {
    "data.source": "pages",
    "data.template": "direct",
    "data.synthetic.length": 48,
    "data.synthetic.questions": 1,
    "data.max_images": 1,
}


class Watched:
    """A source that remembers which rows were asked for."""

    def __init__(self, config) -> None:
        self._source, self.asked = open_source(config.data, "train"), []

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Example:
        self.asked.append(row)
        return self._source[row]


def main(folder: str, address: str, count: str, number: str) -> None:
    address, count, number = (flag.split("=")[1] for flag in (address, count, number))
    join_processes(address, int(count), int(number))
    config = tiny_config(PAGES | {"data.tokenizer": "words:" + " ".join(VOCABULARY)})
    part = process_slice(make_mesh(MeshConfig()))
    source = Watched(config)
    stream = TrainingStream(source, config.data_spec, process=part.index, processes=part.count, devices=jax.device_count())
    rows = [next(stream).batch.example_id[:, 0].tolist() for _ in range(stream.steps(1))]
    stream.close()
    me = jax.process_index()
    said = [
        allgather_str("é" * me),
        max_over_hosts(me),
        sum_over_hosts({"one": 1.0, "me": float(me)}),
        broadcast_str(f"host {me}"),
    ]
    found = {"rows": rows, "asked": source.asked[: sum(map(len, rows))], "said": said}
    (Path(folder) / f"{me}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
