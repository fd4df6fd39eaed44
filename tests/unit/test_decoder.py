"""The decoder alone: injection and its gradient, scan against loop, remat, program size, what the backward pass saves."""

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepstack_jax.config import DecoderConfig, RopeConfig
from deepstack_jax.layout.stack import layer_schedule
from deepstack_jax.model import decoder as decoder_module
from deepstack_jax.model.attention import (
    Rotary,
    causal_segment_mask,
    dot_product,
    rotary_angles,
    rotary_table,
    rotate,
)
from deepstack_jax.model.decoder import Decoder, InjectedBlock, LayerCall
from deepstack_jax.model.merge import inject, invert_visual_index, merge, spread
from tests.unit.tiny import draw_params, shapes_in

# All sizes differ, so that a shape names its axes. L is free: see `decoder_of`.
J, B, T, M, D = 3, 2, 11, 5, 24
TINY = DecoderConfig(vocab_size=7, width=D, layers=7, heads=6, kv_heads=2, head_dim=4, mlp=40, remat="none")


def decoder_of(layers=7, start=1, attend=dot_product, **settings):
    config = dataclasses.replace(TINY, layers=layers, **settings)
    return Decoder(config, layer_schedule(layers, J, start, 1), attend, jnp.dtype(jnp.float32))


@pytest.fixture(scope="module")
def inputs():
    """x, rotary, mask, stack, index: row 0 holds tokens 2..6, row 1 three of five, out of order."""
    rng = np.random.default_rng(0)
    index = np.full((B, T), -1, np.int32)
    index[0, 2:7] = range(M)
    index[1, [8, 1, 4]] = [0, 3, 4]
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    rotary = rotary_angles(rotary_table(TINY.rope, TINY.head_dim, T), positions, positions)
    mask = causal_segment_mask(jnp.ones((B, T), jnp.int32), positions)
    x, stack = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, D), (J, B, M, D)))
    return x, rotary, mask, stack, invert_visual_index(jnp.asarray(index), M)


@pytest.fixture(scope="module")
def params(inputs):
    return draw_params(jax.eval_shape(decoder_of().init, jax.random.key(0), *inputs))


def objective(decoder, inputs):
    """(params, x, stack) -> a number that every output feeds."""
    _, rotary, mask, _, index = inputs
    weights = np.random.default_rng(2).normal(size=(B, T, D)).astype(np.float32)
    return lambda params, x, stack: (decoder.apply(params, x, rotary, mask, stack, index).hidden * weights).sum()


def plain_spread(tokens, index):
    """What `spread` means, by a dense product that autodiff transposes on its own."""
    return jnp.einsum("btm,bmd->btd", jax.nn.one_hot(index, tokens.shape[1], dtype=tokens.dtype), tokens)


@st.composite
def placements(draw):
    """i32[B, T] with each of the M tokens at one position at most, the rest of the positions text."""
    rows = []
    for _ in range(B):
        order = draw(st.permutations([*range(M), *[-1] * (T - M)]))
        rows.append([m if draw(st.booleans()) else -1 for m in order])
    return np.array(rows, np.int32)


@jax.jit
def invert(index):
    return invert_visual_index(index, M).positions


@jax.jit
def both_spreads(tokens, index, cotangent):
    ours, ours_back = jax.vjp(lambda tokens: spread(tokens, invert_visual_index(index, M)), tokens)
    plain, plain_back = jax.vjp(lambda tokens: plain_spread(tokens, index), tokens)
    return (ours, *ours_back(cotangent)), (plain, *plain_back(cotangent))


@pytest.mark.quick
@settings(deadline=None)
@given(placements(), st.integers(0, 2**16))
def test_spread_and_its_gradient_equal_a_plain_gather(index, seed):
    rng = np.random.default_rng(seed)
    ours, plain = both_spreads(rng.normal(size=(B, M, D)), index, rng.normal(size=(B, T, D)))
    chex.assert_shape(ours, [(B, T, D), (B, M, D)])
    chex.assert_trees_all_close(ours, plain, atol=1e-6)


@pytest.mark.quick
@settings(deadline=None)
@given(placements())
def test_placement_is_the_inverse_of_visual_index(index):
    position = np.asarray(invert(index))
    for row in range(B):
        for token in range(M):
            where = np.flatnonzero(index[row] == token)
            assert position[row, token] == (where[0] if where.size else -1)


@pytest.mark.quick
def test_merge_replaces_and_inject_adds(inputs):
    x, _, _, stack, index = inputs
    visual = stack[0]
    stands = np.asarray(index.tokens >= 0)[..., None]
    dense = plain_spread(visual, index.tokens)
    chex.assert_trees_all_close(merge(x, visual, index), jnp.where(stands, dense, x), atol=1e-6)
    for group in range(J):
        expected = x + plain_spread(stack[group], index.tokens)
        chex.assert_trees_all_close(inject(x, stack, jnp.asarray(group), index), expected, atol=1e-6)
    chex.assert_trees_all_equal(inject(x, stack, jnp.asarray(-1), index), x)


with_and_without_jit: Any = chex.variants(with_jit=True, without_jit=True)


