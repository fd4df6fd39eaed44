"""Host arrays onto the devices of a mesh, and decisions that all hosts must take alike."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from deepstack_jax.batch import Batch
from deepstack_jax.parallel.rules import batch_sharding


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """This host's rows of a global batch as global arrays, rows split over the batch axes of the mesh.

    `example_id` becomes i32: the device never reads it, and without x64 there is no i64 there.
    """
    sharding = batch_sharding(mesh)
    batch = batch._replace(example_id=batch.example_id.astype(np.int32))
    return Batch(*(jax.make_array_from_process_local_data(sharding, array) for array in batch))
