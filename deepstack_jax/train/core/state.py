"""The training state before its first step: which leaves it has, where they lie, and where they come from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepstack_jax.parallel.rules import replicated
from deepstack_jax.train.core.optimizer import split, unflatten
from deepstack_jax.types import PyTree, TrainState
from deepstack_jax.weights.adapters import is_adapter


def new_state(
    params: PyTree, groups: dict[str, str], optimizer: optax.GradientTransformation, frozen_dtype: str = "float32"
) -> TrainState:
    """The state before the first step; only trainable parameters have optimizer state."""
    trainable, frozen = split(params, groups)
    frozen = {path: leaf if is_adapter(path) else leaf.astype(frozen_dtype) for path, leaf in frozen.items()}
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
    trainable, sizes = split(params, groups)[0], split(shapes, groups)[0]
    whole: Any = replicated(mesh)  # a tree of shardings has the shape of a state, whose leaves are arrays

    def place(path: tuple, leaf: Any) -> Any:
        names = [str(getattr(key, "key", "")) for key in path]
        owner = next((name for name in reversed(names) if name in trainable), None)
        return trainable[owner] if owner and leaf.shape == sizes[owner].shape else whole

    opt_state = jax.eval_shape(optimizer.init, sizes)
    placed = jax.tree_util.tree_map_with_path(place, opt_state)
    return TrainState(step=whole, params=params, opt_state=placed, bad_steps=whole, bad_in_a_row=whole)
