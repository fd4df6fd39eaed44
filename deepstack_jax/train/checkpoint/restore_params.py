"""What a run has learned, for whoever uses it: its parameters without optimizer and place in the data."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from deepstack_jax.config import Config, from_stored
from deepstack_jax.errors import WeightsError
from deepstack_jax.train.checkpoint.checksums import algorithm_of, checksums_in_memory, damage
from deepstack_jax.train.checkpoint.reading import (
    CheckpointError,
    UnreadableError,
    check_links,
    read_or_damage,
    read_workdir_json,
    saved_steps,
)
from deepstack_jax.train.core.optimizer import flatten, unflatten
from deepstack_jax.weights.checkpoint_files import read_model_json
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.stored_tensor import StoredTensor

log = logging.getLogger(__name__)


def is_workdir(folder: str | Path) -> bool:
    """Whether the folder is a training run's: our configuration, which has no model_type, and checkpoints."""
    file = Path(folder).expanduser() / "config.json"
    return (file.parent / "checkpoints").is_dir() and file.is_file() and "model_type" not in read_model_json(file)


def restore_params(workdir: Path, only: tuple[str, ...] = ("",)) -> tuple[int, Config, dict[str, np.ndarray]]:
    """What a run has learned so far: its newest step, its configuration and its parameters by path, in host memory.

    Optimizer and data state are not read, nor parameters whose path begins with none of `only`. A damaged checkpoint is passed
    over, loudly, for the one before: one that cannot be read, or an array of which is not what its checksum says. One that was
    written before there were checksums is taken as it is.

    Raises:
      CheckpointError: there is no checkpoint that can be read whole; or (UnreadableError) storage fails now; or a link leads
        out of one.
    """
    config = from_stored(read_workdir_json(workdir / "config.json"))
    shapes = {path: leaf.shape for path, leaf in NameTable(config).leaves.items() if path.startswith(only)}
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
    for path in leaves:  # one by one, so that no more than one array is there twice
        leaves[path] = leaves[path].astype(np.float32, copy=False)
    return leaves


def run_tensors(workdir: str | Path, only: tuple[str, ...] = ("",)) -> dict[str, StoredTensor]:
    """The newest parameters of a run as tensors by official name, read all at once when the first is asked for.

    Args:
      only: beginnings of the paths that are wanted; the rest is not read, since it may be 7B to the projector's 20M.

    Raises:
      WeightsError: the run has no checkpoint yet.
    """
    folder = Path(workdir).expanduser()
    if not saved_steps(folder):
        raise WeightsError(f"{folder} is a run without a checkpoint; let it train until it has one, or name another")
    table = NameTable(config_of(folder))

    @functools.cache
    def leaves() -> Mapping[str, np.ndarray]:
        return restore_params(folder, only)[2]

    return {
        name: StoredTensor(folder, np.dtype(np.float32), foreign.shape, lambda name=name: table.theirs(name, leaves()))
        for name, foreign in table.tensors.items()
        if all(path.startswith(only) for path, _ in foreign.parts)
    }


def config_of(workdir: Path) -> Config:
    """The configuration of a run.

    Raises:
      WeightsError: it cannot be used.
    """
    try:
        return from_stored(read_workdir_json(workdir / "config.json"))
    except UnreadableError:
        raise
    except ValueError as error:
        raise WeightsError(f"{workdir}/config.json cannot be used: {error}; name another run") from error
