"""The training step: one loss over the global batch, whatever the micro-batches, the chunks and the devices."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepstack_jax.batch import empty_batch
from deepstack_jax.config import MeshConfig
from deepstack_jax.errors import ConfigError
from deepstack_jax.families.build import build_model
from deepstack_jax.model import layers
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import param_shardings, replicated, use_mesh
from deepstack_jax.train.core.optimizer import FROZEN, assign_groups, flatten, make_optimizer, matrix_axes
from deepstack_jax.train.core.program import build_program
from deepstack_jax.train.core.state import new_state, state_shardings
from deepstack_jax.train.core.step import ModelFns, make_loss, make_train_step, token_loss
from deepstack_jax.weights.names import NameTable
from tests.unit.tiny import draw_params, example, make_batch, shapes_in, tiny_config

CONFIG = tiny_config(
    {
        "decoder.vocab_size": 62,
        "decoder.remat": "none",
        "vision.layers": 2,
        "data.max_images": 1,
        "optimizer.table": (
            ("vision_tower/(cls|positions)", FROZEN),
            (r"layers/block/(attention/o|mlp/down)/kernel$", "matrices"),
            (".*", "rest"),
        ),
        "optimizer.groups": {
            "matrices": {"algorithm": "muon", "lr": 0.02, "b1": 0.95, "weight_decay": 0.05},
            "rest": {"algorithm": "adamw", "lr": 1e-3, "eps": 1e-4},
        },
    }
)
MODEL = build_model(CONFIG)
AXES = matrix_axes(NameTable(CONFIG).leaves)
FUNCTIONS = ModelFns(
    hidden=lambda params, batch: MODEL.apply({"params": params}, batch).hidden,
    logits=lambda params, hidden: MODEL.apply({"params": params}, hidden, method="logits"),
)


@pytest.fixture(scope="module")
def batch():
    """8 rows with 0 to 6 supervised tokens each; every second row is text only."""
    rows = [[example(CONFIG, row, [(2, 2)] if row % 2 else [], answer=(row * 3) % 7)] for row in range(8)]
    made = make_batch(CONFIG, rows, length=20)
    supervised = made.loss_weights.sum(axis=1)
    assert len(set(supervised.tolist())) > 4
    return made._replace(example_id=made.example_id.astype(np.int32))


@pytest.fixture(scope="module")
def boxed(batch):
    return jax.eval_shape(MODEL.init, jax.random.key(0), batch)["params"]


@pytest.fixture(scope="module")
def groups(boxed):
    return assign_groups(list(flatten(nn.unbox(boxed))), CONFIG.optimizer.table)


@pytest.fixture(scope="module")
def params(boxed):
    return draw_params(boxed)


def first_state(params, groups, optimizer):
    return jax.jit(lambda params: new_state(params, groups, optimizer))(params)


def step_of(groups, optimizer, accumulation=1, chunk=8):
    schedule = optax.constant_schedule(0.5)
    return make_train_step(FUNCTIONS, optimizer, groups, schedule, accumulation=accumulation, chunk=chunk)


@pytest.fixture(scope="module")
def reference(params, batch, groups):
    """One step on one device with the config's own optimizer, without accumulation."""
    optimizer = make_optimizer(CONFIG.optimizer, groups, optax.constant_schedule(1.0), AXES)
    return jax.jit(step_of(groups, optimizer))(first_state(params, groups, optimizer), batch)


@pytest.fixture(scope="module")
def plain_loss(params, batch):
    """The loss written out on full logits, and the share of targets that the argmax hits."""

    @jax.jit
    def run(params):
        logits = FUNCTIONS.logits(params, FUNCTIONS.hidden(params, batch))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets) * batch.loss_weights
        hits = (logits.argmax(-1) == batch.targets) * batch.loss_weights
        total = batch.loss_weights.sum()
        return losses.sum() / total, hits.sum() / total

    return run(params)


def test_loss_equals_optax_on_full_logits(reference, plain_loss, batch):
    _, metrics = reference
    assert float(metrics["loss"]) == pytest.approx(float(plain_loss[0]), abs=1e-5)
    assert float(metrics["token_accuracy"]) == pytest.approx(float(plain_loss[1]), abs=1e-6)
    assert float(metrics["supervised_tokens"]) == batch.loss_weights.sum()
    assert float(metrics["lr_factor"]) == 0.5


@pytest.fixture(scope="module")
def by_signs(params, batch, groups):
    """One step that moves every element by the sign of its gradient, however small that is."""
    optimizer = optax.chain(optax.scale_by_sign(), optax.scale(-0.01))
    return jax.jit(step_of(groups, optimizer))(first_state(params, groups, optimizer), batch)