class Variants(chex.TestCase):
    variant: Any  # set by chex, once for each variant

    @with_and_without_jit
    def test_causal_segment_mask(self):
        segments = np.array([[1, 1, 2, 2, 0], [0, 1, 1, 1, 1]])
        mask = self.variant(causal_segment_mask)(segments, np.broadcast_to(np.arange(5), (2, 5)))
        chex.assert_shape(mask, (2, 1, 5, 5))
        for row in range(2):
            for t in range(5):
                for s in range(5):
                    assert mask[row, 0, t, s] == (s <= t and segments[row, s] == segments[row, t])

    @with_and_without_jit
    def test_rotary_turns_pairs_and_sees_distances_only(self):
        x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
        at = self.variant(lambda positions: rotate(x, rotary_angles(rotary_table(RopeConfig(), 8, 64), positions, positions)))
        zero, near, far = (at(jnp.arange(4)[None] + shift) for shift in (0, 3, 40))
        chex.assert_trees_all_close(zero[:, 0], x[:, 0], atol=1e-6)
        chex.assert_trees_all_close(jnp.linalg.norm(far, axis=-1), jnp.linalg.norm(x, axis=-1), atol=1e-5)
        angles = 2 * 1e4 ** -(np.arange(4) / 4)
        pairs = np.asarray(x[0, 2, :, :4] + 1j * x[0, 2, :, 4:]) * np.exp(1j * angles)
        np.testing.assert_allclose(zero[0, 2], np.concatenate([np.real(pairs), np.imag(pairs)], -1), atol=1e-5)
        scores = [jnp.einsum("btnh,bsnh->bnts", y, y) for y in (near, far)]
        chex.assert_trees_all_close(*scores, atol=1e-4)


@pytest.mark.quick
def test_layer_inputs_hold_the_injection(inputs, params):
    """Layer by layer against a Python loop over the single blocks, with the schedule read from its definition."""
    x, rotary, mask, stack, index = inputs
    decoder = dataclasses.replace(decoder_of(start=2), keep_inputs=True)
    output = jax.jit(decoder.apply)(params, *inputs)
    block = InjectedBlock(TINY, dot_product, jnp.dtype(jnp.float32))

    @jax.jit
    def run_block(params, x):
        call = LayerCall(x, None, jnp.asarray(-1), jnp.asarray(0), None, None, None, rotary, mask)
        return block.apply({"params": params}, call)[0]

    chex.assert_shape(output.layer_inputs, (TINY.layers, B, T, D))
    for layer in range(TINY.layers):
        if 2 <= layer < 2 + J:
            x = x + plain_spread(stack[layer - 2], index.tokens)
        chex.assert_trees_all_close(output.layer_inputs[layer], x, atol=1e-5)
        layer_params = jax.tree.map(lambda leaf: leaf[layer], params["params"]["layers"]["block"])  # noqa: B023
        x = run_block(layer_params, x)
    scale = params["params"]["norm"]["scale"]
    chex.assert_trees_all_close(output.hidden, x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale, atol=1e-5)


def test_scan_loop_and_remat_agree_in_values_and_gradients(inputs, params):
    three = {"params": params["params"] | {"layers": jax.tree.map(lambda leaf: leaf[:3], params["params"]["layers"])}}

    def value_and_gradients(**settings):
        function = jax.value_and_grad(objective(decoder_of(3, **settings), inputs), argnums=(0, 1, 2))
        return jax.jit(function)(three, inputs[0], inputs[3])

    scanned = value_and_gradients()
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(scanned))
    chex.assert_trees_all_close(value_and_gradients(scan=False), scanned, rtol=1e-4, atol=1e-4)
    for remat in decoder_module.REMAT:
        chex.assert_trees_all_close(value_and_gradients(remat=remat), scanned, rtol=1e-4, atol=1e-4)


def test_unrolled_program_really_is_unrolled(inputs, params):
    """Or the comparison of scan with loop would compare the scan with itself."""
    functions = [jax.jit(objective(decoder_of(scan=scan), inputs)) for scan in (True, False)]
    loops = [function.lower(params, inputs[0], inputs[3]).as_text().count("stablehlo.while") for function in functions]
    assert loops == [1, 0]


@pytest.mark.parametrize("remat", ["none", "block"])
def test_program_does_not_grow_with_depth(inputs, remat):
    calls = []

    def counting(q, k, v, mask):
        calls.append(q.shape)
        return dot_product(q, k, v, mask)

    def program(layers):
        decoder = decoder_of(layers, attend=counting, remat=remat)
        shapes = nn.unbox(jax.eval_shape(decoder.init, jax.random.key(0), *inputs))
        calls.clear()
        text = jax.jit(jax.grad(objective(decoder, inputs))).lower(shapes, inputs[0], inputs[3]).as_text()
        return len(text), len(calls)

    (short, traces), (long, traces_long) = program(8), program(32)
    assert long < 1.1 * short
    assert traces == traces_long == 1, "the block is traced once, whatever the depth"


