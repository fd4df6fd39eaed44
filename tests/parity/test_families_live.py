"""Every family beside transformers itself: gradients, and what each reads of the other's folders; runs where torch is."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest

import deepstack_jax as dsx
from deepstack_jax.families.build import build_model
from deepstack_jax.families.forms import canonical
from deepstack_jax.generate.prompts import cut_image, example, pad_prompts
from deepstack_jax.train.core.optimizer import flatten
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.save import save_checkpoint
from tests.parity.family_cases import CASES, MEAN_STD, PROCESSORS, picture, prompt

torch = pytest.importorskip("torch", reason="torch is not installed: the package does not need it, only this comparison does")
transformers = pytest.importorskip("transformers")


def loaded(name: str, folder) -> tuple[Any, dict[str, Any], dsx.LMM]:
    """transformers' model, its inputs, and ours of the same folder."""
    from tests.parity.write_families import inputs_of, make_model

    model = make_model(name, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[CASES[name][1]]))
    return model, inputs_of(name, model, *MEAN_STD[CASES[name][1]]), dsx.load(folder)


def gradients(lmm: dsx.LMM, name: str) -> tuple[float, dict[str, np.ndarray]]:
    """Mean loss over the words after the image, and its gradient by parameter."""
    model, row = build_model(lmm.config), example(np.array(prompt()), [cut_image(picture(name), lmm.config, "ignore")])
    batch = pad_prompts([row], lmm.config)
    end, words = row.length, len(prompt()) - 3

    def loss(params: Any) -> Any:
        logits = model.apply({"params": params}, model.apply({"params": params}, batch).hidden, method="logits")
        scores = jax.nn.log_softmax(logits[0, end - words : end - 1])
        return -scores[np.arange(words - 1), batch.tokens[0, end - words + 1 : end]].mean()

    value, tree = jax.jit(jax.value_and_grad(loss))(lmm.params)
    return float(value), {path: np.asarray(leaf, np.float32) for path, leaf in flatten(tree).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_scores_and_gradients_of_both_and_an_export(name, tmp_path):
    (tmp_path / "theirs").mkdir()
    model, inputs, lmm = loaded(name, tmp_path / "theirs")
    ids = inputs["input_ids"]
    output = model(**inputs)
    np.testing.assert_allclose(lmm.logits([prompt()], [[picture(name)]])[0], output.logits[0].detach().numpy(), atol=5e-4)
    words = len(prompt()) - 3
    value = torch.nn.functional.cross_entropy(output.logits[0, -words:-1], ids[0, -words + 1 :])
    value.backward()
    theirs = {
        canonical(key, "llava-hf"): parameter.grad.numpy()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    loss, ours = gradients(lmm, name)
    assert loss == pytest.approx(float(value.detach()), abs=1e-5)
    table = NameTable(lmm.config)
    compared = 0
    for official, foreign in table.tensors.items():
        if official in theirs:
            compared += 1
            mine = table.theirs(official, ours)
            assert mine.shape == foreign.shape
            np.testing.assert_allclose(mine, theirs[official], atol=2e-5, rtol=2e-4, err_msg=official)
        else:
            assert not np.abs(table.theirs(official, ours)).max() > 1e-7, official
    assert compared == len(theirs), set(theirs) - set(table.tensors)
    save_checkpoint(flatten(lmm.params), lmm.config, tmp_path / "ours", form="llava-hf")
    kind = transformers.LlavaForConditionalGeneration
    again, report = kind.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs["input_ids"] = torch.where(ids == model.config.image_token_id, again.config.image_token_id, ids)
    with torch.no_grad():
        found = again.eval()(**inputs).logits[0, :, : output.logits.shape[-1]]
    np.testing.assert_allclose(found.numpy(), output.logits[0].detach().numpy(), atol=5e-5)
    assert flatten(dsx.load(tmp_path / "ours").params).keys() == flatten(lmm.params).keys()
