"""One tiny model for every family of towers and decoders: transformers' configuration of it, and weights drawn by name.

`write_families.py` asks transformers what they compute and writes `tests/golden/families`; `test_families.py` compares without
torch, `test_families_live.py` with it, gradients included.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from deepstack_jax.config.data import CLIP_MEAN, CLIP_STD

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
IMAGE_TOKEN = 95  # the last row of the vocabulary that transformers has
NEW_TOKENS = 6
_TEXT = {
    "vocab_size": IMAGE_TOKEN + 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_TOWER = {
    "image_size": 28,
    "patch_size": 7,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e5}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 16}
DECODERS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    "llama3": {"model_type": "llama", "rope_parameters": _LLAMA3},
    "qwen2": {"model_type": "qwen2", "rope_parameters": _ROPE | {"rope_theta": 1e6}},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "granite": {
        "model_type": "granite",
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.5,
    },
}
# Of a side that is no multiple of its patch, as so400m's 384 and 14.
TOWERS: dict[str, dict[str, Any]] = {
    "clip": _TOWER | {"model_type": "clip_vision_model"},
    "siglip": _TOWER | {"model_type": "siglip_vision_model", "image_size": 30, "vision_use_head": False},
}
_SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 30, "width": 30}}
PROCESSORS = {"clip": {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}, "siglip": _SIGLIP}
MEAN_STD = {"clip": (CLIP_MEAN, CLIP_STD), "siglip": ((0.5,) * 3, (0.5,) * 3)}
# Each decoder once, and each tower.
CASES = {name: (name, "siglip" if name in ("smollm2", "qwen3", "granite") else "clip") for name in DECODERS}


def llava_config(name: str) -> dict[str, Any]:
    """What `transformers.LlavaConfig` is made of."""
    decoder, tower = CASES[name]
    return {
        "text_config": {"tie_word_embeddings": False} | _TEXT | DECODERS[decoder],
        "vision_config": TOWERS[tower],
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Noise for a tensor, the same wherever it is drawn; norms lie around 1."""
    spread = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.6 if "embed_tokens" in name else 0.15, shape)
    return (spread + (len(shape) == 1 and "norm" in name and name.endswith("weight"))).astype(np.float32)


def picture(name: str) -> Image.Image:
    """Noise of exactly the tower's size, so that nobody resizes it."""
    size = TOWERS[CASES[name][1]]["image_size"]
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (size, size, 3), dtype=np.uint8))


def prompt() -> list[int]:
    """Ids with one image, as the official code has them."""
    return [1, 7, -200, *np.random.default_rng(3).integers(3, 90, 8).tolist()]


def write_folder(name: str, folder: Path) -> Path:
    """The `llava-hf` folder that transformers saved, its weights drawn again."""
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    save_file({key: draw(key, tuple(shape)) for key, shape in case["tensors"].items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case["config"]))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[CASES[name][1]]))
    return folder
