"""Host arrays onto the devices of a mesh, and decisions that all hosts must take alike.

A host that decides alone leaves the others waiting for it in the next step: whatever stops, saves or skips is agreed on first.
"""

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from deepstack_jax.batch import Batch
from deepstack_jax.errors import ConfigError
from deepstack_jax.parallel.rules import batch_sharding

_NOTICE_SECONDS = 1.5  # jax's preemption service looks once a second for SIGTERM


@dataclass(frozen=True)
class ProcessSlice:
    """Which rows of every batch a process holds: rows `index * share` to `(index + 1) * share`, the share being rows / count.

    Processes along the tensor axis hold the same rows and must be given the same ones; one of them speaks for all.
    """

    index: int
    count: int
    is_leader: bool


def process_slice(mesh: Mesh, process: int | None = None) -> ProcessSlice:
    """The part of a process, this one by default.

    Raises:
      ConfigError: processes share some of their rows and not all.
    """
    process = jax.process_index() if process is None else process
    shards = mesh.devices.reshape(-1, mesh.shape["tensor"])
    held: dict[int, list[int]] = defaultdict(list)
    for number, devices in enumerate(shards):
        for owner in {device.process_index for device in devices}:
            held[owner].append(number)
    parts = sorted({tuple(numbers) for numbers in held.values()})
    if sum(map(len, parts)) != len(shards) or len({len(part) for part in parts}) > 1:
        raise ConfigError(
            f"config.mesh.tensor {mesh.shape['tensor']} lays the rows of a batch over {len(held)} processes unevenly; choose "
            "one that divides, or is a multiple of, the devices of a process"
        )
    mine = tuple(held[process])
    return ProcessSlice(parts.index(mine), len(parts), process == min(owner for owner in held if tuple(held[owner]) == mine))


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """This host's rows of a global batch as global arrays, rows split over the batch axes of the mesh.

    `example_id` becomes i32: the device never reads it, and without x64 there is no i64 there.
    """
    sharding = batch_sharding(mesh)
    batch = batch._replace(example_id=batch.example_id.astype(np.int32))
    return Batch(*(jax.make_array_from_process_local_data(sharding, array) for array in batch))


def local_rows(array: jax.Array) -> np.ndarray:
    """This process' rows of an array that lies like a batch, in the order in which `put_batch` took them."""
    rows = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])


def is_first_host() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all hosts are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_str(text: str) -> str:
    """The first host's text on all hosts, of any length."""
    return allgather_str(text if is_first_host() else "")[0]


def allgather_str(text: str) -> list[str]:
    """The texts of all hosts, in their order, of any length."""
    if jax.process_count() == 1:
        return [text]
    mine = text.encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.array(len(mine), np.int32))).ravel()
    padded = np.frombuffer(mine.ljust(max(1, int(sizes.max())), b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def max_over_hosts(value: int) -> int:
    """The largest of all hosts' values."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.array(value, np.int32))))


def sum_over_hosts(values: Mapping[str, float]) -> dict[str, float]:
    """Each value added up over all hosts, which must give the same keys."""
    if jax.process_count() == 1:
        return dict(values)
    mine = np.array([values[name] for name in sorted(values)], np.float32)
    totals = np.asarray(multihost_utils.process_allgather(mine)).sum(axis=0)
    return dict(zip(sorted(values), totals.tolist(), strict=True))


class PreemptionSync:
    """Whether the run stops before its next step: on one host by its own signals, on several where all agreed on a step.

    With several hosts SIGTERM belongs to jax's preemption service, which tells all hosts and lets them stop at the same call;
    what stops one host in another way (Ctrl-C) is handed on to the service as such a SIGTERM. All hosts call it equally often.

    Args:
      signal_received: whether this process was told by a signal of its own.
    """

    def __init__(self, signal_received: Callable[[], bool]) -> None:
        self._received = signal_received
        self._calls = 0

    def __call__(self) -> bool:
        self.forward_signal()
        return self._agreed()

    def forward_signal(self) -> None:
        """Tell the other hosts, where there are any, what this one was told."""
        if jax.process_count() > 1 and self._received():
            os.kill(os.getpid(), signal.SIGTERM)

    def requested_after_last_step(self) -> bool:
        """The same once all steps are done and saved, for what the hosts were told until a moment ago."""
        if jax.process_count() > 1:
            time.sleep(_NOTICE_SECONDS)
        return self._agreed()

    def _agreed(self) -> bool:
        if jax.process_count() == 1:
            return self._received()
        # The service stops at the largest number seen so far + 1, and nowhere else: a run that began at its own step 500 would
        # step over the 1 that a SIGTERM before the first call leads to.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)
