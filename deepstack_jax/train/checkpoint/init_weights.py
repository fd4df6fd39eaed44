"""What a new run starts from: folders of weights, and the workdirs of earlier runs, which serve in their place.

A workdir as `train.weights` gives all parameters, as `train.projector` those that stage 1 trains: the projector, and
image_newline where both runs have one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from deepstack_jax.config import Config, build_config
from deepstack_jax.errors import WeightsError, fetch_command
from deepstack_jax.families.forms import check_against
from deepstack_jax.train.checkpoint.reading import UnreadableError, saved_steps
from deepstack_jax.train.checkpoint.reading import read_json as read_stored
from deepstack_jax.train.checkpoint.restore_params import restore_params
from deepstack_jax.weights.files import StoredTensor, flags_as
from deepstack_jax.weights.folders import Checkpoint, open_checkpoint
from deepstack_jax.weights.io import read_json
from deepstack_jax.weights.names import Foreign, Table, to_theirs

PROJECTOR = ("projector/", "image_newline")  # beginnings of the paths that stage 1 trains
NEWLINE = "model.image_newline"


def is_workdir(folder: str | Path) -> bool:
    """Whether the folder is a training run's: our configuration, which has no model_type, and checkpoints."""
    file = Path(folder).expanduser() / "config.json"
    return (file.parent / "checkpoints").is_dir() and file.is_file() and "model_type" not in read_json(file)


def open_start(config: Config) -> Checkpoint:
    """What `train.weights`, `train.tower` and `train.projector` name, put together; nothing is read but tables.

    Raises:
      WeightsError: something is not there, or does not belong to the run's model; says what to fetch, and the flag.
    """
    train = config.train
    whole, stage1 = is_workdir(train.weights), bool(train.projector) and is_workdir(train.projector)
    _check_there(config, tower=not whole)
    if whole:
        found = _open_run(train.weights, config)
    else:
        projector = "" if stage1 else train.projector
        with flags_as({"tower": "config.train.tower", "projector": "config.train.projector", "base": "config.train.weights"}):
            found = open_checkpoint(train.weights, tower=train.tower, projector=projector, run=config)
    if not stage1:
        return found
    wanted = Table(config).tensors
    trained = {name: tensor for name, tensor in run_tensors(train.projector, PROJECTOR).items() if name in wanted}
    return dataclasses.replace(found, tensors={**found.tensors, **trained})


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
    table = Table(_config_of(folder))

    @functools.cache
    def leaves() -> Mapping[str, np.ndarray]:
        return restore_params(folder, only)[2]

    def reader(foreign: Foreign) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            made = []
            for path, layer in foreign.parts:
                leaf = table.leaves[path]
                made.append(to_theirs(leaves()[path][layer] if leaf.stacked else leaves()[path], leaf, foreign.shape))
            return made[0] if len(made) == 1 else np.concatenate(made)

        return read

    return {
        name: StoredTensor(folder, np.dtype(np.float32), foreign.shape, reader(foreign))
        for name, foreign in table.tensors.items()
        if all(path.startswith(only) for path, _ in foreign.parts)
    }


def _open_run(workdir: str, run: Config) -> Checkpoint:
    """A run in place of a folder of weights."""
    folder = Path(workdir).expanduser()
    config, tensors = _config_of(folder), run_tensors(folder)
    check_against(run, config)
    if not run.newline:
        tensors.pop(NEWLINE, None)
    return Checkpoint(folder, run, tensors, config.data.tokenizer, config.data.template, "", (), {})


def _config_of(workdir: Path) -> Config:
    try:
        return build_config(read_stored(workdir / "config.json"))
    except UnreadableError:
        raise
    except ValueError as error:
        raise WeightsError(f"{workdir}/config.json cannot be used: {error}; name another run") from error


def _check_there(config: Config, *, tower: bool) -> None:
    """All paths that lead nowhere, said at once, each with what to fetch and its flag."""
    train = config.train
    problems = []
    for key, path in (("weights", train.weights), ("tower", train.tower if tower else "")):
        fetch = fetch_command(path)
        if fetch and not os.path.exists(Path(path).expanduser()):  # else it may be a hub id
            problems.append(f"no folder {path}: {fetch}; or point to another with --config.train.{key}=DIR")
    if train.projector and not os.path.exists(Path(train.projector).expanduser()):
        problems.append(
            f"no projector at {train.projector}: train stage 1 with --workdir={train.projector}, point to its workdir or to an "
            "mm_projector.bin with --config.train.projector=PATH, or take the one among the weights with "
            "--config.train.projector="
        )
    if problems:
        raise WeightsError(*problems)
