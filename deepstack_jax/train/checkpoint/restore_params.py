"""What a run has learned, for whoever uses it: its parameters without optimizer and place in the data."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from deepstack_jax.config import Config, build_config
from deepstack_jax.train.checkpoint.checksums import algorithm_of, checksums_in_memory, damage
from deepstack_jax.train.checkpoint.reading import CheckpointError, check_links, read_json, read_or_damage, saved_steps
from deepstack_jax.train.core.optimizer import flatten, unflatten
from deepstack_jax.weights.names import Table

log = logging.getLogger(__name__)


def restore_params(workdir: Path, only: tuple[str, ...] = ("",)) -> tuple[int, Config, dict[str, np.ndarray]]:
    """What a run has learned so far: its newest step, its configuration and its parameters by path, in host memory.

    Optimizer and data state are not read, nor parameters whose path begins with none of `only`. A damaged checkpoint is passed
    over, loudly, for the one before: one that cannot be read, or an array of which is not what its checksum says. One that was
    written before there were checksums is taken as it is.

    Raises:
      CheckpointError: there is no checkpoint that can be read whole; or (UnreadableError) storage fails now; or a link leads
        out of one.
    """
    config = build_config(read_json(workdir / "config.json"))
    shapes = {path: leaf.shape for path, leaf in Table(config).leaves.items() if path.startswith(only)}
    problems = []
    for step in reversed(saved_steps(workdir)):
        folder = (workdir / "checkpoints" / str(step)).absolute()
        check_links(folder)
        leaves, problem = read_or_damage(str(folder), partial(_read, folder, shapes))
        if leaves is not None:
            return step, config, leaves
        problems.append(f"step {step}: {problem}")
        log.warning("checkpoint %s is damaged, trying the one before: %s", folder, problems[-1])
    if not problems:
        raise CheckpointError(f"there is no checkpoint in {workdir}; train it first")
    raise CheckpointError(f"no checkpoint in {workdir} can be read ({'; '.join(problems)}); copy the run there again")


def _read(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Parameters of one checkpoint as float32, compared with its checksums as they were stored."""
    abstract = {"params": unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})}
    # Without a dtype: what is stored as bfloat16 must not be cast before it is summed.
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    wanted = ocp.args.PyTreeRestore(item=abstract, restore_args=as_numpy, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = reader.restore(folder / "state", args=wanted)
    if (folder / "sums").exists():
        expected = json.loads((folder / "sums" / "metadata").read_text())
        found = checksums_in_memory(stored, algorithm_of(expected))
        if problem := damage({name: expected.get(name, -1) for name in found}, found):
            raise CheckpointError(problem)
    leaves = flatten(stored.pop("params"))
    for path in leaves:  # one by one, so that no more than one array stands there twice
        leaves[path] = leaves[path].astype(np.float32, copy=False)
    return leaves
