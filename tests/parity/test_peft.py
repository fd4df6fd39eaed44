"""Live comparisons with PEFT over transformers' models, which the package does not need: run where both are installed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import deepstack_jax as dsx
from deepstack_jax.weights.adapters import adapter_paths
from deepstack_jax.weights.load import stored_leaves
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from deepstack_jax.weights.peft import Adapter, write_peft
from deepstack_jax.weights.save import save_checkpoint
from tests.parity.family_cases import CASES, MEAN_STD, PROCESSORS, picture, prompt
from tests.parity.goldens import build_batch, load_case, write_folder
from tests.unit.test_peft import draw_adapter

torch = pytest.importorskip("torch", reason="torch is not installed: the package does not need it, only this comparison does")
peft = pytest.importorskip("peft", reason="peft is not installed: the package does not need it, only this comparison does")
transformers = pytest.importorskip("transformers")
from tests.parity.write_families import inputs_of, make_model, outputs_of  # noqa: E402, since it needs torch

LOGITS = 5e-4
IDS = np.array([[1, 17, 5, 99, 23, 42, 7, 300, 11, 64]])


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """(official folder, its llava-hf export) of the LLaVA-1.5 golden."""
    root = tmp_path_factory.mktemp("llava")
    official = write_folder("llava15", root)
    stored = open_checkpoint(official)
    save_checkpoint(stored_leaves(stored.tensors, stored.config), stored.config, root / "hf_out", form="llava-hf")
    return official, root / "hf_out"


def over_llava(folder, adapter=None) -> Any:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)


def inputs(folder):
    """Ids, an image among them, and pixels, for transformers and for us; of the golden's first row."""
    case = load_case("llava15")
    batch = build_batch(case)
    token = json.loads((folder / "config.json").read_text())["image_token_index"]
    real = int((batch.segment_ids[0] > 0).sum())
    ids = np.where(batch.visual_index[0] >= 0, token, batch.tokens[0])[:real]
    image = case.config.image
    pixels = (batch.pixels[0, :1].astype(np.float32) / 255 - np.float32(image.mean)) / np.float32(image.std)
    return case, batch, real, torch.tensor(ids[None].astype(np.int64)), torch.tensor(np.moveaxis(pixels, -1, -3))


def our_logits(params, batch, config, real):
    model = dsx.LMM(config, params, None, config.data.template).answerer.model
    hidden = model.apply({"params": params}, batch).hidden
    return np.asarray(model.apply({"params": params}, hidden, method="logits"))[0, :real]


def their_logits(model, ids, pixels, vocabulary):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits[0, :, :vocabulary].numpy()


def test_peft_over_transformers_llava_gives_our_logits(llava, tmp_path):
    """Adapters in tower, projector and decoder, written under transformers' names."""
    official, hf = llava
    case, batch, real, ids, pixels = inputs(hf)
    kernels = (
        "block/q/kernel",
        "block/fc2/kernel",
        "projector/fc1/kernel",
        "attention/o/kernel",
        "mlp/up/kernel",
        "head/kernel",
    )
    adapter = draw_adapter(case.config, (*kernels, "head/kernel"), whole=("projector/fc2",))
    write_peft(tmp_path, adapter, case.config, "peft-llava-hf")
    lmm = dsx.load(official, adapter=tmp_path)
    ours = our_logits(lmm.params, batch, lmm.config, real)
    vocabulary = case.config.decoder.vocab_size
    theirs = their_logits(over_llava(hf, tmp_path), ids, pixels, vocabulary)
    plain = their_logits(over_llava(hf), ids, pixels, vocabulary)
    assert np.abs(theirs - plain).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=LOGITS * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("stabilised", [False, True])
