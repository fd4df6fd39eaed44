"""Writes `tests/golden/families`: what transformers computes for the cases of `family_cases.py`. Needs torch.

python -m tests.parity.write_families [NAME ...]
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from safetensors.numpy import load_file, save_file

from tests.parity.family_cases import CASES, GOLDEN, IMAGE_TOKEN, MEAN_STD, NEW_TOKENS, draw, llava_config, picture, prompt

torch: Any = importlib.import_module("torch")  # which no environment of this project has
# Of config.json, what says nothing about the model.
_LEFT_OUT = ("transformers_version", "dtype", "_name_or_path", "architectures")


def make_model(name: str, folder: Path) -> Any:
    """transformers' model of a case with the drawn weights, saved to `folder` and read again."""
    config: Any = transformers.LlavaConfig(**copy.deepcopy(llava_config(name)))
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    shapes = {key: tensor.shape for key, tensor in load_file(folder / "model.safetensors").items()}
    drawn = {key: draw(key, shape) for key, shape in shapes.items()}
    save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})
    kind = transformers.LlavaForConditionalGeneration
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def inputs_of(name: str, model: Any, mean: Any, std: Any) -> dict[str, Any]:
    """Ids with a place for every patch, and pixels."""
    values = (np.asarray(picture(name), np.float32) / 255 - np.float32(mean)) / np.float32(std)
    tower = model.config.vision_config
    patches = (tower.image_size // tower.patch_size) ** 2
    ids = [token for id in prompt() for token in ([IMAGE_TOKEN] * patches if id < 0 else [id])]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.tensor(np.moveaxis(values, -1, 0)[None])}


def outputs_of(model: Any, inputs: dict[str, Any]) -> Any:
    """What the language model alone computes from the embeddings that the whole makes.

    The whole has a head of its own, which leaves Granite's logits_scaling out.
    """
    taken: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(lambda _, __, more: taken.update(more), with_kwargs=True)
    model(**inputs)
    hook.remove()
    text = transformers.AutoModelForCausalLM.from_config(model.config.text_config, attn_implementation="eager").eval()
    text.model, text.lm_head = model.model.language_model, model.lm_head
    return text(inputs_embeds=taken["inputs_embeds"], output_hidden_states=True)


def small(values: dict[str, Any]) -> dict[str, Any]:
    """config.json without what says nothing here."""
    return {k: small(v) if isinstance(v, dict) else v for k, v in values.items() if k not in _LEFT_OUT and v is not None}


def write(name: str) -> None:
    """One case's files."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(name, Path(folder))
        tensors = {key: list(tensor.shape) for key, tensor in load_file(Path(folder) / "model.safetensors").items()}
        config = json.loads((Path(folder) / "config.json").read_text())
    inputs = inputs_of(name, model, *MEAN_STD[CASES[name][1]])
    with torch.no_grad():
        output = outputs_of(model, inputs)
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        made = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    at = np.arange(0, inputs["input_ids"].shape[1], 3)
    arrays = {
        "hidden": torch.stack(output.hidden_states)[:, 0, at],
        "logits": output.logits[0, at],
        "tower": tower.hidden_states[model.config.vision_feature_layer][0, -16::3],
        "greedy": made[0, inputs["input_ids"].shape[1] :],
    }
    GOLDEN.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(GOLDEN / f"{name}.npz", at=at, **{key: value.numpy() for key, value in arrays.items()})
    text = json.dumps({"config": small(config), "tensors": tensors, "transformers": transformers.__version__}, sort_keys=True)
    (GOLDEN / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    for one in sys.argv[1:] or CASES:
        write(one)
