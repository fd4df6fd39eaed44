"""Taps beside modules of transformers: hidden states of the tower, mergers, and the decoder with its groups added."""

import jax
import numpy as np
import pytest

from deepstack_jax.config import build_config, default_config
from deepstack_jax.families.build import build_model
from tests.parity.tapped import GOLDEN, case, official_tensors, reference
from tests.unit.tiny import TINY, example, make_batch, model_params


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as stored:
        return dict(stored)


def test_every_step_is_that_of_transformers(recorded):
    """Qwen3-VL's merger and Granite 4 Vision's injection; the states are their hidden states of the same number."""
    config, batch, params = case()
    model = build_model(config)

    def run(params):
        features = model.apply({"params": params}, batch.pixels, method="encode")
        stack = model.apply({"params": params}, batch, method="visual_tokens")[1]
        return features[1:], stack, model.apply({"params": params}, batch).hidden

    states, stack, hidden = jax.jit(run)(params)
    for number, (state, group) in enumerate(zip(states, stack, strict=True)):
        np.testing.assert_allclose(state, recorded[f"state_{number}"], atol=1e-4)
        np.testing.assert_allclose(group, recorded[f"merged_{number}"], atol=1e-4)
    real = batch.segment_ids > 0
    np.testing.assert_allclose(np.asarray(hidden)[real], recorded["hidden"][real], atol=1e-4)
    assert not np.allclose(recorded["state_0"], recorded["state_1"], atol=0.1)


def test_the_record_is_what_transformers_computes_today(recorded):
    pytest.importorskip("torch", reason="torch is not installed: the package does not need it, only this comparison does")
    for name, array in reference().items():
        np.testing.assert_allclose(array, recorded[name], atol=1e-5, err_msg=name)


def test_layer_k_of_qwen3_vl_is_layer_k_plus_1_here():
    """Its text model adds after its first layers, over positions that are the same in all three axes of its rotary ones."""
    torch = pytest.importorskip(
        "torch", reason="torch is not installed: the package does not need it, only this comparison does"
    )
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextModel

    source = default_config(decoder="qwen3")
    taps = {"image.mode": "stretch", "deepstack.stack": "taps", "deepstack.taps": ((1, 1), (2, 2)), "data.max_images": 1}
    source.update_from_flattened_dict(TINY | taps)
    config = build_config(source)
    batch = make_batch(config, [[example(config, 0, [None], words=9)]])
    model = build_model(config)
    params = model_params(model, batch)
    decoder, tensors = config.decoder, official_tensors(config, params)
    theirs = Qwen3VLTextModel(
        Qwen3VLTextConfig(
            vocab_size=decoder.vocab_size, hidden_size=decoder.width, intermediate_size=decoder.mlp, head_dim=decoder.head_dim,
            num_hidden_layers=decoder.layers, num_attention_heads=decoder.heads, num_key_value_heads=decoder.kv_heads,
            rms_norm_eps=decoder.norm_eps, max_position_embeddings=decoder.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.rope.theta, "mrope_section": [2, 1, 1]},
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict({name: torch.tensor(tensors[f"model.{name}"]) for name in theirs.state_dict()})
    x, stack, _ = model.apply({"params": params}, batch, method="inputs")
    visual = torch.tensor(batch.visual_index >= 0)
    groups = [torch.tensor(np.asarray(group[0])) for group in stack]
    with torch.no_grad():
        wanted = theirs(
            inputs_embeds=torch.tensor(np.asarray(x)), visual_pos_masks=visual, deepstack_visual_embeds=groups
        ).last_hidden_state.numpy()
    real = batch.segment_ids > 0
    hidden = np.asarray(model.apply({"params": params}, batch).hidden)
    np.testing.assert_allclose(hidden[real], wanted[real], atol=2e-4)
