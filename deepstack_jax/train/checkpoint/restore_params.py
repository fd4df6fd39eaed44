"""What a run has learned, for whoever uses it: its parameters without optimizer and place in the data."""

from __future__ import annotations

import json
import logging
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
from deepstack_jax.train.core.optimizer import adapt_groups, assign_groups, base_paths, flatten, unflatten
from deepstack_jax.weights.adapters import adapter_paths, adapter_shapes
from deepstack_jax.weights.checkpoint_files import read_model_json
from deepstack_jax.weights.names import NameTable

log = logging.getLogger(__name__)


def is_workdir(folder: str | Path) -> bool:
    """Whether the folder is a training run's: our configuration, which has no model_type, and checkpoints."""
    file = Path(folder).expanduser() / "config.json"
    return (file.parent / "checkpoints").is_dir() and file.is_file() and "model_type" not in read_model_json(file)


def restore_params(workdir: Path, only: tuple[str, ...] = ("",)) -> tuple[int, Config, dict[str, np.ndarray]]:
    """What a run has learned so far: its newest step, its configuration and its parameters by path, in host memory.

    Of a run with adapters these are the adapters and what else trained; `run_leaves` gives the base with them.
    Optimizer and data state are not read, nor parameters whose path begins with none of `only`. A damaged checkpoint is passed
    over, loudly, for the one before: one that cannot be read, or an array of which is not what its checksum says. One that was
    written before there were checksums is taken as it is.

    Raises:
      CheckpointError: there is no checkpoint that can be read whole; or (UnreadableError) storage fails now; or a link leads
        out of one.
    """
    config = from_stored(read_workdir_json(workdir / "config.json"))
    shapes = {path: shape for path, shape in saved_shapes(config).items() if path.startswith(only)}
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


def saved_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that checkpoints of a run hold, by path."""
    table = NameTable(config).leaves
    shapes = {path: leaf.shape for path, leaf in table.items()}
    if not any(group.lora for group in config.optimizer.groups.values()):
        return shapes
    groups, adapted = adapt_groups(assign_groups(list(table), config.optimizer.table), config.optimizer)
    for path in adapted:
        shapes |= dict(zip(adapter_paths(path), adapter_shapes(table[path], config.lora.rank), strict=True))
    base = base_paths(groups) if adapted else ()
    return {path: shape for path, shape in shapes.items() if path not in base}


def restore_base(workdir: Path, step: int) -> int:
    """Checksum of the base that the adapters of a checkpoint were trained over."""
    folder = (workdir / "checkpoints" / str(step)).absolute()
    scalar = {"base": jax.ShapeDtypeStruct((), np.uint32)}
    how = {"base": ocp.RestoreArgs(restore_type=np.ndarray)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        wanted = ocp.args.PyTreeRestore(item=scalar, restore_args=how, partial_restore=True)
        return int(reader.restore(folder / "state", args=wanted)["base"])


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
