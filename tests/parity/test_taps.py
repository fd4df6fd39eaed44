"""Taps beside modules of transformers: hidden states of the tower, mergers, and the decoder with its groups added."""

import jax
import numpy as np
import pytest

from deepstack_jax.families.build import build_model
from tests.parity.tapped import GOLDEN, case, reference


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
