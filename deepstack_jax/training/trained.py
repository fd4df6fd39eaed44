"""What a run has learned, for whoever uses it: its parameters without optimizer and place in the data."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from deepstack_jax.config import Config, build_config
from deepstack_jax.training.checkpoint import CheckpointError
from deepstack_jax.training.optimizer import flatten, unflatten
from deepstack_jax.weights.names import Table

log = logging.getLogger(__name__)


def restore_params(workdir: Path, only: tuple[str, ...] = ("",)) -> tuple[int, Config, dict[str, np.ndarray]]:
    """What a run has learned so far: its newest step, its configuration and its parameters by path, in host memory.

    Optimizer and data state are not read, nor parameters whose path begins with none of `only`. A damaged checkpoint is passed
    over, loudly, for the one before.

    Raises:
      CheckpointError: there is no checkpoint that can be read.
    """
    config = build_config(json.loads((workdir / "config.json").read_text()))
    shapes = {path: leaf.shape for path, leaf in Table(config).leaves.items() if path.startswith(only)}
    abstract = {"params": unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})}
    as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), abstract)
    wanted = ocp.args.PyTreeRestore(item=abstract, restore_args=as_numpy, partial_restore=True)
    folders = [folder for folder in (workdir / "checkpoints").absolute().glob("*") if folder.name.isdigit()]
    problems = []
    for folder in sorted(folders, key=lambda folder: int(folder.name), reverse=True):
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                return int(folder.name), config, flatten(reader.restore(folder / "state", args=wanted)["params"])
        except Exception as error:  # tensorstore, orbax and json each raise their own kinds on damaged files
            problems.append(f"step {folder.name}: {(str(error).splitlines() or [type(error).__name__])[0][:300]}")
            log.warning("checkpoint %s cannot be read, trying the one before: %s", folder, problems[-1])
    raise CheckpointError(f"no checkpoint in {workdir} can be read ({'; '.join(problems) or 'there is none'}); train it first")
