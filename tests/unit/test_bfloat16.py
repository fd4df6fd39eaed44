"""Sums over positions are added up in float32 whatever the activations are in, and so are scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deepstack_jax.families.build import build_model
from deepstack_jax.model import layers
from deepstack_jax.model.layers import linear, take_rows
from tests.unit.tiny import example, make_batch, model_params, tiny_config

pytestmark = pytest.mark.quick
TIMES = 3_000  # a sum of so many equal terms stands still in bfloat16, at 256 times the term


def exact(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


@pytest.mark.parametrize("limit", [0, 2**30])
def test_a_row_taken_thousands_of_times_has_its_whole_gradient(limit, monkeypatch):
    """As a scatter and as a product; float32 rows read in bfloat16 have a float32 gradient."""
    monkeypatch.setattr(layers, "ONE_HOT_LIMIT", limit)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(1, 50, 8)), jnp.float32)
    index = jnp.asarray(np.where(np.arange(TIMES) % 50, 3, 7)[None])
    weights = jnp.asarray(rng.normal(1, 0.1, (1, TIMES, 8)), jnp.bfloat16)

    def value(table):
        rows = take_rows(table, index, jnp.bfloat16)
        assert rows.dtype == jnp.bfloat16
        return (rows * weights).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(value))(table)
    expected = np.zeros((50, 8))
    np.add.at(expected, np.asarray(index[0]), exact(weights)[0][0])
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(take_rows(table, index, jnp.bfloat16), np.asarray(table.astype(jnp.bfloat16))[:, index[0]])


@pytest.mark.parametrize(
    ("shape", "features", "inputs"), [((2, TIMES, 8), 6, 1), ((2, TIMES, 8), (3, 2), 1), ((2, TIMES, 4, 2), 6, 2)]
)
def test_kernels_and_biases_have_float32_gradients(shape, features, inputs):
    """Equal to float64's sums of what bfloat16 multiplies; the value and the gradient of the input are bfloat16's."""
    rng = np.random.default_rng(0)
    out = (features,) if isinstance(features, int) else features
    layer = linear(features, ("a",) * (inputs + len(out)), dtype=jnp.bfloat16, name="l", inputs=inputs, bias=True)
    x = jnp.asarray(rng.normal(0.5, 1, shape), jnp.bfloat16)
    weights = jnp.asarray(rng.normal(0.5, 1, (*shape[:2], *out)), jnp.bfloat16)
    params = nn.unbox(layer.init(jax.random.key(0), x))

    def value(params, x):
        y = layer.apply(params, x)
        assert y.dtype == jnp.bfloat16
        return (y * weights).astype(jnp.float32).sum()

    of_params, of_x = jax.jit(jax.grad(value, argnums=(0, 1)))(params, x)
    kernel = params["params"]["kernel"]
    flat_x, flat_w = (array.reshape(2 * TIMES, -1) for array in exact(x, weights))
    expected = flat_x.T @ flat_w
    assert {leaf.dtype for leaf in jax.tree.leaves(of_params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(of_params["params"]["kernel"].reshape(expected.shape), expected, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(of_params["params"]["bias"].reshape(-1), flat_w.sum(0), rtol=1e-5)
    rounded = exact(kernel.astype(jnp.bfloat16))[0].reshape(expected.shape)
    assert of_x.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact(of_x)[0].reshape(2 * TIMES, -1), flat_w @ rounded.T, rtol=2**-7, atol=2**-7)


def test_a_tied_head_has_a_float32_gradient():
    """Of the table that is read by rows and multiplied with; a CPU has no such product of a turned table."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32)
    x = jnp.asarray(rng.normal(0.5, 1, (2, TIMES, 8)), jnp.bfloat16)
    weights = jnp.asarray(rng.normal(0.5, 1, (2, TIMES, 50)), jnp.bfloat16)
    value = jax.jit(jax.value_and_grad(lambda table: (layers.by_rows(x, table) * weights.astype(jnp.float32)).sum()))
    flat_x, flat_w = (array.reshape(2 * TIMES, -1) for array in exact(x, weights))
    np.testing.assert_allclose(value(table)[1], flat_w.T @ flat_x, rtol=1e-4, atol=1e-2)


def test_scores_are_not_rounded_to_bfloat16():
    """They are the float32 sums of products of bfloat16 hidden states and head."""
    config = tiny_config({"train.compute_dtype": "bfloat16", "decoder.vocab_size": 2048})
    model = build_model(config)
    batch = make_batch(config, [[example(config, 0, [])]])
    head = jnp.asarray(np.random.default_rng(0).normal(0, 1, (config.decoder.width, 2048)), jnp.float32)
    params = model_params(model, batch) | {"head": {"kernel": head}}
    hidden = jnp.asarray(np.random.default_rng(1).normal(0, 2, (1, 64, config.decoder.width)), jnp.bfloat16)
    scores = model.apply({"params": params}, hidden, method="logits")
    expected = exact(hidden)[0] @ exact(head.astype(jnp.bfloat16))[0]
    assert scores.dtype == layers.by_rows(hidden, head.T).dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    np.testing.assert_allclose(layers.by_rows(hidden, head.T), expected, atol=1e-4)
    assert (np.abs(exact(scores.astype(jnp.bfloat16))[0] - expected) > 0.01).any(), "rounded ones would not pass"