def test_adapters_that_peft_saves_give_its_logits_here(llava, tmp_path, stabilised):
    _, hf = llava
    case, batch, real, ids, pixels = inputs(hf)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=stabilised,
        target_modules=["q_proj", "up_proj", "fc1", "linear_1"],
        modules_to_save=["linear_2"],
        rank_pattern={"fc1": 2},
        alpha_pattern={"up_proj": 3},
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(over_llava(hf), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    theirs = their_logits(model, ids, pixels, case.config.decoder.vocab_size)
    lmm = dsx.load(hf, adapter=tmp_path)
    config = lmm.config
    assert lmm.params["vision_tower"]["layers"]["block"]["fc1"]["lora_a"].shape[-1] == 2
    ours = our_logits(lmm.params, batch, config, real)[:, : theirs.shape[1]]
    np.testing.assert_allclose(ours, theirs, atol=LOGITS * max(1, np.abs(theirs).max()))


def test_official_names_are_those_of_a_language_model_in_transformers(tmp_path):
    """An official decoder's modules are named as LlamaForCausalLM's."""
    folder = write_folder("llava15", tmp_path)
    stored = open_checkpoint(folder)
    adapter = draw_adapter(stored.config, ("attention/q/kernel", "attention/v/kernel", "mlp/down/kernel", "head/kernel"), ())
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", adapter, stored.config, "peft")
    values = json.loads((folder / "config.json").read_text())
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    config = transformers.LlamaConfig(**{key: values[key] for key in keys}, rms_norm_eps=values["rms_norm_eps"])
    model = transformers.LlamaForCausalLM(config).to(torch.float32)
    table = NameTable(stored.config)
    leaves = stored_leaves(stored.tensors, stored.config)
    names = [name for name in table.tensors if name.startswith(("model.layers.", "model.norm", "model.embed", "lm_head"))]
    model.load_state_dict({name: torch.tensor(table.theirs(name, leaves)) for name in names})
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(IDS)).logits.numpy()
    ours = dsx.load(folder, adapter=tmp_path / "adapter").logits(IDS)
    np.testing.assert_allclose(ours, theirs, atol=LOGITS * max(1, np.abs(theirs).max()))


def test_peft_merges_to_what_convert_merges(llava, tmp_path):
    official, hf = llava
    config = open_checkpoint(official).config
    adapter: Adapter = draw_adapter(config, ("attention/q/kernel", "mlp/down/kernel"), ())
    write_peft(tmp_path, adapter, config, "peft-llava-hf")
    theirs = over_llava(hf, tmp_path).merge_and_unload().state_dict()
    lmm = dsx.load(official, adapter=tmp_path)
    lmm.save_hf(tmp_path / "merged")
    ours = open_checkpoint(tmp_path / "merged").tensors
    for layer in range(config.decoder.layers):
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            mine = ours[f"model.layers.{layer}.{module}.weight"].read()
            np.testing.assert_allclose(theirs[f"model.language_model.layers.{layer}.{module}.weight"], mine, atol=1e-5)
    assert adapter_paths("layers/layers/block/attention/q/kernel")[0] in adapter.leaves


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_adapters_over_every_family_in_both_directions(name, tmp_path):
    """Those that PEFT draws and saves give its logits here; those that are written here give ours there."""
    base, theirs, ours = (tmp_path / part for part in ("base", "theirs", "ours"))
    for folder in (base, ours):
        folder.mkdir()
    model, tower = make_model(name, base), CASES[name][1]
    (base / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[tower]))
    inputs, words = inputs_of(name, model, *MEAN_STD[tower]), ([prompt()], [[picture(name)]])

    def of_transformers(adapted):
        with torch.no_grad():
            return outputs_of(adapted.eval().base_model.model, inputs).logits.numpy()

    plain = dsx.load(base).logits(*words)
    modules = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "fc1",
        "fc2",
        "out_proj",
        "linear_1",
    ]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules))
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(theirs)
    found = dsx.load(base, adapter=theirs).logits(*words)
    assert np.abs(found - plain).max() > 0.1
    np.testing.assert_allclose(found, of_transformers(adapted), atol=LOGITS)

    lmm = dsx.load(base)
    kernels = ("block/attention/q/kernel", "block/mlp/down/kernel", "vision_tower/layers/block/fc1/kernel", "fc2/kernel")
    write_peft(ours, draw_adapter(lmm.config, kernels, whole=("projector/fc1",)), lmm.config, "peft-llava-hf")
    found = dsx.load(base, adapter=ours).logits(*words)
    assert np.abs(found - plain).max() > 0.1
    fresh = transformers.LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    there = of_transformers(peft.PeftModel.from_pretrained(fresh, ours))
    np.testing.assert_allclose(found, there, atol=LOGITS * max(1, np.abs(there).max()))
