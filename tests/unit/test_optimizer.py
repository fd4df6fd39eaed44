"""Which parameter is updated how: the table, Muon's matrices, AdamW against optax, the schedules, and what is frozen."""

import dataclasses
import importlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from optax.contrib import MuonDimensionNumbers

from deepstack_jax.batch import empty_batch
from deepstack_jax.config import OptimizerConfig, OptimizerGroup, ScheduleConfig, build_config
from deepstack_jax.errors import ConfigError
from deepstack_jax.families.build import build_model
from deepstack_jax.train.core.optimizer import (
    FROZEN,
    assign_groups,
    describe_groups,
    flatten,
    make_optimizer,
    make_schedule,
    matrix_axes,
    unflatten,
)
from deepstack_jax.weights.names import NameTable
from tests.unit.tiny import example, make_batch, tiny_config

pytestmark = pytest.mark.quick

PATHS = ["embed/embedding", "head/kernel", "projector/fc1/bias", "projector/fc1/kernel", "vision_tower/cls"]


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert flatten(tree) == {"a/b/c": 1, "a/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree


def test_first_match_wins():
    table = (("head", "a"), ("kernel$", "b"), (".*", "c"))
    assert assign_groups(PATHS, table) == dict(zip(PATHS, ["c", "a", "c", "b", "c"], strict=True))
    assert assign_groups(PATHS, (("^projector/", "p"), ("", "rest")))["projector/fc1/bias"] == "p"


def test_a_parameter_left_over_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="covers no group for embed/embedding, vision_tower/cls; add a row"):
        assign_groups(PATHS, (("head|projector", "a"),))


@pytest.mark.parametrize("table", [(("hed", "frozen"), (".*", "a")), ((".*", "a"), ("head", "frozen"))])
def test_a_row_that_matches_nothing_is_an_error(table):
    """A misspelt row, or one after a row that takes everything."""
    idle = next(pattern for pattern, _ in table if pattern != ".*")
    with pytest.raises(ConfigError, match=rf"rows \['{idle}'\] match no parameter; parameters are e\.g\. embed/embedding"):
        assign_groups(PATHS, table)


@pytest.fixture(scope="module")
def demo():
    """The demo's config, abstract flat parameters and groups."""
    config = build_config(importlib.import_module("configs.demo").get_config())
    batch = empty_batch(config.data_spec.batch_shape(1, config.data.max_length))
    shapes = flatten(nn.unbox(jax.eval_shape(build_model(config).init, jax.random.key(0), batch)["params"]))
    return config, shapes, assign_groups(list(shapes), config.optimizer.table)


def algorithms(config, groups):
    return {path: config.optimizer.groups[group].algorithm for path, group in groups.items()}


def test_demo_sends_every_kernel_but_the_head_to_muon(demo):
    config, shapes, groups = demo
    chosen = algorithms(config, groups)
    kernels = {path for path in shapes if path.endswith("/kernel")}
    assert len(kernels) == 1 + 6 + 7 + 2 + 1
    assert {path for path in shapes if chosen[path] == "muon"} == kernels - {"head/kernel"}
    assert set(chosen.values()) == {"muon", "adamw"}
    for path in ("embed/embedding", "head/kernel", "vision_tower/positions", "layers/norm/scale", "projector/fc1/bias"):
        assert chosen[path] == "adamw"


# What a kernel multiplies from and to, read off the model's einsums: (inputs, outputs), the layer axis in neither.
MATRICES = {
    "vision_tower/patch_embed/kernel": ((0,), (1,)),
    "projector/fc1/kernel": ((0,), (1,)),
    "projector/fc2/kernel": ((0,), (1,)),
    **{f"layers/layers/block/attention/{name}/kernel": ((1,), (2, 3)) for name in "qkv"},
    "layers/layers/block/attention/o/kernel": ((1, 2), (3,)),
    **{f"layers/layers/block/mlp/{name}/kernel": ((1,), (2,)) for name in ("gate", "up", "down")},
    **{f"vision_tower/layers/block/{name}/kernel": ((1,), (2, 3)) for name in "qkv"},
    "vision_tower/layers/block/o/kernel": ((1, 2), (3,)),
    **{f"vision_tower/layers/block/{name}/kernel": ((1,), (2,)) for name in ("fc1", "fc2")},
}


MUON = {path: MuonDimensionNumbers(*sides) for path, sides in MATRICES.items()}


def test_muon_knows_inputs_and_outputs_of_every_kernel(demo):
    config, _, groups = demo
    chosen = algorithms(config, groups)
    ours = matrix_axes(NameTable(config).leaves)
    assert {path: axes for path, axes in ours.items() if chosen[path] == "muon"} == MUON
    assert ours.keys() - MUON.keys() == {"head/kernel"}


