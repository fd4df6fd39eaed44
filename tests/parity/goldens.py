"""Reads a golden case: what the official PyTorch code computed, as this project's config, parameters and batch."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax import traverse_util
from PIL import Image
from safetensors.numpy import load_file, save_file

from deepstack_jax.batch import Batch, empty_batch
from deepstack_jax.config import Config, build_config, default_config
from deepstack_jax.data.image import image_grid, make_views
from deepstack_jax.data.rows import Cursor, EncodedExample, place_example
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.model.variants import build_model
from deepstack_jax.weights.names import from_official

GOLDEN = Path(__file__).parents[1] / "golden"
CROP = 28
ABLATIONS = {
    "": {},
    "string_withglobal": {"deepstack.sequence": "global_crops", "deepstack.stack": "none"},
    "only_global_features": {"deepstack.sequence": "zero", "deepstack.stack": "global"},
    "2xsample+deepstack_vit+lsvit_start_layer_2": {
        "image.grid": "square",
        "deepstack.into": "vision",
        "deepstack.vision_start": 2,
    },
}
TOWER = {
    "image.size": CROP,
    "vision.patch_size": 7,
    "vision.width": 32,
    "vision.layers": 4,
    "vision.heads": 4,
    "vision.mlp": 64,
    "train.compute_dtype": "float32",
}


@dataclass(frozen=True)
class Case:
    name: str
    info: dict
    arrays: dict[str, np.ndarray]
    config: Config

    def model(self, **more) -> DeepStack:
        return build_model(self.config, **more)


def load_case(name: str) -> Case:
    info = json.loads((GOLDEN / name / "case.json").read_text())
    with np.load(GOLDEN / name / "case.npz") as stored:
        arrays = dict(stored)
    c = info["config"]
    keys = TOWER | {
        "decoder.architecture": info["arch"].replace("llava", "llama"),
        "decoder.vocab_size": c["vocab_size"],
        "decoder.width": c["hidden_size"],
        "decoder.layers": c["num_hidden_layers"],
        "decoder.heads": c["num_attention_heads"],
        "decoder.kv_heads": c["num_key_value_heads"],
        "decoder.head_dim": c["hidden_size"] // c["num_attention_heads"],
        "decoder.mlp": c["intermediate_size"],
        "decoder.norm_eps": c["rms_norm_eps"],
        "decoder.rope.theta": c["rope_theta"],
    }
    mode = c["image_aspect_ratio"]
    if mode in ("pad", "anyres"):
        keys |= {"image.mode": mode, "image.merge": c["mm_patch_merge_type"], "image.num_crops": 0, "deepstack.stack": "none"}
        keys["image.pinpoints"] = tuple(tuple(size) for size in c.get("image_grid_pinpoints", ()))
    else:
        keys |= {
            "image.mode": "hd" if c["is_anyres_deepstack"] else "deepstack",
            "image.num_crops": c["num_crops"],
            "deepstack.sampling": c["deepstack_sampling"],
            "deepstack.start": c["deepstack_start_id"],
            "deepstack.interval": c["deepstack_interval"],
            **ABLATIONS[c["deepstack_args_for_ablation"]],
        }
    source = default_config()
    source.update_from_flattened_dict(keys)
    return Case(name, info, arrays, build_config(source))


def official_tensors(weights: str) -> dict[str, np.ndarray]:
    """Tensors of `weights/<name>/model.safetensors` under the official names, the vision tower among them."""
    tower = load_file(GOLDEN / "weights" / "clip4" / "model.safetensors")
    inside = {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    return load_file(GOLDEN / weights) | inside


def write_folder(name: str, folder: Path) -> Path:
    """The case's checkpoint as users have it: `hf/` (config.json, model.safetensors) and `clip/` in `folder`; returns `hf/`."""
    case = json.loads((GOLDEN / name / "case.json").read_text())
    for part in ("hf", "clip"):
        (folder / part).mkdir(parents=True)
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(GOLDEN / "clip" / file, folder / "clip" / file)
    shutil.copyfile(GOLDEN / "weights" / "clip4" / "model.safetensors", folder / "clip" / "model.safetensors")
    shutil.copyfile(GOLDEN / name / "hf" / "config.json", folder / "hf" / "config.json")
    save_file(official_tensors(case["hf_weights"]), folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    return folder / "hf"


def load_params(case: Case, shapes: dict) -> dict:
    """Official weights in our tree; `shapes` is the abstract parameter tree."""
    flat = {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(shapes["params"]).items()}
    ours = from_official(official_tensors(case.info["hf_weights"]), flat)
    return {"params": traverse_util.unflatten_dict({tuple(path.split("/")): leaf for path, leaf in ours.items()})}


def open_images() -> list[Image.Image]:
    """The two pictures of all cases."""
    return [Image.open(GOLDEN / "images" / f"img{i}.png") for i in (0, 1)]


def build_batch(case: Case, rows: list[int] | None = None) -> Batch:
    """The case's samples, one per row, right padded to the case's own length."""
    a, spec, images = case.arrays, case.config.layout, open_images()
    rows = list(range(len(a["input_ids"]))) if rows is None else rows
    length = a["labels_expanded"].shape[1]
    batch = empty_batch(case.config.batch_shape(len(rows), length))
    for at, row in enumerate(rows):
        size_wh = images[row].size
        grid = image_grid(size_wh, case.config.image)
        if "bestgrid" in a:
            assert grid == tuple(a["bestgrid"][row][::-1])
        layout = spec.layout(grid, size_wh)
        ids = a["input_ids"][row][a["attention_mask"][row].astype(bool)].astype(np.int32)
        labels = a["labels"][row][a["attention_mask"][row].astype(bool)]
        pixels = make_views(images[row], case.config.image).pixels
        place_example(batch, at, EncodedExample(row, ids, labels != -100, (pixels,), (layout,)), Cursor(), spec.patches)
    return batch