class LeakyBody(decoder_module.ScanBody):
    """The mistake that ScanBody avoids: the stack goes through remat and comes back out of it."""

    @nn.compact
    def __call__(self, carry, per_layer, shared):
        x, layer_inject, cache = carry
        block = nn.remat(LeakyBlock, prevent_cse=False)(self.config, self.attend, self.dtype, name="block")
        return block(LayerCall(x, layer_inject, *per_layer, cache, *shared)), None


class LeakyBlock(InjectedBlock):
    @nn.compact
    def __call__(self, call):
        x, _, cache = InjectedBlock(self.config, self.attend, self.dtype, name="inner")(call)
        return x, call.layer_inject, cache


def saved_stacks(inputs, remat="block"):
    """How often an array with a stack per layer exists in the gradient of the scanned, rematted decoder."""
    decoder = decoder_of(remat=remat)
    shapes = nn.unbox(jax.eval_shape(decoder.init, jax.random.key(0), *inputs))
    gradient = jax.grad(objective(decoder, inputs), argnums=(0, 1, 2))
    found = list(shapes_in(jax.make_jaxpr(gradient)(shapes, inputs[0], inputs[3])))
    assert (decoder.config.layers, B, T, D) in found, "one hidden state per layer is saved"
    return found.count((decoder.config.layers, J, B, M, D))


@pytest.mark.quick
@pytest.mark.parametrize("remat", decoder_module.REMAT)
def test_backward_pass_saves_no_stack_per_layer(inputs, remat):
    assert saved_stacks(inputs, remat) == 0


@pytest.mark.quick
def test_remat_policies_save_what_they_say(inputs):
    """Of every layer `dots` keeps its products with weights, e.g. the gate's [B, T, F], `minimal` attention's output.

    `offload` uses the host.
    """

    def kept(remat):
        decoder = decoder_of(remat=remat)
        shapes = nn.unbox(jax.eval_shape(decoder.init, jax.random.key(0), *inputs))
        jaxpr = jax.make_jaxpr(jax.grad(objective(decoder, inputs)))(shapes, inputs[0], inputs[3])
        shapes = set(shapes_in(jaxpr))
        products, attended = (TINY.layers, B, T, TINY.mlp), (TINY.layers, B, TINY.kv_heads, 3, T, TINY.head_dim)
        return products in shapes, attended in shapes, "host" in str(jaxpr)

    assert {remat: kept(remat) for remat in ("none", *decoder_module.REMAT)} == {
        "none": (True, True, False),
        "block": (False, False, False),
        "minimal": (False, True, False),
        "dots": (True, False, False),
        "offload": (False, False, True),
    }


@pytest.mark.quick
def test_a_stack_returned_through_remat_would_be_found(inputs, monkeypatch):
    monkeypatch.setattr(decoder_module, "ScanBody", LeakyBody)
    assert saved_stacks(inputs) > 0


def test_grouped_heads_equal_repeated_key_and_value_weights(inputs, params):
    repeats = TINY.heads // TINY.kv_heads
    attention = params["params"]["layers"]["block"]["attention"]
    repeated = {name: {"kernel": jnp.repeat(attention[name]["kernel"], repeats, axis=2)} for name in ("k", "v")}
    full = jax.tree.map(lambda leaf: leaf, params)
    full["params"]["layers"]["block"]["attention"] = attention | repeated
    chex.assert_shape(
        full["params"]["layers"]["block"]["attention"]["k"]["kernel"], (TINY.layers, D, TINY.heads, TINY.head_dim)
    )
    ours = jax.jit(decoder_of().apply)(params, *inputs).hidden
    run_full = jax.jit(decoder_of(kv_heads=TINY.heads).apply)
    chex.assert_trees_all_close(run_full(full, *inputs).hidden, ours, atol=1e-5)
    shuffled = jax.tree.map(lambda leaf: leaf, full)
    kernel = repeated["k"]["kernel"]
    shuffled["params"]["layers"]["block"]["attention"] |= {"k": {"kernel": kernel[:, :, ::-1]}}
    assert np.abs(run_full(shuffled, *inputs).hidden - ours).max() > 1e-3, "the heads' order matters"


def test_cache_in_pieces_equals_one_pass(inputs, params):
    """Prefill of any length and the rest token by token: the same hidden states as without a cache."""
    from deepstack_jax.types import KVCache

    x, rotary, mask, _, _ = inputs
    decoder = decoder_of()
    run = jax.jit(decoder.apply)
    whole = run(params, x, rotary, mask).hidden
    zeros = jnp.zeros((TINY.layers, B, T, TINY.kv_heads, TINY.head_dim))
    cache = KVCache(zeros, zeros, jnp.zeros((B, T), jnp.int32), jnp.zeros((B, T), bool), jnp.zeros((), jnp.int32))
    pieces = []
    for span in (slice(0, 5), slice(5, 10), slice(10, T)):
        output = run(params, x[:, span], Rotary(rotary.cos[:, span], rotary.sin[:, span]), mask[:, :, span], None, None, cache)
        cache = output.cache
        pieces.append(output.hidden)
    assert int(cache.filled) == T
    chex.assert_trees_all_close(jnp.concatenate(pieces, axis=1), whole, atol=1e-5)
