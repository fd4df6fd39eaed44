"""What a new run starts from: folders of weights, and the workdirs of earlier runs, which serve in their place.

A workdir as `train.weights` gives all parameters, as `train.projector` those that stage 1 trains: the projector, and
image_newline where both runs have one.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax

from deepstack_jax.config import Config, TrainConfig
from deepstack_jax.errors import WeightsError, fetch_command, flags_as
from deepstack_jax.families.forms import check_against
from deepstack_jax.train.checkpoint.restore_params import config_of, is_workdir, run_tensors
from deepstack_jax.train.core.optimizer import flatten, unflatten
from deepstack_jax.train.core.program import Program
from deepstack_jax.types import TrainState
from deepstack_jax.weights.adapters import is_adapter
from deepstack_jax.weights.load import absent_leaves, load_params, stored_leaves
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.open_checkpoint import StoredModel, open_checkpoint

PROJECTOR = ("projector/", "image_newline")  # beginnings of the paths that stage 1 trains
NEWLINE = "model.image_newline"

# What `convert` has as a flag.
WEIGHT_FLAGS = {"tower": "--config.train.tower", "projector": "--config.train.projector", "base": "--config.train.weights"}


def open_start(config: Config) -> StoredModel:
    """What `train.weights`, `train.tower` and `train.projector` name, put together; nothing is read but tables.

    Raises:
      WeightsError: something is not there, or does not belong to the run's model; says what to fetch, and the flag.
    """
    train = config.train
    whole, stage1 = is_workdir(train.weights), bool(train.projector) and is_workdir(train.projector)
    check_there(train, tower=not whole)
    if whole:
        found = _open_run(train.weights, config)
    else:
        projector = "" if stage1 else train.projector
        with flags_as(WEIGHT_FLAGS):
            found = open_checkpoint(train.weights, tower=train.tower, projector=projector, run=config)
    if not stage1:
        return found
    wanted = NameTable(config).tensors
    trained = {name: tensor for name, tensor in run_tensors(train.projector, PROJECTOR).items() if name in wanted}
    return dataclasses.replace(found, tensors={**found.tensors, **trained})


def first_state(program: Program) -> TrainState:
    """Parameters drawn from the seed, or read from `train.weights`, and a fresh optimizer, born where they belong."""
    config, shardings = program.config, program.shardings
    key = jax.random.key(config.seed)
    if not config.train.weights:
        return jax.jit(lambda key: program.begin(program.draw(key)), out_shardings=shardings)(key)
    found = find_weights(config)
    fresh = {}
    if absent := absent_leaves(found.tensors, config):

        def draw_absent(key: jax.Array) -> dict[str, jax.Array]:
            drawn = flatten(program.draw(key))
            return {path: drawn[path] for path in absent}

        fresh = jax.device_get(jax.jit(draw_absent)(key))
    kinds = {path: leaf.dtype for path, leaf in flatten(program.abstract_state().params).items()}
    params = flatten(load_params(found.tensors, config, kinds, shardings.params, fresh))
    if program.adapted:
        places = {path: place for path, place in flatten(shardings.params).items() if is_adapter(path)}
        params |= jax.jit(program.draw_adapters, out_shardings=places)(key)
    return program.jit_begin()(unflatten(params))


def find_weights(config: Config) -> StoredModel:
    """What `train.weights` and `train.projector` name, every tensor checked against the run's model, none of them read.

    Raises:
      WeightsError: it is missing, of other sizes, or lacks tensors that only a trained model has.
    """
    with flags_as(WEIGHT_FLAGS):
        found = open_start(config)
        stored_leaves(found.tensors, config, fresh=dict.fromkeys(absent_leaves(found.tensors, config)))
    return found


def _open_run(workdir: str, run: Config) -> StoredModel:
    """A run in place of a folder of weights."""
    folder = Path(workdir).expanduser()
    config, tensors = config_of(folder), run_tensors(folder)
    check_against(run, config)
    if not run.image.newline:
        tensors.pop(NEWLINE, None)
    return StoredModel(folder, run, tensors, config.data.tokenizer, config.data.template, "", (), {})


def check_there(train: TrainConfig, *, tower: bool) -> None:
    """All paths that lead nowhere, said at once, each with what to fetch and its flag."""
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