@pytest.mark.parametrize("step", ["reference", "by_signs"])
def test_frozen_parameters_stay_equal_to_the_byte_and_all_others_move(step, params, groups, request):
    state, _ = request.getfixturevalue(step)
    assert int(state.step) == 1
    before, after = flatten(params), flatten(state.params)
    # post_norm is part of the checkpoint only: no feature is taken after it.
    for path, group in groups.items():
        same = np.asarray(before[path]).tobytes() == np.asarray(after[path]).tobytes()
        idle = path.startswith("vision_tower/post_norm")
        if step == "reference" and path.endswith("/k/bias"):
            # It adds the same to all scores of a query, which softmax does not see: its gradient is rounding, Adam's step less
            # than the parameter can show. That it trains is seen in the other step.
            np.testing.assert_allclose(after[path], before[path], rtol=0, atol=1e-6, err_msg=path)
        else:
            assert same == (group == FROZEN or idle), path
    assert {path for path, group in groups.items() if group == FROZEN} == {"vision_tower/cls", "vision_tower/positions"}


def test_only_trainable_parameters_have_a_gradient(params, batch, groups):
    seen = {}

    def spy(updates, state, params=None):
        seen.update(jax.tree.map(jnp.shape, {"gradients": updates, "params": params}))
        return updates, state

    optimizer = optax.GradientTransformation(lambda params: (), spy)
    state = jax.eval_shape(step_of(groups, optimizer), new_state(params, groups, optimizer), batch)[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, params)
    trainable = {path: leaf.shape for path, leaf in flatten(params).items() if groups[path] != FROZEN}
    assert seen["gradients"] == seen["params"] == trainable


def test_a_frozen_leaf_need_not_be_differentiable(params, batch, groups):
    """Integers have no gradient: the step would raise if it differentiated a frozen parameter."""
    whole = jax.tree.map(lambda leaf: leaf, params)
    whole["vision_tower"]["positions"] = jnp.round(whole["vision_tower"]["positions"]).astype(jnp.int32)
    step = step_of(groups, optax.sgd(0.1), accumulation=2)
    state = first_state(whole, groups, optax.sgd(0.1)).replace(params=whole)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(step, state, batch)[0].params, whole)
    with pytest.raises(TypeError, match="int32"):
        jax.eval_shape(jax.grad(lambda params: make_loss(FUNCTIONS, 8)(params, batch).loss), whole)


TOY = ModelFns(
    hidden=lambda params, batch: (
        params["embed"][batch.tokens + batch.positions]
        * params["frozen"]
        * (batch.pixels / 255).mean(axis=(1, 2, 3, 4))[:, None, None]
    ),
    logits=lambda params, hidden: hidden @ params["head"],
)
TOY_GROUPS = {"embed": "g", "head": "g", "frozen": FROZEN}


@pytest.fixture(scope="module")
def descent():
    """Gradient descent on a toy: (batch, accumulation) -> parameters before and after, and metrics.

    Not Adam, whose first step is the sign of the gradient: it would blow rounding up to a whole step.
    """
    rng = np.random.default_rng(0)
    sizes = {"embed": (90, 5), "head": (5, 62), "frozen": (5,)}
    params = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}
    optimizer, schedule = optax.sgd(0.5), optax.constant_schedule(1.0)

    def run(batch, accumulation):
        step = make_train_step(TOY, optimizer, TOY_GROUPS, schedule, accumulation=accumulation, chunk=8)
        state, metrics = jax.jit(step)(first_state(params, TOY_GROUPS, optimizer), batch)
        return params, state.params, metrics

    return run


@pytest.mark.quick
def test_accumulation_changes_nothing(batch, descent):
    """Micro-batches hold unequal numbers of supervised tokens: a mean of their means would differ."""
    per_row = batch.loss_weights.sum(axis=1)
    assert per_row[0::2].sum() != per_row[1::2].sum()
    (before, whole, metrics), *others = (descent(batch, n) for n in (1, 2, 4))
    assert np.abs(before["embed"] - whole["embed"]).max() > 1e-3
    for _, params, numbers in others:
        chex.assert_trees_all_close(params, whole, atol=1e-6)
        chex.assert_trees_all_close(numbers, metrics, rtol=1e-6, atol=1e-6)


