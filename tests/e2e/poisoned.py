"""The train verb with a hole in its data: a weight that is not a number in every batch that begins with one of given examples.

python -m tests.e2e.poisoned 722404,818987 --config=... --workdir=...
"""

import sys

import numpy as np

from deepstack_jax import cli
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.train import __main__ as train
from deepstack_jax.train.run import loop, replay

POISONED = {int(index) for index in sys.argv.pop(1).split(",")}


def put(mesh, batch):
    if int(batch.example_id[0, 0]) in POISONED:
        batch.loss_weights[0, np.flatnonzero(batch.loss_weights[0])[0]] = np.nan
    return put_batch(mesh, batch)


if __name__ == "__main__":
    loop.put_batch = replay.put_batch = put
    cli.run(train.main, train.USAGE, train.FLAGS)
