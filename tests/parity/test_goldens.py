"""Every layer and number of the official PyTorch code, case by case, at the tolerances of `golden/README.md`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.goldens import build_batch, load_case, load_params, official_names

pytestmark = pytest.mark.quick

CASES = [
    "l_2d",
    "l_2d_start3_int2",
    "l_1d",
    "l_grid",
    "l_only_global",
    "l_string_withglobal",
    "llava15",
    "v",
    "hd",
    "llava_next",
    "phi",
]
LOGITS, LOSS = 5e-4, 1e-5


@pytest.fixture(scope="module", params=CASES)
def run(request):
    case = load_case(request.param)
    model = case.model(keep_inputs=True)
    batch = build_batch(case)
    params = load_params(case)

    @jax.jit
    def forward(params, batch):
        output = model.apply(params, batch)
        visual, stack = model.apply(params, batch, method="visual_tokens")
        embeds, _, _ = model.apply(params, batch, method="inputs")
        return output, model.apply(params, output.hidden, method="logits"), visual, stack, embeds

    return case, model, params, batch, forward(params, batch)


def test_positions_equal_the_official_expansion(run):
    case, _, _, batch, _ = run
    np.testing.assert_array_equal(batch.segment_ids > 0, case.arrays["attention_mask_expanded"])
    labels = case.arrays["labels_expanded"]
    np.testing.assert_array_equal(batch.loss_weights[:, :-1] > 0, labels[:, 1:] != -100)
    np.testing.assert_array_equal(batch.targets[:, :-1][labels[:, 1:] != -100], labels[:, 1:][labels[:, 1:] != -100])


def test_logits_and_final_hidden(run):
    case, _, _, _, (output, logits, *_) = run
    real = case.arrays["attention_mask_expanded"]
    at = case.arrays["logit_positions"]
    error = np.abs(np.asarray(logits)[:, at] - case.arrays["logits"])[real[:, at]]
    assert error.max() < LOGITS
    assert np.abs(np.asarray(output.hidden) - case.arrays["final_hidden"])[real].max() < LOGITS


def test_visual_tokens_stack_and_embeddings(run):
    case, _, _, _, (_, _, visual, stack, embeds) = run
    real = case.arrays["attention_mask_expanded"]
    assert np.abs(np.asarray(embeds) - case.arrays["inputs_embeds"])[real].max() < 1e-4
    if "stack" in case.arrays:
        np.testing.assert_allclose(visual, case.arrays["global_features"], atol=1e-4)
        np.testing.assert_allclose(stack, case.arrays["stack"], atol=1e-4)
        empty = ~case.arrays["stack"].any(axis=(2, 3))
        assert not np.asarray(stack)[empty].any(), "groups beyond the grid must be exactly zero"
    for row in range(2):
        for name in (f"global_features_{row}", f"visual_tokens_{row}"):
            if name in case.arrays:
                official = case.arrays[name]
                np.testing.assert_allclose(visual[row, : len(official)], official, atol=1e-4)
        if f"stack_{row}" in case.arrays:
            official = case.arrays[f"stack_{row}"]
            np.testing.assert_allclose(stack[:, row, : official.shape[1]], official, atol=1e-4)


def test_loss(run):
    case, _, _, batch, (_, logits, *_) = run
    scores = jax.nn.log_softmax(logits)
    picked = np.take_along_axis(np.asarray(scores), batch.targets[..., None], -1)[..., 0]
    loss = -(picked * batch.loss_weights).sum() / batch.loss_weights.sum()
    assert abs(loss - case.arrays["loss"]) < LOSS


@pytest.mark.parametrize("name", ["l_2d", "phi"])
def test_every_hidden_state(name):
    case = load_case(name)
    model = case.model(keep_inputs=True)
    batch = build_batch(case)
    params = load_params(case)
    output = jax.jit(model.apply)(params, batch)
    real = case.arrays["attention_mask_expanded"]
    for layer, ours in enumerate(np.asarray(output.layer_inputs)):
        assert np.abs(ours - case.arrays["hidden_states"][layer])[real].max() < LOGITS, f"input of layer {layer}"


def test_vision_hidden_states():
    case = load_case("l_2d")
    batch = build_batch(case)
    deepstack = case.model()
    params = load_params(case)
    features = np.asarray(deepstack.apply(params, batch.pixels, method="encode")[0]).reshape(
        2, -1, case.config.layout.patches, 32
    )
    official = case.arrays["vision_selected"]
    ours = np.concatenate([features[:, 0], features[0, 1:5], features[1, 1:4]])
    np.testing.assert_allclose(ours, official, atol=1e-4)


@pytest.mark.parametrize("name", ["l_2d", "v", "phi"])
def test_gradients(name):
    """Norms of every official gradient, and the stored ones element by element."""
    case = load_case(name)
    model = case.model()
    batch = build_batch(case)
    params = load_params(case)

    @jax.jit
    @jax.grad
    def gradient(params):
        scores = jax.nn.log_softmax(model.apply(params, model.apply(params, batch).hidden, method="logits"))
        picked = jnp.take_along_axis(scores, batch.targets[..., None], -1)[..., 0]
        return -(picked * batch.loss_weights).sum() / batch.loss_weights.sum()

    ours = gradient(params)
    chex.assert_trees_all_equal_shapes(ours, params)
    named = official_names(case, ours["params"]).items()
    flat = {name: leaf for name, leaf in named if leaf.any()}  # upstream has no gradient where we have zero
    norms = case.info["grad_l2_norms"]
    assert set(flat) == set(norms)
    for tensor, norm in norms.items():
        assert abs(np.linalg.norm(flat[tensor]) - norm) <= 1e-4 * max(1.0, norm), tensor
    stored = {key.removeprefix("grad:"): value for key, value in case.arrays.items() if key.startswith("grad:")}
    assert stored
    for tensor, value in stored.items():
        np.testing.assert_allclose(flat[tensor], value, atol=5e-4, err_msg=tensor)