def test_a_batch_without_a_supervised_token_changes_nothing(descent):
    blank = empty_batch(CONFIG.data_spec.batch_shape(8, 20))
    before, after, metrics = descent(blank._replace(example_id=blank.example_id.astype(np.int32)), 1)
    chex.assert_trees_all_equal(after, before)
    assert float(metrics["loss"]) == float(metrics["supervised_tokens"]) == 0.0


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(params, batch, groups):
    """Good, bad, bad, good: the state after it equals, to the byte, that after two good ones; only the counters tell."""
    optimizer = make_optimizer(CONFIG.optimizer, groups, optax.constant_schedule(1.0), AXES)
    step = jax.jit(step_of(groups, optimizer))
    poisoned = batch._replace(loss_weights=batch.loss_weights.copy())
    poisoned.loss_weights[3, np.flatnonzero(batch.loss_weights[3])[0]] = np.nan

    def run(batches):
        state, seen = first_state(params, groups, optimizer), []
        for one in batches:
            state, metrics = step(state, one)
            seen.append((bool(metrics["good"]), int(metrics["bad_steps"]), int(metrics["bad_in_a_row"])))
        return state, seen

    state, seen = run([batch, poisoned, poisoned, batch])
    assert seen == [(True, 0, 0), (False, 1, 1), (False, 2, 2), (True, 2, 0)]
    expected, _ = run([batch, batch])
    assert (int(state.step), int(expected.step)) == (4, 2)
    chex.assert_trees_all_equal((state.params, state.opt_state), (expected.params, expected.opt_state))


def test_frozen_parameters_cost_neither_optimizer_state_nor_gradients_in_the_compiled_program(boxed, batch):
    """All of the tower and the decoder frozen, as in stage 1: the program's own account of its memory, not the tree's."""

    def compiled(table, frozen_dtype):
        config = dataclasses.replace(
            CONFIG,
            optimizer=dataclasses.replace(CONFIG.optimizer, table=table),
            train=dataclasses.replace(CONFIG.train, frozen_dtype=frozen_dtype),
        )
        program = build_program(config, make_mesh(MeshConfig(), jax.devices()[:1]), steps=10)
        lowered = program.jit_step().lower(program.abstract_state(), program.abstract_batch(8, 20))
        return program, lowered.compile().memory_analysis()

    every, all_memory = compiled(((".*", "rest"),), "float32")
    stage1 = (("^projector/", "rest"), (".*", FROZEN))
    program, memory = compiled(stage1, "float32")
    _, half = compiled(stage1, "bfloat16")
    total, trainable = (
        4 * sum(sizes.values()) for sizes in (every.sizes, {k: v for k, v in program.sizes.items() if "proj" in k})
    )
    assert total > 8 * trainable
    saved = all_memory.argument_size_in_bytes - memory.argument_size_in_bytes
    assert saved == pytest.approx(2 * (total - trainable), rel=0.01), "two moments of every frozen parameter"
    assert memory.argument_size_in_bytes - half.argument_size_in_bytes == pytest.approx((total - trainable) / 2, rel=0.01)
    for one, counted in ((every, all_memory), (program, memory)):
        state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one.abstract_state()))
        assert counted.alias_size_in_bytes == state, "every buffer of the state becomes one of the next"
    assert all_memory.temp_size_in_bytes - memory.temp_size_in_bytes > 0.7 * (total - trainable), "their gradients"


def test_first_moments_in_bfloat16(boxed, params, batch, groups):
    config = dataclasses.replace(
        CONFIG.optimizer,
        groups={name: dataclasses.replace(group, moment_dtype="bfloat16") for name, group in CONFIG.optimizer.groups.items()},
    )
    optimizer = make_optimizer(config, groups, optax.constant_schedule(1.0), AXES)
    state = jax.eval_shape(step_of(groups, optimizer), first_state(params, groups, optimizer), batch)[0]
    dtypes = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    first = [dtype for path, dtype in dtypes.items() if ".mu" in path]
    assert first
    assert set(first) == {jnp.dtype("bfloat16")}
    assert {dtype for path, dtype in dtypes.items() if ".nu" in path} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


B, T, D, V = 3, 10, 6, 17


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, D), (D, V)))
    weights = jnp.asarray(rng.integers(0, 2, (B, T)) * rng.uniform(0.5, 2, (B, T)), jnp.float32)
    return hidden, kernel, jnp.asarray(rng.integers(0, V, (B, T))), weights


def chunked(chunk):
    def loss(hidden, kernel, targets, weights):
        sums = token_loss(lambda kernel, h: h @ kernel, kernel, hidden, targets, weights, chunk)
        return sums.loss, sums

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


