"""LoRA: what fresh and trained adapters compute, what a step changes, and which parameters there are."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepstack_jax.config import ConfigError, MeshConfig
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.train.core.optimizer import FROZEN, flatten, unflatten
from deepstack_jax.train.core.program import Program, build_program
from deepstack_jax.train.run.train import describe_adapters
from deepstack_jax.weights.adapters import adapter_paths, is_adapter, merged
from tests.unit.lora import LORA
from tests.unit.tiny import draw_params, example, make_batch, tiny_config

CONFIG = tiny_config(LORA)
HEAD = {"optimizer.table": ((r"^head/kernel$", "adapters"), *LORA["optimizer.table"])}


def program_of(overrides: dict | None = None) -> Program:
    config = tiny_config(LORA | (overrides or {}))
    return build_program(config, make_mesh(MeshConfig(), jax.devices()[:1]), steps=10)


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of(HEAD)


@pytest.fixture(scope="module")
def batch():
    rows = [[example(CONFIG, 0, [(2, 2)])], [example(CONFIG, 1)], [example(CONFIG, 2), example(CONFIG, 3, [(1, 2)])]]
    return jax.tree.map(jnp.asarray, make_batch(CONFIG, rows))


@pytest.fixture(scope="module")
def params(program):
    """Noise for every parameter, those of adapters included."""
    return flatten(draw_params(program.shapes))


def plain(params):
    return {path: leaf for path, leaf in params.items() if not is_adapter(path)}


def logits(program, params, batch):
    def compute(params):
        return program.functions.logits(params, program.functions.hidden(params, batch))

    return np.asarray(jax.jit(compute)(unflatten(params)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_no_logit(program, params, batch, dtype):
    program = program_of(HEAD | {"train.compute_dtype": dtype})
    with_fresh = plain(params) | program.draw_adapters(jax.random.key(0))
    assert logits(program, with_fresh, batch).tobytes() == logits(program, plain(params), batch).tobytes()


@pytest.fixture(scope="module")
def merged_logits(program, params, batch):
    return logits(program, dense(params), batch)


@pytest.mark.parametrize("overrides", [{}, {"decoder.scan": False}])
def test_merged_kernels_give_the_logits_of_their_adapters(params, batch, merged_logits, overrides):
    ours = logits(program_of(HEAD | overrides), params, batch)
    np.testing.assert_allclose(ours, merged_logits, atol=1e-5 * np.abs(merged_logits).max())


def test_without_adapters_the_logits_are_others(program, params, batch, merged_logits):
    assert np.abs(logits(program, plain(params), batch) - merged_logits).max() > 0.1


def dense(params):
    """Merged parameters as arrays."""

    def whole(leaf):
        if isinstance(leaf, jax.Array):
            return leaf
        return jnp.asarray(np.stack([leaf[at] for at in range(leaf.shape[0])]) if len(leaf.shape) > 2 else leaf[...])

    return {path: whole(leaf) for path, leaf in merged(params, CONFIG).items()}


def test_gradients_are_those_of_the_merged_kernel_by_the_chain_rule(program, params, batch):
    """dA = scale * dW B^T and dB = scale * A^T dW, where dW is the gradient of the kernel that holds both."""

    def gradients(params):
        return flatten(jax.jit(jax.grad(lambda tree, batch: program.loss(tree, batch).loss))(unflatten(params), batch))

    ours, whole = gradients(params), gradients(dense(params))
    for path in program.adapted:
        a, b, scale = (np.asarray(params[name], np.float64) for name in adapter_paths(path))
        layered = scale.ndim == 1
        rank = a.shape[-1]
        for layer in range(scale.size):
            at = layer if layered else ...
            kernel = np.asarray(whole[path][at], np.float64).reshape(a[at].size // rank, -1)
            flat_a, flat_b = a[at].reshape(-1, rank), b[at].reshape(rank, -1)
            for name, wanted in (
                (adapter_paths(path)[0], scale[at] * kernel @ flat_b.T),
                (adapter_paths(path)[1], scale[at] * flat_a.T @ kernel),
            ):
                found = np.asarray(ours[name][at]).reshape(wanted.shape)
                np.testing.assert_allclose(found, wanted, atol=2e-5 * max(1, np.abs(wanted).max()), err_msg=f"{name} {layer}")


def test_a_step_moves_adapters_and_what_trains_whole_and_no_byte_of_the_base(program, params, batch):
    fresh = plain(params) | program.draw_adapters(jax.random.key(0))
    state = jax.jit(program.begin)(unflatten(fresh))
    before = {path: np.asarray(leaf) for path, leaf in flatten(state.params).items()}
    step = jax.jit(program.step)
    for _ in range(2):
        state, metrics = step(state, batch)
        assert metrics["good"]
    after = flatten(state.params)
    moved = {path for path, leaf in before.items() if leaf.tobytes() != np.asarray(after[path]).tobytes()}
    trained = {path for path, group in program.groups.items() if group != FROZEN}
    unused = ("vision_tower/layers/block/k/lora_b",)
    assert moved <= trained
    assert not {path for path in trained - moved if path not in unused}
    assert {path for path in after if path.endswith("lora_scale")}.isdisjoint(trained)
    keys = {str(getattr(key, "key", "")) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state) for key in path}
    assert keys & set(before) == trained, "optimizer state of something that does not train, or none of what does"


def test_which_parameters_there_are(program):
    config = program.config
    shapes = flatten(program.shapes)
    a, b, scale = (shapes[path] for path in adapter_paths("layers/layers/block/attention/o/kernel"))
    assert (a.shape, b.shape, scale.shape) == ((5, 4, 8, 4), (5, 4, 32), (5,))
    assert shapes["head/lora_a"].shape == (32, 4)
    assert shapes["head/lora_scale"].shape == ()
    drawn = program.draw_adapters(jax.random.key(0))
    assert {path: leaf.shape for path, leaf in drawn.items()} == {p: leaf.shape for p, leaf in shapes.items() if is_adapter(p)}
    first = drawn["layers/layers/block/mlp/down/lora_a"]
    assert 0.9 * 40**-0.5 < np.abs(first).max() <= 40**-0.5
    assert len({np.asarray(leaf).tobytes() for path, leaf in drawn.items() if path.endswith("lora_a")}) == len(program.adapted)
    assert float(drawn["head/lora_scale"]) == config.lora.scale == 2.0
    assert dataclasses.replace(config.lora, rank=16, rank_stabilised=True).scale == 8 / math.sqrt(16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_stored_in_its_dtype_and_nothing_else_is(dtype):
    program = program_of({"lora.base_dtype": dtype, "train.frozen_dtype": "float32"})
    kinds = {path: leaf.dtype for path, leaf in flatten(program.abstract_state().params).items()}
    for path, kind in kinds.items():
        base = program.groups[path] == FROZEN and not is_adapter(path)
        assert kind == (dtype if base else "float32"), path


def test_what_has_adapters_is_listed_with_counts(program):
    table = describe_adapters(program)
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [row[0] for row in cells] == list(program.adapted)
    assert cells[0] == ("head/kernel", "adapters", "1", f"{32 * 4 + 4 * 61:,}")
    assert ("layers/layers/block/attention/o/kernel", "adapters", "5", f"{5 * 4 * (32 + 32):,}") in cells


def test_a_group_of_adapters_takes_kernels_only():
    with pytest.raises(ConfigError, match=r"sends layers/.*norm/scale.* to 'adapters', a group with lora=True.*/kernel\$"):
        program_of({"optimizer.table": (("^layers/", "adapters"), (".*", "frozen"))})


def test_adapters_train_by_adamw():
    groups = {"default": {"lora": True, "algorithm": "muon"}}
    with pytest.raises(ConfigError, match=r"config.optimizer.groups.default has lora=True with algorithm='muon'"):
        tiny_config({"optimizer.groups": groups})