def test_muon_refuses_what_is_no_matrix(demo):
    axes = matrix_axes(NameTable(demo[0]).leaves)
    config = OptimizerConfig(groups={"all": OptimizerGroup("muon")})
    for path in demo[1].keys() - axes.keys():
        with pytest.raises(ConfigError, match=f"{path} to a Muon group, but it is not a matrix; send it to an adamw group"):
            make_optimizer(config, dict.fromkeys(["head/kernel", path], "all"), optax.constant_schedule(1.0), axes)


def one_update(group: OptimizerGroup, gradients: Any, params: Any = None, steps: int = 1) -> Any:
    """The last of `steps` updates of one group under a constant schedule, jitted as in a run."""
    groups = dict.fromkeys(gradients, "g")
    optimizer = make_optimizer(OptimizerConfig(groups={"g": group}, clip_norm=1e9), groups, optax.constant_schedule(1.0), MUON)
    params = params or jax.tree.map(jnp.zeros_like, gradients)

    @jax.jit
    def run(gradients, params):
        state = optimizer.init(params)
        updates = gradients
        for _ in range(steps):
            updates, state = optimizer.update(gradients, state, params)
        return updates

    return jax.device_get(run(gradients, params))


def well_conditioned(rng, rows, cols):
    """A matrix whose singular values lie between 0.3 and 1."""
    left, _, right = np.linalg.svd(rng.normal(size=(rows, cols)), full_matrices=False)
    return left * rng.uniform(0.3, 1, min(rows, cols)) @ right