@pytest.mark.quick
@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
def test_chunk_size_changes_neither_loss_nor_gradient(head, chunk):
    hidden, kernel, targets, weights = head

    @jax.jit
    def full(hidden, kernel):
        return (optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, targets) * weights).sum()

    (loss, sums), gradients = jax.jit(chunked(chunk))(*head)
    expected, expected_gradients = jax.value_and_grad(full, argnums=(0, 1))(hidden, kernel)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    chex.assert_trees_all_close(gradients, expected_gradients, atol=1e-5)
    assert float(sums.weight) == pytest.approx(float(weights.sum()), rel=1e-6)
    hits = ((hidden @ kernel).argmax(-1) == targets) * weights
    assert float(sums.correct) == pytest.approx(float(hits.sum()), rel=1e-6)


@pytest.mark.parametrize("alone", [0, 1], ids=["frozen head", "head only"])
def test_what_needs_no_gradient_costs_no_product(head, alone):
    """The other's gradient is the same, times what the loss is multiplied by, and one product of three is not made."""

    def loss(*args):
        return 3 * token_loss(lambda kernel, h: h @ kernel, args[1], args[0], *head[2:], 4).loss

    def products(argnums):
        return str(jax.make_jaxpr(jax.grad(loss, argnums))(*head[:2])).count("dot_general")

    expected = jax.jit(chunked(4))(*head)[1][alone]
    chex.assert_trees_all_close(jax.jit(jax.grad(loss, alone))(*head[:2]), 3 * expected, rtol=1e-6)
    assert (products((0, 1)), products(alone)) == (3, 2)


@pytest.mark.quick
def test_full_logits_never_exist_in_training(head):
    """Neither at once nor stacked over the chunks for the backward pass."""

    def largest(chunk):
        shapes = [shape for shape in shapes_in(jax.make_jaxpr(chunked(chunk))(*head)) if shape and shape[-1] == V]
        return max(int(np.prod(shape)) for shape in shapes)

    assert largest(4) == B * 4 * V
    assert largest(T) == B * T * V, "the check finds full logits where there are some"


def test_full_logits_never_exist_in_the_step(params, batch, groups, monkeypatch):
    """The same in the whole program; vocabulary 62 is the size of nothing else.

    The embedding's gradient is a scatter here, as with every real vocabulary: its one-hot matrix would be as large.
    """
    monkeypatch.setattr(layers, "ONE_HOT_LIMIT", 0)
    step = step_of(groups, optax.sgd(0.1), chunk=4)
    jaxpr = jax.make_jaxpr(step)(first_state(params, groups, optax.sgd(0.1)), batch)
    with_words = [shape for shape in shapes_in(jaxpr) if len(shape) > 2 and 62 in shape]
    assert (8, 4, 62) in with_words
    assert max(int(np.prod(shape)) for shape in with_words) == 8 * 4 * 62


@pytest.mark.parametrize(
    ("sizes", "accumulation", "part"),
    [((8, 1, 1), 1, (5, 32, 40)), ((1, 8, 1), 1, (5, 4, 40)), ((2, 2, 2), 2, (5, 16, 20))],
    ids=["data8", "fsdp8", "2x2x2"],
)
def test_sharded_step_equals_one_device(sizes, accumulation, part, boxed, params, batch, groups, reference):
    """`part` is what one device holds of a (5, 32, 40) kernel; the last mesh also takes its batch in two halves."""
    mesh = make_mesh(MeshConfig(*sizes))
    assert mesh.size == 8
    optimizer = make_optimizer(CONFIG.optimizer, groups, optax.constant_schedule(1.0), AXES)
    shapes = nn.unbox(boxed)
    shardings = state_shardings(mesh, param_shardings(mesh, boxed), shapes, groups, optimizer)
    state = jax.device_put(first_state(params, groups, optimizer), shardings)
    with use_mesh(mesh):
        sharded, metrics = jax.jit(step_of(groups, optimizer, accumulation), out_shardings=(shardings, replicated(mesh)))(
            state, put_batch(mesh, batch)
        )
    wide = sharded.params["layers"]["layers"]["block"]["mlp"]["gate"]["kernel"]
    assert wide.sharding.shard_shape(wide.shape) == part
    one, one_metrics = reference
    chex.assert_trees_all_close(jax.device_get(metrics), jax.device_get(one_metrics), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(sharded), jax.device_get(one), atol=1e-5)


@pytest.mark.quick
def test_parameters_that_do_not_divide_are_named(boxed):
    """62 words do not split over 4 devices."""
    with pytest.raises(ConfigError, match=r"embed/embedding \(62, 32\) over .*; choose smaller config\.mesh"):
        param_shardings(make_mesh(MeshConfig(2, 1, 4)), boxed)
