"""What a new run starts from: folders of weights, and the workdirs of earlier runs, which serve in their place.

A workdir as `train.weights` gives all parameters, as `train.projector` those that stage 1 trains: the projector, and
mergers and image_newline where both runs have them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from deepstack_jax.config import Config, MeshConfig, TrainConfig
from deepstack_jax.errors import WeightsError, fetch_command, flags_as
from deepstack_jax.families.forms import check_against
from deepstack_jax.model.quantised import QuantisedKernel
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.train.checkpoint.adapter import check_base
from deepstack_jax.train.checkpoint.checksums import base_checksum, base_checksum_in_memory
from deepstack_jax.train.checkpoint.reading import saved_steps
from deepstack_jax.train.checkpoint.restore_params import config_of, is_workdir, restore_base, restore_params
from deepstack_jax.train.core.optimizer import flatten, unflatten
from deepstack_jax.train.core.program import Program, build_program
from deepstack_jax.types import AdaptedState, TrainState
from deepstack_jax.weights.adapters import is_adapter, merged
from deepstack_jax.weights.load import absent_leaves, load_params, stored_leaves
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.open_checkpoint import StoredModel, open_checkpoint
from deepstack_jax.weights.save import LeafLike
from deepstack_jax.weights.stored_tensor import StoredTensor

PROJECTOR = ("projector/", "deepstack_mergers_", "image_newline")  # beginnings of the paths that stage 1 trains
NEWLINE = "model.image_newline"

# What `convert` has as a flag.
WEIGHT_FLAGS = {"tower": "--config.train.tower", "projector": "--config.train.projector", "base": "--config.train.weights"} | {
    "adapter": "convert's --adapter"
}


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
    fresh = _draw(program, absent_leaves(found.tensors, config))
    kinds = {path: leaf.dtype for path, leaf in flatten(program.abstract_state().params).items()}
    if not program.adapted:
        return program.jit_begin()(load_params(found.tensors, config, kinds, program.places, fresh))
    at, kept, sums = flatten(program.places), flatten(shardings.params), []

    def keep(path: str, leaf: jax.Array) -> Any:
        """One by one, so that of what is quantised no more than one kernel is on the devices whole."""
        if path in program.base:
            sums.append(base_checksum({path: leaf}))
        return jax.jit(partial(program.keep, path), out_shardings=kept[path])(leaf) if path in quantised else leaf

    quantised = {path for path, place in kept.items() if isinstance(place, QuantisedKernel)}
    params = flatten(load_params(found.tensors, config, kinds, program.places, fresh, keep))
    places = {path: place for path, place in at.items() if is_adapter(path)}
    params |= jax.jit(program.draw_adapters, out_shardings=places)(key)
    return program.jit_begin()(unflatten(params), sum(sums, jnp.uint32(0)))


def with_base(program: Program, saved: TrainState) -> TrainState:
    """A state from a checkpoint; under adapters with the base that they were trained over, read or drawn again.

    Raises:
      WeightsError: what is there now is another base.
    """
    if not isinstance(saved, AdaptedState):
        return saved
    begun = cast(AdaptedState, first_state(program))
    trained_over, found = jax.device_get((saved.base, begun.base))
    check_base(int(trained_over), int(found), _base_name(program.config))
    return dataclasses.replace(saved, params=unflatten(flatten(begun.params) | flatten(saved.params)))


def run_leaves(workdir: Path, only: tuple[str, ...] = ("",)) -> tuple[int, Config, dict[str, LeafLike]]:
    """As `restore_params`, with the base under a run's adapters, whose parameters are read when they are asked for.

    Raises:
      WeightsError: the base is not there any more, or another one is. CheckpointError: as `restore_params`.
    """
    step, config, leaves = restore_params(workdir, only)
    wanted = {path for path in NameTable(config).leaves if path.startswith(only)} - set(leaves)
    if not wanted:
        return step, config, dict(leaves)
    base = _base_leaves(config)
    check_base(restore_base(workdir, step), base_checksum_in_memory(base), _base_name(config))
    return step, config, {**leaves, **{path: base[path] for path in wanted}}


def draw_absent(tensors: Collection[str], config: Config) -> dict[str, np.ndarray]:
    """What a bare language model and tower lack, above all a projector, drawn from the configuration's seed, by path."""
    absent = absent_leaves(tensors, config)
    return _draw(_on_one_device(config), absent) if absent else {}


def _on_one_device(config: Config) -> Program:
    mesh = MeshConfig(1, 1, 1)
    return build_program(dataclasses.replace(config, mesh=mesh), make_mesh(mesh, jax.devices()[:1]), 1)


def _base_leaves(config: Config) -> dict[str, LeafLike]:
    """What does not train in a run with adapters, by path."""
    program = _on_one_device(config)
    if not config.train.weights:
        return dict(_draw(program, program.base))
    found = find_weights(config)
    absent = absent_leaves(found.tensors, config)
    leaves = stored_leaves(found.tensors, config, fresh=dict.fromkeys(absent) | _draw(program, program.base & set(absent)))
    return {path: leaves[path] for path in program.base}


def _draw(program: Program, paths: Collection[str]) -> dict[str, np.ndarray]:
    """Parameters of these paths from the run's seed, in host memory."""
    if not paths:
        return {}

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        drawn = flatten(program.draw(key))
        return {path: drawn[path] for path in paths}

    return jax.device_get(jax.jit(draw)(jax.random.key(program.config.seed)))


def _base_name(config: Config) -> str:
    return f"config.train.weights={config.train.weights}" if config.train.weights else f"config.seed={config.seed}"


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
    config = config_of(folder)
    table = NameTable(config)

    @functools.cache
    def leaves() -> Mapping[str, LeafLike]:
        return merged(run_leaves(folder, only)[2], config)

    return {
        name: StoredTensor(folder, np.dtype(np.float32), foreign.shape, lambda name=name: table.theirs(name, leaves()))
        for name, foreign in table.tensors.items()
        if all(path.startswith(only) for path, _ in foreign.parts)
    }


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
