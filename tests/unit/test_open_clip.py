"""A tower in OpenCLIP's files, as DFN's are published, is the tower that the same weights are under CLIP's names."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deepstack_jax.errors import WeightsError
from deepstack_jax.families.base import TOWER
from deepstack_jax.weights.load import stored_leaves
from deepstack_jax.weights.open_checkpoint import StoredModel, open_checkpoint
from tests.parity.goldens import write_folder
from tests.unit.bins import write_bin

CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 28, "layers": 4, "width": 32, "head_width": 8, "mlp_ratio": 2.0, "patch_size": 7},
        "text_cfg": {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
}
# From the names of CLIP to those of OpenCLIP.
NAMES = (
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.patch_embedding", "conv1"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"pre_layrnorm", "ln_pre"),
    (r"post_layernorm", "ln_post"),
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)", r"transformer.resblocks.\1.ln_\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj", r"transformer.resblocks.\1.attn.out_proj"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1", r"transformer.resblocks.\1.mlp.c_fc"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2", r"transformer.resblocks.\1.mlp.c_proj"),
)


def as_open_clip(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The whole model's tensors, some of its text part among them."""
    made = {"logit_scale": np.ones((), np.float32), "text_projection": np.ones((16, 16), np.float32)}
    made |= {"transformer.resblocks.0.ln_1.weight": np.ones(16, np.float32), "visual.proj": np.ones((32, 16), np.float32)}
    made |= {"positional_embedding": np.ones((8, 16), np.float32), "token_embedding.weight": np.ones((10, 16), np.float32)}
    for name, tensor in tensors.items():
        name = name.removeprefix("vision_model.")
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [tensors[f"vision_model.{name}".replace("q_proj", f"{part}_proj")] for part in "qkv"]
            made[f"visual.transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = np.concatenate(parts)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            for theirs, ours in NAMES:
                name = re.sub(theirs, ours, name)
            made[f"visual.{name}"] = tensor
    return made


def read(stored: StoredModel) -> dict[str, np.ndarray]:
    """Its parameters."""
    leaves = stored_leaves(stored.tensors, stored.config)
    return {path: leaf[tuple(slice(None) for _ in leaf.shape)] for path, leaf in leaves.items()}


@pytest.fixture
def folder(tmp_path):
    """An official folder whose tower is beside it, under CLIP's names."""
    folder = write_folder("l_2d", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if not name.startswith(TOWER)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("safetensors", [True, False])
def test_it_is_the_same_tower(safetensors, folder):
    plain = open_checkpoint(folder)
    wanted = read(plain)
    clip = folder.parent / "clip"
    tensors = as_open_clip(load_file(clip / "model.safetensors"))
    for file in list(clip.iterdir()):
        file.unlink()
    (clip / "open_clip_config.json").write_text(json.dumps(CONFIG))
    if safetensors:
        save_file(tensors, clip / "open_clip_model.safetensors")
    else:
        write_bin(clip / "open_clip_pytorch_model.bin", tensors)
    found = open_checkpoint(folder)
    assert found.config.vision == plain.config.vision
    assert (found.config.image.mean, found.config.image.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    ours = read(found)
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("vision_cfg", "timm_model_name", "vit_base", "vision_cfg has timm_model_name, expected a ViT"),
        ("vision_cfg", "layers", [3, 4, 6, 3], r"layers is \[3, 4, 6, 3\], expected a whole number"),
        ("vision_cfg", "head_width", 7, "width is 32, expected a multiple of head_width 7"),
        ("preprocess_cfg", "resize_mode", "longest", "resize_mode is 'longest', expected 'shortest' or 'squash'"),
        ("preprocess_cfg", "blur", 1, "preprocess_cfg has 'blur'"),
    ],
)
def test_what_is_not_clips_arithmetic_is_refused(part, key, value, message, folder):
    clip, values = folder.parent / "clip", json.loads(json.dumps(CONFIG))
    (values["model_cfg"] if part == "vision_cfg" else values)[part][key] = value
    for file in ("config.json", "preprocessor_config.json"):
        (clip / file).unlink()
    (clip / "open_clip_config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(folder)