def test_muon_orthogonalises_each_layer_by_itself():
    rng = np.random.default_rng(0)
    shapes = {
        "layers/layers/block/attention/q/kernel": (3, 24, 4, 8),
        "layers/layers/block/attention/o/kernel": (3, 4, 8, 24),
        "layers/layers/block/mlp/down/kernel": (3, 40, 24),
        "vision_tower/layers/block/o/kernel": (2, 2, 8, 16),
        "projector/fc1/kernel": (16, 24),
    }
    gradients = {}
    for path, shape in shapes.items():
        stacked, (inputs, outputs) = "block" in path, MATRICES[path]
        sides = [int(np.prod([shape[axis] for axis in axes])) for axes in (inputs, outputs)]
        layers = [10.0**layer * well_conditioned(rng, *sides) for layer in range(shape[0] if stacked else 1)]
        gradients[path] = jnp.asarray(np.stack(layers).reshape(shape), jnp.float32)
    updates = one_update(OptimizerGroup("muon", lr=1.0, b1=0.95), gradients)
    for path, shape in shapes.items():
        rows = int(np.prod([shape[axis] for axis in MATRICES[path][0]]))
        layers = updates[path].reshape(-1, rows, updates[path].size // (rows * (shape[0] if "block" in path else 1)))
        assert len(layers) == (shape[0] if "block" in path else 1)
        scales = []
        for matrix, gradient in zip(layers, np.asarray(gradients[path]).reshape(layers.shape), strict=True):
            values = np.linalg.svd(matrix, compute_uv=False)
            middle = np.median(values)
            assert (values > 0.5 * middle).all(), path
            assert (values < 1.5 * middle).all(), path
            assert (matrix * gradient).sum() < 0, "the update goes downhill"
            scales.append(middle)
        np.testing.assert_allclose(scales, scales[0], rtol=0.25, err_msg=f"{path}: a layer's gradient scale must not matter")


def test_wrong_axes_would_not_pass_as_orthogonal(monkeypatch):
    """The check above can fail: with `o` taken as (heads | head_dim, width) its layers are not orthogonal."""
    monkeypatch.setitem(MUON, "layers/layers/block/attention/o/kernel", MuonDimensionNumbers((1,), (2, 3)))
    with pytest.raises(AssertionError):
        test_muon_orthogonalises_each_layer_by_itself()


def drift(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a/kernel": (5, 7), "b/bias": (7,), "c/scale": (3,)}
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}


def test_adamw_group_equals_optax_alone():
    params, gradients = drift(0), drift(1)
    group = OptimizerGroup("adamw", lr=0.03, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1)
    ours = one_update(group, gradients, params, steps=3)
    optimizer = optax.adamw(0.03, 0.8, 0.9, 1e-6, weight_decay=0.1)
    updates, state = gradients, optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(gradients, state, params)
    chex.assert_trees_all_close(ours, updates, rtol=1e-5, atol=1e-8)


def test_groups_do_not_see_each_other_but_share_the_schedule_and_the_clip():
    params, gradients = drift(0), drift(1)
    fast, slow = OptimizerGroup("adamw", lr=0.1), OptimizerGroup("adamw", lr=0.001, weight_decay=0.5)
    groups = {"a/kernel": "fast", "b/bias": "slow", "c/scale": "slow"}
    config = OptimizerConfig(groups={"fast": fast, "slow": slow}, clip_norm=1e9)
    optimizer = make_optimizer(config, groups, lambda step: 0.25)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    alone_fast = one_update(dataclasses.replace(fast, lr=0.025), {"a/kernel": gradients["a/kernel"]})
    slow_part = [{path: tree[path] for path in ("b/bias", "c/scale")} for tree in (gradients, params)]
    alone_slow = one_update(dataclasses.replace(slow, lr=0.00025), slow_part[0], slow_part[1])
    chex.assert_trees_all_close(updates, alone_fast | alone_slow, rtol=1e-5, atol=1e-8)


def test_clip_is_by_the_norm_over_all_groups():
    gradients = {"a/kernel": jnp.full((1, 1), 3.0), "b/kernel": jnp.full((1, 1), 4.0)}
    config = OptimizerConfig(groups={name: OptimizerGroup("adamw", lr=1.0, b1=0.0, eps=1e3) for name in "ab"}, clip_norm=1.0)
    optimizer = make_optimizer(config, {"a/kernel": "a", "b/kernel": "b"}, optax.constant_schedule(1.0))
    updates: Any = optimizer.update(gradients, optimizer.init(gradients), gradients)[0]
    # eps drowns Adam's own normalisation, so that the update shows the clipped gradient: 0.6 and 0.8.
    clipped = {path: -float(update[0, 0]) * 1e3 for path, update in updates.items()}
    assert clipped == pytest.approx({"a/kernel": 0.6, "b/kernel": 0.8}, rel=2e-3)


def test_freezing_everything_is_an_error():
    with pytest.raises(ConfigError, match="freezes every parameter"):
        make_optimizer(OptimizerConfig(), dict.fromkeys(PATHS, FROZEN), optax.constant_schedule(1.0))


def test_frozen_parameters_have_no_optimizer_state():
    config = tiny_config({"optimizer.table": (("vision_tower|embed", FROZEN), (".*", "default"))})
    model = build_model(config)
    batch = make_batch(config, [[example(config, 0, [(2, 2)])]])
    shapes = flatten(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"]))
    groups = assign_groups(list(shapes), config.optimizer.table)
    trainable = {path: leaf for path, leaf in shapes.items() if groups[path] != FROZEN}
    assert 0 < len(trainable) < len(shapes)
    optimizer = make_optimizer(config.optimizer, groups, optax.constant_schedule(1.0))
    state = jax.eval_shape(optimizer.init, trainable)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in trainable.values())
    owners = {key.key for path, _ in jax.tree_util.tree_leaves_with_path(state) for key in path if hasattr(key, "key")}
    assert owners & set(shapes) == set(trainable)


def factors(config, steps):
    schedule: Any = make_schedule(config, steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_cosine_schedule():
    """Linear from 0 over the warmup, then half a cosine to `final`: the curve of the official recipe."""
    values = factors(ScheduleConfig("cosine", warmup=0.1, final=0.0), 100)
    np.testing.assert_allclose(values[:11], np.arange(11) / 10, atol=1e-6)
    expected = 0.5 * (1 + np.cos(np.pi * np.arange(91) / 90))
    np.testing.assert_allclose(values[10:], expected, atol=1e-6)
    ending = factors(ScheduleConfig("cosine", warmup=0.1, final=0.2), 100)
    assert ending[10] == pytest.approx(1.0)
    assert ending[-1] == pytest.approx(0.2)


def test_linear_tail_schedule():
    values = factors(ScheduleConfig("linear_tail", warmup=0.1, final=0.02, tail=0.25), 100)
    assert values[0] == pytest.approx(1 / 11), "the first step is not wasted"
    assert (np.diff(values[:11]) > 0).all()
    np.testing.assert_allclose(values[10:76], 1.0, atol=1e-6)
    np.testing.assert_allclose(values[75:], 1 - 0.98 * np.arange(26) / 25, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear_tail"])
def test_without_warmup_a_schedule_begins_at_the_top(kind):
    assert factors(ScheduleConfig(kind, warmup=0.0), 100)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["cosine", "linear_tail"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
def test_every_run_has_a_schedule_between_0_and_1_that_trains(kind, steps, warmup):
    values = factors(ScheduleConfig(kind, warmup=warmup), steps)
    assert np.isfinite(values).all()
    assert (values >= 0).all()
    assert (values <= 1 + 1e-6).all()
    assert values[:steps].max() > 0, "no step of the run would change anything"


def test_describe_groups_counts_everything():
    config = OptimizerConfig(groups={"a": OptimizerGroup("muon", lr=0.02), "b": OptimizerGroup("adamw", lr=1e-5)})
    groups = {"x": "a", "y": "b", "z": "b", "w": FROZEN}
    rows = describe_groups(config, groups, {"x": 10, "y": 1, "z": 2, "w": 100})
    assert rows == [("a", "muon", "0.02", 1, 10), ("b", "adamw", "1e-05", 2, 3), (FROZEN, "-", "-", 1, 100)]
