"""Runs with adapters: what their checkpoints hold, how they go on, over which base, and how they are loaded."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import deepstack_jax as dsx
from deepstack_jax.config import Config, LoraConfig, MeshConfig, OptimizerConfig, OptimizerGroup, to_stored
from deepstack_jax.errors import WeightsError
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.train.checkpoint.init_weights import first_state, open_start, run_tensors, with_base
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.checkpoint.restore_params import restore_params
from deepstack_jax.train.core.optimizer import flatten, unflatten
from deepstack_jax.train.core.program import Program, build_program
from deepstack_jax.weights.adapters import is_adapter
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from tests.parity.goldens import write_folder
from tests.unit.lora import TABLE

GROUPS = {"default": OptimizerGroup(lr=0.05), "adapters": OptimizerGroup(lr=0.05, lora=True)}


def config_over(weights: Path, base_dtype="float32", start: str | None = None) -> Config:
    """A run over these weights; `start`: what it names instead of them."""
    stored = open_checkpoint(weights).config
    return dataclasses.replace(
        stored,
        optimizer=OptimizerConfig(TABLE, GROUPS),
        lora=LoraConfig(rank=2, alpha=4.0, base_dtype=base_dtype),
        train=dataclasses.replace(stored.train, weights=str(weights) if start is None else start, compute_dtype="float32"),
        data=dataclasses.replace(stored.data, tokenizer="bytes"),
    )


def program_of(config: Config) -> Program:
    return build_program(config, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), steps=4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_folder("l_2d", tmp_path_factory.mktemp("base"))


def save_run(config: Config, workdir: Path):
    """A run's workdir at step 3, its adapters as if they had been trained; returns the state."""
    program = program_of(config)
    state = first_state(program)
    rng, params = np.random.default_rng(0), flatten(state.params)
    for path in [path for path in params if path.endswith("lora_b") or path == "projector/fc1/bias"]:
        params[path] = jnp.asarray(rng.normal(0, 0.1, params[path].shape), jnp.float32)
    state = dataclasses.replace(state, params=unflatten(params), step=jnp.int32(3))
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(to_stored(config)))
    checkpoints = Checkpoints(workdir, config.train, base=program.base)
    checkpoints.save(state, {"at": 3}, {})
    checkpoints.finish(3)
    checkpoints.close()
    return state


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    return workdir, save_run(config_over(weights), workdir)


def restored(config: Config, workdir: Path):
    program = program_of(config)
    checkpoints = Checkpoints(workdir, config.train, base=program.base, read_only=True)
    state, place = checkpoints.restore(program.abstract_state())
    checkpoints.close()
    assert place == {"at": 3}
    return program, state


def test_a_checkpoint_holds_what_trains_and_a_run_goes_on_from_it_with_the_same_bytes(run, weights):
    workdir, state = run
    program, saved = restored(config_over(weights), workdir)
    held = set(flatten(saved.params))
    assert held == {path for path in program.sizes if is_adapter(path) or program.groups[path] != "frozen"}
    assert len(held) < len(program.sizes)
    whole = with_base(program, saved)
    assert jax.tree.structure(whole) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        assert (ours.dtype, np.asarray(ours).tobytes()) == (theirs.dtype, np.asarray(theirs).tobytes())


def another_base(weights: Path, folder: Path) -> Path:
    """The same folder with one number of one kernel changed."""
    other = write_folder("l_2d", folder)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.25
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_another_base_is_refused(run, weights, tmp_path):
    workdir, _ = run
    config = config_over(another_base(weights, tmp_path))
    program, saved = restored(config, workdir)
    wrong = r"trained over a base with checksum [0-9a-f]{8}, and config.train.weights=\S+ gives [0-9a-f]{8}; give the weights"
    with pytest.raises(WeightsError, match=wrong):
        with_base(program, saved)
    moved = tmp_path / "moved"
    save_run(config_over(weights), moved)
    (moved / "config.json").write_text(json.dumps(to_stored(config)))
    with pytest.raises(WeightsError, match=wrong):
        dsx.load(moved)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_is_known_whatever_it_is_kept_in(run, weights, dtype):
    state = first_state(program_of(config_over(weights, dtype)))
    assert int(state.base) == int(run[1].base)


def test_a_base_that_was_drawn_is_drawn_again(weights, tmp_path):
    config = config_over(weights, start="")
    state = save_run(config, tmp_path / "run")
    program, saved = restored(config, tmp_path / "run")
    whole = with_base(program, saved)
    for ours, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    loaded = flatten(dsx.load(tmp_path / "run").params)
    for path, leaf in flatten(state.params).items():
        np.testing.assert_allclose(loaded[path], leaf, atol=1e-6, err_msg=path)  # drawn by another program


def test_a_run_is_loaded_with_its_adapters_and_its_base(run, weights):
    workdir, state = run
    step, config, leaves = restore_params(workdir)
    assert (step, config.lora.rank) == (3, 2)
    loaded = flatten(dsx.load(workdir).params)
    expected = {path: np.asarray(leaf) for path, leaf in flatten(state.params).items()}
    assert set(leaves) < set(loaded) == set(expected)
    for path, leaf in expected.items():
        assert np.asarray(loaded[path]).tobytes() == leaf.tobytes(), path


def test_what_is_saved_as_a_folder_is_merged(run, tmp_path):
    workdir, _ = run
    lmm = dsx.load(workdir)
    ids = np.array([[1, 5, 7, 9, 11, 4]])
    lmm.save_hf(tmp_path / "out")
    merged = dsx.load(tmp_path / "out")
    assert not any(is_adapter(path) for path in flatten(merged.params))
    ours, theirs = lmm.logits(ids), merged.logits(ids)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    plain = dsx.load(lmm.config.train.weights).logits(ids)
    assert np.abs(plain - theirs).max() > 0.01


def test_a_run_with_adapters_is_a_base_for_another(run, weights, tmp_path):
    """As `train.weights`: merged, under the official names."""
    workdir, _ = run
    found = open_start(config_over(weights, start=str(workdir)))
    dsx.load(workdir).save_hf(tmp_path / "out")
    wanted = open_checkpoint(tmp_path / "out").tensors
    assert set(found.tensors) == set(wanted)
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found.tensors[name].read(), tensor.read(), err_msg=name)
    assert set(run_tensors(workdir, ("projector/",))) == {name for name in wanted if "mm_projector" in name}
