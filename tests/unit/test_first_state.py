"""The state that a run begins with from weights: the bytes of a plain cast, and no parameter on the devices twice."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from benchmarks.tiny_recipe import Run, load_recipe, write_weights
from deepstack_jax.config import Config, MeshConfig
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.train.checkpoint import init_weights
from deepstack_jax.train.checkpoint.init_weights import first_state, open_start
from deepstack_jax.train.core.optimizer import flatten
from deepstack_jax.train.core.program import Program, build_program
from deepstack_jax.train.core.state import new_state
from deepstack_jax.types import PyTree
from deepstack_jax.weights.load import absent_leaves, load_params


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Stage 1 over weights that have to be rounded; the projector is drawn, the rest frozen."""
    recipe = load_recipe(Run("llava15", "pretrain", ""))
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder, recipe)
    train = dataclasses.replace(recipe.train, weights=str(folder / "llm"), tower=str(folder / "clip"), frozen_dtype="bfloat16")
    return dataclasses.replace(recipe, train=train)


def program_of(config: Config, devices: int) -> Program:
    mesh = MeshConfig(fsdp=devices)
    return build_program(dataclasses.replace(config, mesh=mesh), make_mesh(mesh, jax.devices()[:devices]), steps=3)


def nbytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("devices", [1, 4])
def test_the_state_is_that_of_float32_weights_cast_on_the_device(config, devices):
    program = program_of(config, devices)
    state = first_state(program)
    tensors = open_start(config).tensors
    drawn = first_state(
        dataclasses.replace(program, config=dataclasses.replace(config, train=dataclasses.replace(config.train, weights="")))
    )
    fresh = {path: np.asarray(flatten(drawn.params)[path]) for path in absent_leaves(tensors, config)}
    assert fresh
    params = load_params(tensors, config, fresh=fresh)
    expected = jax.jit(lambda params: new_state(params, program.groups, program.optimizer, "bfloat16"))(params)
    rounded = [np.any(leaf != leaf.astype("bfloat16").astype(leaf.dtype)) for leaf in jax.tree.leaves(params)]
    assert sum(rounded) > 10
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)}
    assert kinds == {"float32", "bfloat16"}
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.sharding, state), program.shardings)


def test_what_is_read_is_not_wider_than_the_state_and_becomes_it(config, monkeypatch):
    read: list[jax.Array] = []

    def watched(*words, **named):
        params = load_params(*words, **named)
        read.extend(jax.tree.leaves(params))
        return params

    monkeypatch.setattr(init_weights, "load_params", watched)
    program = program_of(config, 4)
    state = first_state(program)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in read) == nbytes(state.params)
    assert all(leaf.is_deleted() for leaf in read), "both stood on the devices at once"


def test_the_compiled_program_copies_no_parameter(config):
    program = program_of(config, 1)
    params = program.abstract_state().params
    memory = program.jit_begin().lower(params).compile().memory_analysis()
    assert memory.alias_size_in_bytes == nbytes(params)
    beside = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    assert beside < 1.1 * nbytes(program.abstract_state().opt_state) + 4096
