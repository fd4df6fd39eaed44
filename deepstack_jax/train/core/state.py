"""The training state before its first step: which leaves it has, where they lie, and where they come from."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepstack_jax.model.quantised import QuantisedKernel
from deepstack_jax.parallel.rules import replicated
from deepstack_jax.train.core.optimizer import flatten, split, unflatten
from deepstack_jax.types import AdaptedState, PyTree, TrainState
from deepstack_jax.weights.adapters import is_adapter


def new_state(
    params: PyTree,
    groups: dict[str, str],
    optimizer: optax.GradientTransformation,
    frozen_dtype: str = "float32",
    base: jax.Array | None = None,
) -> TrainState:
    """The state before the first step; only trainable parameters have optimizer state."""
    trainable, frozen = split(params, groups)
    as_they_are = {path for path, leaf in frozen.items() if is_adapter(path) or isinstance(leaf, QuantisedKernel)}
    frozen = {path: leaf if path in as_they_are else leaf.astype(frozen_dtype) for path, leaf in frozen.items()}
    step, bad_steps, bad_in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # no two may share a buffer: it is donated
    state = TrainState(
        step=step,
        params=unflatten({**trainable, **frozen}),
        opt_state=optimizer.init(trainable),
        bad_steps=bad_steps,
        bad_in_a_row=bad_in_a_row,
    )
    return state if base is None else AdaptedState(**vars(state), base=base)


def without(state: TrainState, base: Collection[str]) -> TrainState:
    """A state as checkpoints hold it: without the parameters of these paths."""
    kept = {path: leaf for path, leaf in flatten(state.params).items() if path not in base}
    return dataclasses.replace(state, params=unflatten(kept))


def state_shardings(
    mesh: Mesh,
    params: PyTree,
    shapes: PyTree,
    groups: dict[str, str],
    optimizer: optax.GradientTransformation,
    *,
    adapted: bool = False,
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
    state = TrainState(step=whole, params=params, opt_state=placed, bad_steps=whole, bad_in_a_row=whole)
    return AdaptedState(**vars(state), base=whole) if adapted else state
