"""Every family's hidden states, scores and answers beside those that transformers recorded, without torch."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import deepstack_jax as dsx
from deepstack_jax.families.build import build_model
from deepstack_jax.generate.decoding import greedy
from deepstack_jax.generate.prompts import cut_image, example, pad_prompts
from tests.parity.family_cases import CASES, GOLDEN, NEW_TOKENS, picture, prompt, write_folder

LOGITS = 5e-4


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_transformers_computes(name, tmp_path):
    with np.load(GOLDEN / f"{name}.npz") as stored:
        wanted = dict(stored)
    lmm = dsx.load(write_folder(name, tmp_path))
    row = example(np.array(prompt()), [cut_image(picture(name), lmm.config, "ignore")])
    batch, model = pad_prompts([row], lmm.config), build_model(lmm.config, keep_inputs=True)

    @jax.jit
    def computed(params):
        features = model.apply({"params": params}, batch.pixels, method="encode")[0]
        output = model.apply({"params": params}, batch)
        logits = model.apply({"params": params}, output.hidden, method="logits")
        return features, output.layer_inputs, output.hidden, logits

    features, inputs, hidden, logits = map(np.asarray, computed(lmm.params))
    np.testing.assert_allclose(features[0, -16::3], wanted["tower"], atol=1e-4)
    states = np.concatenate([inputs[:, 0], hidden])[:, wanted["at"]]
    np.testing.assert_allclose(states, wanted["hidden"], atol=1e-4)
    np.testing.assert_allclose(logits[0, wanted["at"]], wanted["logits"], atol=LOGITS)
    made = greedy(lmm.answerer.model, lmm.params, batch, max_new_tokens=NEW_TOKENS, stop_ids=()).tokens
    np.testing.assert_array_equal(made[0], wanted["greedy"])
