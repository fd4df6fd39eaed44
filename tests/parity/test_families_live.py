"""Every family beside transformers itself: gradients, and what each reads of the other's folders; runs where torch is."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import deepstack_jax as dsx
from deepstack_jax.families.build import build_model
from deepstack_jax.families.forms import canonical
from deepstack_jax.generate.prompts import cut_image, example, pad_prompts
from deepstack_jax.train.core.optimizer import flatten
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.save import save_checkpoint
from tests.parity.family_cases import CASES, IMAGE_TOKEN, MEAN_STD, PROCESSORS, llava_config, picture, prompt

torch = pytest.importorskip("torch", reason="torch is not installed: the package does not need it, only this comparison does")
transformers = pytest.importorskip("transformers")
from tests.parity.write_families import inputs_of, make_model, outputs_of  # noqa: E402, since it needs torch


def loaded(name: str, folder) -> tuple[Any, dict[str, Any], dsx.LMM]:
    """transformers' model, its inputs, and ours of the same folder."""
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
    output = outputs_of(model, inputs)
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
        found = outputs_of(again.eval(), inputs).logits[0, :, : output.logits.shape[-1]]
    np.testing.assert_allclose(found.numpy(), output.logits[0].detach().numpy(), atol=5e-5)
    assert flatten(dsx.load(tmp_path / "ours").params).keys() == flatten(lmm.params).keys()


@pytest.mark.slow
def test_deepstack_v_inside_siglip(tmp_path):
    """Each group added by hand to the global view's patches between transformers' own layers."""
    model, _, lmm = loaded("smollm2", tmp_path)
    image = dataclasses.replace(lmm.config.image, mode="deepstack", grid="square", num_crops=4)
    stack = dataclasses.replace(lmm.config.deepstack, stack="crops", into="vision", vision_start=1)
    config = dataclasses.replace(lmm.config, image=image, deepstack=stack)
    noise = Image.fromarray(np.random.default_rng(5).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    cut = cut_image(noise, config, "ignore")
    batch = pad_prompts([example(np.array(prompt()), [cut])], config)
    mine = build_model(config).apply({"params": lmm.params}, batch, method="visual_tokens")[0]
    values = torch.tensor(np.moveaxis((cut.pixels.astype(np.float32) / 255 - 0.5) / 0.5, -1, 1))
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        x = tower.encoder.layers[0](tower.embeddings(values), attention_mask=None)
        side, width = config.patch_side, x.shape[-1]
        mosaic = x[1:].reshape(2, 2, side, side, width).permute(0, 2, 1, 3, 4).reshape(2 * side, 2 * side, width)
        groups = [mosaic[i::2, j::2].reshape(1, -1, width) for i in range(2) for j in range(2)]
        whole = tower.encoder.layers[1](x[:1] + groups[0], attention_mask=None) + groups[1]  # the input of the last layer
        wanted = model.model.multi_modal_projector(whole)[0].numpy()
    np.testing.assert_allclose(np.asarray(mine)[0, : len(wanted)], wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(50, 70), (80, 30)])
def test_siglip_inside_llava_next(size, tmp_path):
    """Crops as a mosaic with newlines, unpadded, over SmolLM2's form: all scores, from the file of a picture."""
    points = [[30, 60], [60, 30], [60, 60]]
    values = llava_config("smollm2") | {"image_grid_pinpoints": points}
    torch.manual_seed(2)
    model = transformers.LlavaNextForConditionalGeneration(transformers.LlavaNextConfig(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.15)
    model.save_pretrained(tmp_path)
    whole = {"height": 30, "width": 30}
    settings = {
        "size": whole,
        "crop_size": whole,
        "image_grid_pinpoints": points,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    processor = transformers.LlavaNextImageProcessorPil(**settings)
    processor.save_pretrained(tmp_path)
    lmm = dsx.load(tmp_path)
    noise = Image.fromarray(np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8))
    cut = cut_image(noise, lmm.config, "ignore")
    given = processor(noise, return_tensors="pt")
    tokens = cut.layout.tokens.size
    ids = [token for id in prompt() for token in ([IMAGE_TOKEN] * tokens if id < 0 else [id])]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids]), **given).logits[0].numpy()
    np.testing.assert_allclose(lmm.logits([prompt()], [[noise]])[0], wanted, atol=5e-4)
