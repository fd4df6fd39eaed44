"""Grain pipelines from a source to batches. What is in a batch is a pure function of its number (`data/order/batches.py`).

Shuffle, repeat, packing and batching are index arithmetic, done before any worker process: so the batch with number n is
the same for every number of workers and hosts, a run resumes with exactly the next batch, and no example is seen twice in an
epoch.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags
from rich.table import Table

from deepstack_jax.config import DataSpec
from deepstack_jax.data.encode.batch_rows import EncodedExample, ExampleSize, HostBatch, collate, fill
from deepstack_jax.data.encode.encoder import Encoder, try_record
from deepstack_jax.data.example import BadExample, Source, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.order.batches import PackedBatches, PaddedBatches
from deepstack_jax.data.order.lengths import length_index
from deepstack_jax.data.order.mixture import SHUFFLE_ROUNDS, epoch_order, row_choice
from deepstack_jax.data.order.packing import RowCapacity
from deepstack_jax.data.workers import check_shared_memory, ignore_signals_exit_with_parent, worker_failure
from deepstack_jax.errors import ConfigError
from deepstack_jax.printing import redacted


@dataclass(frozen=True)
class BatchLoader:
    """Number of a batch -> one host's part of it. Runs in the workers.

    `sizes` i32[records of the source, 3] is what the schedule was made from, if it was made from lengths.
    """

    source: Source
    encoder: Encoder
    schedule: PackedBatches | PaddedBatches
    sizes: np.ndarray | None
    process: int
    processes: int

    def rows(self, number: int) -> tuple[list[list[int]], int | None]:
        """The records of the source in each row of this host's part, and the longest example of all hosts' parts."""
        step = self.schedule.step(number)
        share = self.schedule.rows // self.processes
        return step.rows[self.process * share : (self.process + 1) * share], step.longest

    def __call__(self, number: int) -> HostBatch:
        rows, longest = self.rows(int(number))
        spec = self.encoder.spec
        loaded = [[self._load(index) for index in row] for row in rows]
        if not spec.data.packing.enabled:
            return collate([example for [(example, _)] in loaded], spec, longest)
        return fill(spec.batch_shape(len(rows), spec.data.max_length), loaded, spec.layout.patches)

    def _load(self, index: int) -> tuple[EncodedExample | BadExample, ExampleSize]:
        """An example and the room that is kept for it. One that needs another is blank: packs are never made again."""
        example = try_record(self.source, index, self.encoder.encode)
        if self.sizes is None:
            return example, ExampleSize()
        planned = ExampleSize(*map(int, self.sizes[index]))
        if isinstance(example, EncodedExample) and example.size != planned:
            reason = (
                f"record {index} has the size {tuple(example.size)} in tokens, crop slots, visual tokens, the length index "
                f"says {tuple(planned)}: its data changed since; delete {files.cache_folder()}/lengths and start again"
            )
            example = BadExample(index, f"record {index}", reason)
        return example, planned


class TrainingStream(Iterator[HostBatch]):
    """Batches without end, in a fixed order, from any batch number on.

    Args:
      source: random access, of examples.
      spec: of the run. Packing, and buckets on several hosts, need the lengths of all examples: they are measured here, which
        takes minutes for large data, or read from the cache.
      process, processes: this host and the number of hosts; a host reads only its slice of each global batch.
      devices: along the batch axes of the mesh, of all hosts. Every micro-batch of packed rows splits over them and over hosts.

    Attributes:
      rows: of a global batch; under packing fewer than `config.train.batch_size`.

    `state()` is that of the batches handed out, not of those decoded ahead.

    Raises:
      ConfigError, SourceError: lengths cannot be measured, the batch size cannot be reached, or worker processes would not
        have the shared memory that they need.
    """

    def __init__(self, source: Source, spec: DataSpec, *, process: int = 0, processes: int = 1, devices: int = 1) -> None:
        self.spec = spec
        self._next = 0
        self._iterator: Any = None
        data, order = spec.data, epoch_order(source, spec.data.seed, spec.data.shuffle)
        self.examples_per_epoch = len(order)
        several = processes > 1 and bool(data.buckets)
        sizes = length_index(source, spec) if data.packing.enabled or several else None
        self.schedule: PackedBatches | PaddedBatches
        if data.packing.enabled and sizes is not None:
            divisor = math.lcm(devices, processes) * spec.accumulation
            self.schedule = PackedBatches(order, sizes, RowCapacity.of(spec), data.packing.window, spec.batch_size, divisor)
        else:
            self.schedule = PaddedBatches(order, spec.batch_size, sizes)
        self.rows = self.schedule.rows
        if self.rows % processes:
            near = max(1, round(self.rows / processes)) * processes
            raise ConfigError(
                f"config.train.batch_size {self.rows} does not split over {processes} hosts; nearest valid: {near}"
            )
        shape = spec.batch_shape(self.rows // processes, data.max_length)
        check_shared_memory(data, shape.rows * shape.crops * shape.crop_size**2 * 3)  # pixels, next to which the rest is small
        self._make = BatchLoader(source, Encoder(spec), self.schedule, sizes, process, processes)

    def steps(self, epochs: float) -> int:
        """Batches that go through the data so often; the same with and without packing within 2%."""
        return self.schedule.steps(epochs)

    def describe(self) -> Table | None:
        """How well packed rows are used; None without packing."""
        return self.schedule.describe() if isinstance(self.schedule, PackedBatches) else None

    def examples(self, number: int) -> list[int]:
        """Records of the source in batch `number`, of all hosts' parts, in order."""
        return [index for row in self.schedule.step(number).rows for index in row]

    def state(self, unused: int = 0) -> dict[str, Any]:
        """Where the next batch begins, the last `unused` ones to come again, and what the order depends on."""
        return {**self.schedule.place(self._next - unused), "order": self._fingerprint()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; ConfigError where data or order are others: it would repeat and miss examples."""
        ours, theirs = self._fingerprint(), state["order"]
        if theirs != ours:
            keys = [*ours, *(key for key in theirs if key not in ours)]
            changed = {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}
            raise ConfigError(f"the checkpoint's data order differs in {changed} (saved, now); start a new --workdir")
        self.close()
        self._next = self.schedule.resume(state)

    def _fingerprint(self) -> dict[str, Any]:
        data = self.spec.data
        sets = sorted((name, row_choice(entry), entry.repeat) for name, entry in data.sets.items())
        source = data.generated or ((data.train, data.images) if data.train else sets)
        named = redacted(json.dumps([data.source, str(source)]))
        digest = hashlib.sha256(named.encode()).hexdigest()[:16]
        return {
            "source": digest,
            "rows": self.examples_per_epoch,
            "seed": data.seed,
            "shuffle": data.shuffle,
            "rounds": SHUFFLE_ROUNDS,  # of the shuffle: checkpoints of another kind of order name another number, or none
            **self.schedule.order(),
        }

    def __next__(self) -> HostBatch:
        try:
            if self._iterator is None:
                self._iterator = iter(self._dataset(self._next))
            delivered = next(self._iterator)
        except Exception as error:  # Grain's workers and threads must not outlive it into the exit of Python
            self.close()
            if reason := worker_failure(error):
                raise SourceError(reason) from error
            raise
        self._next += 1
        return delivered

    def close(self) -> None:
        """End the decoding, worker processes included; the next batch would start it again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _dataset(self, first: int) -> grain.IterDataset:
        """Decoding starts here, in threads of this process or in worker processes."""
        data = self.spec.data
        batches = grain.MapDataset.range(first, sys.maxsize).map(self._make)
        if data.workers == 0:
            return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch))
        if not flags.FLAGS.is_parsed():  # Grain asks for flags of its own; from Python nobody has parsed any
            flags.FLAGS.mark_as_parsed()
        inner = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        ahead = max(1, data.prefetch // data.workers)
        options = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=ahead)
        return inner.mp_prefetch(options, ignore_signals_exit_with_parent)
