"""The train verb on a disk that is full from the batch of step FULL on, and has room again once that of step ROOM is there.

python -m tests.e2e.full_disk FULL ROOM --config=... --workdir=...

A limit on the size of files stands in for the disk: every write to a file fails. Step FULL + 1 has a weight that is not a
number, so that there is a step to keep for a replay.
"""

import resource
import sys

import numpy as np

from deepstack_jax import cli
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.train import __main__ as train
from deepstack_jax.train.run import loop

FULL, ROOM = int(sys.argv.pop(1)), int(sys.argv.pop(1))
UNLIMITED = resource.RLIM_INFINITY
next_batch, batches = TrainingStream.__next__, []


def deliver(stream):
    """Before the loop looks at what could not be used in the batch."""
    batches.append(next_batch(stream))
    if len(batches) == FULL:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, UNLIMITED))
    if len(batches) == ROOM:
        resource.setrlimit(resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
    return batches[-1]


def put(mesh, batch):
    if len(batches) == FULL + 1:
        batch.loss_weights[0, np.flatnonzero(batch.loss_weights[0])[0]] = np.nan
    return put_batch(mesh, batch)


if __name__ == "__main__":
    TrainingStream.__next__, loop.put_batch = deliver, put
    cli.run(train.main, train.USAGE, train.FLAGS)
