"""The training state before its first step: which leaves it has, where they lie, and where they come from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepstack_jax.config import Config
from deepstack_jax.errors import WeightsError
from deepstack_jax.parallel.rules import replicated
from deepstack_jax.train.checkpoint.init_weights import open_start
from deepstack_jax.train.core.optimizer import FROZEN, flatten, unflatten
from deepstack_jax.types import PyTree, TrainState
from deepstack_jax.weights.folders import Checkpoint
from deepstack_jax.weights.load import absent_leaves, stored_leaves


def new_state(
    params: PyTree, groups: dict[str, str], optimizer: optax.GradientTransformation, frozen_dtype: str = "float32"
) -> TrainState:
    """The state before the first step; only trainable parameters have optimizer state."""
    flat = flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if groups[path] != FROZEN}
    frozen = {path: leaf.astype(frozen_dtype) for path, leaf in flat.items() if groups[path] == FROZEN}
    step, bad_steps, bad_in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # no two may share a buffer: it is donated
    return TrainState(
        step=step,
        params=unflatten({**trainable, **frozen}),
        opt_state=optimizer.init(trainable),
        bad_steps=bad_steps,
        bad_in_a_row=bad_in_a_row,
    )


def abstract_state(
    shapes: PyTree,
    shardings: TrainState,
    groups: dict[str, str],
    optimizer: optax.GradientTransformation,
    frozen_dtype: str = "float32",
) -> TrainState:
    """Shapes, dtypes and shardings of the state, for restoring."""
    state = jax.eval_shape(lambda params: new_state(params, groups, optimizer, frozen_dtype), shapes)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings)


def state_shardings(
    mesh: Mesh, params: PyTree, shapes: PyTree, groups: dict[str, str], optimizer: optax.GradientTransformation
) -> TrainState:
    """Sharding of every leaf of the state; moments lie like their parameters.

    Args:
      params: sharding of every parameter. shapes: the abstract parameters.
    """
    trainable = {path: sharding for path, sharding in flatten(params).items() if groups[path] != FROZEN}
    sizes = {path: leaf for path, leaf in flatten(shapes).items() if path in trainable}
    whole: Any = replicated(mesh)  # a tree of shardings has the shape of a state, whose leaves are arrays

    def place(path: tuple, leaf: Any) -> Any:
        names = [str(getattr(key, "key", "")) for key in path]
        owner = next((name for name in reversed(names) if name in trainable), None)
        return trainable[owner] if owner and leaf.shape == sizes[owner].shape else whole

    opt_state = jax.eval_shape(optimizer.init, sizes)
    placed = jax.tree_util.tree_map_with_path(place, opt_state)
    return TrainState(step=whole, params=params, opt_state=placed, bad_steps=whole, bad_in_a_row=whole)


def find_weights(config: Config) -> Checkpoint:
    """What `train.weights` and `train.projector` name, every tensor checked against the run's model, none of them read.

    Raises:
      WeightsError: it is missing, of other sizes, or lacks tensors that only a trained model has.
    """
    try:
        found = open_start(config)
        stored_leaves(found.tensors, config, fresh=dict.fromkeys(absent_leaves(found.tensors, config)))
    except WeightsError as error:  # which says how `convert` is told
        raise WeightsError(*(problem.replace("--tower", "--config.train.tower") for problem in error.args)) from error
    return found
