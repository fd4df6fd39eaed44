"""The training state before its first step: which leaves it has, where they lie, and where they come from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.parallel.rules import replicated
from deepstack_jax.training.optimizer import FROZEN, flatten, unflatten
from deepstack_jax.types import PyTree, TrainState
from deepstack_jax.weights.io import load_official


def new_state(params: PyTree, groups: dict[str, str], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; only trainable parameters have optimizer state."""
    trainable = {path: leaf for path, leaf in flatten(params).items() if groups[path] != FROZEN}
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(trainable))


def abstract_state(
    shapes: PyTree, shardings: TrainState, groups: dict[str, str], optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes, dtypes and shardings of the state, for restoring."""
    state = jax.eval_shape(lambda params: new_state(params, groups, optimizer), shapes)
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
    return TrainState(step=whole, params=params, opt_state=jax.tree_util.tree_map_with_path(place, opt_state))


def first_state(
    config: Config,
    model: DeepStack,
    sample: Batch,
    groups: dict[str, str],
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
) -> TrainState:
    """Parameters drawn from the seed, or read from `train.weights`, and a fresh optimizer, born where they belong.

    Drawn values do not depend on the mesh: jax's random bits are the same under any sharding.
    """
    if not config.train.weights:

        def draw(key: jax.Array) -> TrainState:
            return new_state(nn.unbox(model.init(key, sample))["params"], groups, optimizer)

        return jax.jit(draw, out_shardings=shardings)(jax.random.key(config.seed))
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), sample))["params"]
    loaded = load_official(config.train.weights, {path: leaf.shape for path, leaf in flatten(shapes).items()})
    params = jax.device_put(unflatten(loaded), shardings.params)
    return jax.jit(lambda params: new_state(params, groups, optimizer), out_shardings=shardings)(params)
