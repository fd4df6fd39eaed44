"""Saving and resuming with Orbax, asynchronous and atomic: parameters, optimizer, step, place in the data, configuration."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from deepstack_jax.config import Config, build_config, differences
from deepstack_jax.training.optimizer import flatten, unflatten
from deepstack_jax.types import TrainState
from deepstack_jax.weights.names import Table

log = logging.getLogger(__name__)

# Keys that may change between the parts of one run: they decide what is shown and kept, not what is computed.
HARMLESS = ("train.log_every", "train.checkpoint_every", "train.keep", "evaluation.", "data.workers", "data.prefetch", "mesh.")


class CheckpointError(ValueError):
    """The checkpoints in a workdir cannot be used by this run; nothing was written over."""


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/<step>/`.

    Args:
      workdir: an existing folder.
      keep: newest checkpoints that stay.
    """

    def __init__(self, workdir: Path, keep: int) -> None:
        self._directory = (workdir / "checkpoints").absolute()
        # The manager saves when told to: an interval of its own would drop the save at the end and the one at Ctrl-C.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(keep),
            save_interval_steps=1,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    @property
    def latest(self) -> int | None:
        """Newest step that was saved whole."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: dict[str, Any], config: dict[str, Any]) -> None:
        """Write a checkpoint at `state.step`; returns once the state is copied, the files follow in the background."""
        step = int(jax.device_get(state.step))
        if step in self._manager.all_steps():
            return
        items = {
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave(data_state),
            "config": ocp.args.JsonSave(config),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Newest usable checkpoint as (state, data state), or None if there is none at all.

        A damaged checkpoint is passed over, loudly, for the one before.

        Args:
          abstract: shapes, dtypes and shardings to restore to; they may differ from those that saved.

        Raises:
          CheckpointError: there are checkpoints and none can be read; starting anew would throw the run away.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        problems = []
        for step in steps:
            items = {"state": ocp.args.StandardRestore(abstract), "data": ocp.args.JsonRestore()}
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # tensorstore, orbax and json each raise their own kinds on damaged files
                reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
                problems.append(f"step {step}: {reason}")
                log.warning("checkpoint %s cannot be read, trying the one before: %s", step, reason)
                continue
            return restored["state"], restored["data"]
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self._directory} can be read ({'; '.join(problems)}); move the folder away"
            )
        return None

    def wait(self) -> None:
        """Until all files are written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def check_same_run(config: Config, workdir: Path) -> None:
    """Refuse to go on in a workdir of another configuration.

    Raises:
      CheckpointError: listing every key that differs and would change what is computed.
    """
    stored = workdir / "config.json"
    if not stored.exists():
        return
    changed = differences(config, json.loads(stored.read_text()))
    fatal = {key: values for key, values in changed.items() if not key.startswith(HARMLESS)}
    if fatal:
        listed = ", ".join(f"{key}: {theirs!r} there, {ours!r} now" for key, (ours, theirs) in fatal.items())
        raise CheckpointError(f"{workdir} holds a run of another configuration ({listed}); choose a new --workdir")


def restore_params(workdir: Path) -> tuple[int, Config, dict[str, np.ndarray]]:
    """What a run has learned so far: its newest step, its configuration and its parameters by path, in host memory.

    Optimizer and data state are not read. A damaged checkpoint is passed over, loudly, for the one before.

    Raises:
      CheckpointError: there is no checkpoint that can be read.
    """
    config = build_config(json.loads((workdir / "config.json").read_text()))
    shapes = {path: leaf.shape for path, leaf in Table(config).leaves.items()}
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
