"""What holds for the model of the defaults holds for every family: packed equals unpacked, a cache equals the full pass."""

from __future__ import annotations

from functools import partial
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepstack_jax.families.base import decoder_of
from deepstack_jax.families.build import build_model
from deepstack_jax.families.forms import check_against
from deepstack_jax.generate.decoding import empty_cache
from deepstack_jax.model.attention import Rotary
from deepstack_jax.model.decoder import Attention, LayerCall
from deepstack_jax.train.core.optimizer import flatten
from deepstack_jax.weights.load import stored_leaves
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from deepstack_jax.weights.save import save_checkpoint
from tests.unit.tiny import FAMILIES, example, make_batch, model_params, only_rows, tiny_config

# One in the short suite.
CASES = [pytest.param(name, marks=[pytest.mark.slow] * (at > 0)) for at, name in enumerate(FAMILIES)]


@pytest.mark.parametrize("name", CASES)
def test_packed_rows_and_a_cache_equal_rows_alone(name):
    config = tiny_config(FAMILIES[name])
    model = build_model(config)
    one, two = example(config, 1, [(2, 2)]), example(config, 2, [(2, 2)], words=2, answer=2)
    batch = make_batch(config, [[one, two], [one], [two]])
    params = model_params(model, batch)
    hidden = np.asarray(jax.jit(lambda params: model.apply({"params": params}, batch).hidden)(params))
    lengths = [int((batch.segment_ids[row] > 0).sum()) for row in (1, 2)]
    np.testing.assert_allclose(hidden[0, : lengths[0]], hidden[1, : lengths[0]], atol=1e-5)
    np.testing.assert_allclose(hidden[0, lengths[0] : sum(lengths)], hidden[2, : lengths[1]], atol=1e-5)

    # The last token of row 1 goes through the cache.
    last = lengths[0] - 1
    alone = only_rows(batch, 1)
    token, position = jnp.asarray(alone.tokens[:, last : last + 1]), jnp.asarray(alone.positions[:, last : last + 1])
    before = np.arange(alone.tokens.shape[1]) < last
    short = alone._replace(
        tokens=np.where(before, alone.tokens, 0),
        segment_ids=np.where(before, alone.segment_ids, 0),
        visual_index=np.where(before, alone.visual_index, -1),
    )

    @jax.jit
    def through_cache(params):
        cache = model.apply({"params": params}, short, empty_cache(model, 3, 33), method="prefill").cache
        return model.apply({"params": params}, token, position, cache, method="decode").hidden

    np.testing.assert_allclose(np.asarray(through_cache(params))[1, 0], hidden[1, last], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_is_read_as_what_was_written(name, tmp_path):
    """In the official form: config.json, the tower's own folder, and what only deepstack_jax.json can say."""
    config = tiny_config(FAMILIES[name])
    model = build_model(config)
    batch = make_batch(config, [[example(config, 1, [(2, 2)])]])
    leaves = flatten(model_params(model, batch))
    save_checkpoint(leaves, config, tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    check_against(config, found.config)
    assert (found.config.image, found.config.deepstack) == (config.image, config.deepstack)
    assert ("lm_head.weight" in found.tensors) is not config.decoder.tied_head
    for path, leaf in stored_leaves(found.tensors, found.config).items():
        np.testing.assert_array_equal(leaf[tuple(slice(None) for _ in leaf.shape)], leaves[path], err_msg=path)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_towers_of_any_square(tower):
    """14 x 14 patches to 32 x 32, of 14, 16 and 32 pixels, of SigLIP with an edge that fills none."""
    for side, patch in zip(range(14, 33), cycle((14, 16, 32)), strict=False):
        size = side * patch + (patch - 1 if tower == "siglip" else 0)
        sizes = {"image.size": size, "vision.patch_size": patch, "vision.architecture": tower}
        config = tiny_config(sizes | {"data.max_images": 1, "data.max_length": side**2 + 8})
        assert (config.patch_side, config.layout.patches) == (side, side**2)
        stack = config.layout.layout((2, 2), (64, 48)).stack
        np.testing.assert_array_equal(np.sort(stack.ravel()), np.arange(side**2, 5 * side**2))
        positions = NameTable(config).leaves["vision_tower/positions"].shape
        assert positions == (side**2 + (tower == "clip"), config.vision.width)
        if side % 8 == 0:
            pixels = jax.ShapeDtypeStruct((1, 2, size, size, 3), jnp.uint8)
            made = partial(build_model(config).init_with_output, method="encode")
            (features,), params = jax.eval_shape(made, jax.random.key(0), pixels)
            assert features.shape == (1, 2 * side**2, config.vision.width)
            assert jax.tree.leaves(params["params"]["vision_tower"]["positions"])[0].shape == positions


def test_norms_of_heads_keep_what_a_plan_says():
    """Beside LLaMA of the same sizes, in elements of bfloat16 for each token: what the backward pass of attention is given."""
    tokens = 64

    def kept(name: str) -> tuple[float, float]:
        sizes = {"decoder.width": 64, "decoder.heads": 8, "decoder.kv_heads": 4, "decoder.head_dim": 64}
        config = tiny_config({"decoder.architecture": name} | sizes)
        attention = Attention(config.decoder, lambda q, k, v, mask: q + jnp.repeat(k + v, 2, axis=2), jnp.bfloat16)
        angles, x = jnp.ones((1, tokens, 32)), jnp.ones((1, tokens, 64), jnp.bfloat16)
        at = jnp.int32(0)
        call = LayerCall(x, None, at, at, None, None, None, Rotary(angles, angles), None)
        params = jax.eval_shape(attention.init, jax.random.key(0), x, call)
        residuals = jax.eval_shape(
            lambda params, x: jax.vjp(lambda *into: attention.apply(*into, call)[0], params, x)[1], params, x
        )
        held = [leaf for leaf in jax.tree.leaves(residuals) if tokens in leaf.shape]
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in held) / 2 / tokens
        return total, decoder_of(config).layer(config.decoder, 1).kept

    (normed, planned), (plain, without) = kept("qwen3"), kept("llama")
    assert planned - without == pytest.approx(normed - plain, rel=0.03)
