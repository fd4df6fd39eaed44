"""Host arrays onto the devices of a mesh, and decisions that all hosts must take alike.

A host that decides alone leaves the others waiting for it in the next step: whatever stops, saves or skips is agreed on first.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from deepstack_jax.batch import Batch
from deepstack_jax.parallel.rules import batch_sharding

_TEXT_BYTES = 512


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """This host's rows of a global batch as global arrays, rows split over the batch axes of the mesh.

    `example_id` becomes i32: the device never reads it, and without x64 there is no i64 there.
    """
    sharding = batch_sharding(mesh)
    batch = batch._replace(example_id=batch.example_id.astype(np.int32))
    return Batch(*(jax.make_array_from_process_local_data(sharding, array) for array in batch))


def is_first_host() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all hosts are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first_host_says(text: str) -> str:
    """The first host's text on all hosts, cut to 512 bytes of UTF-8."""
    if jax.process_count() == 1:
        return text
    padded = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    said = multihost_utils.broadcast_one_to_all(np.frombuffer(padded, np.uint8))
    return bytes(np.asarray(said)).rstrip(b"\0").decode(errors="ignore")


def sum_over_hosts(values: dict[str, float]) -> dict[str, float]:
    """Each value added up over all hosts, which must give the same keys."""
    if jax.process_count() == 1:
        return values
    mine = np.array([values[name] for name in sorted(values)], np.float32)
    totals = np.asarray(multihost_utils.process_allgather(mine)).sum(axis=0)
    return dict(zip(sorted(values), totals.tolist(), strict=True))


def told_to_stop(step: int, signal_received: bool) -> bool:
    """Whether the run stops before step `step` + 1: on one host by its own signals, on several where all agreed on a step.

    With several hosts SIGTERM belongs to jax's preemption service, which lets every host stop at the same step.
    """
    if jax.process_count() == 1:
        return signal_received
    return multihost_utils.reached_preemption_sync_point(step)
