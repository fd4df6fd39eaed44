"""Reads a golden case: what the official PyTorch code computed, as this project's config, parameters and batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file

from deepstack_jax.batch import Batch, BatchShape, empty_batch
from deepstack_jax.config import CLIP_MEAN, CLIP_STD, DecoderConfig, DeepStackConfig, ImageConfig, VisionConfig
from deepstack_jax.data.rows import Cursor, EncodedExample, place_example
from deepstack_jax.layout.sequence import group_count, image_layout, visual_token_count
from deepstack_jax.layout.stack import layer_schedule
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.weights.names import from_official

GOLDEN = Path(__file__).parents[1] / "golden"
VISION = VisionConfig(patch_size=7, width=32, layers=4, heads=4, mlp=64)
SIDE, PATCHES, CROP = 4, 16, 28
ABLATIONS = {"": ("global", "crops"), "string_withglobal": ("global_crops", "none"), "only_global_features": ("zero", "global")}


@dataclass(frozen=True)
class Case:
    name: str
    info: dict
    arrays: dict[str, np.ndarray]
    image: ImageConfig
    decoder: DecoderConfig
    deepstack: DeepStackConfig

    def model(self, **overrides) -> DeepStack:
        groups = group_count(self.deepstack.stack, self.image.num_crops)
        schedule = layer_schedule(self.decoder.layers, groups, self.deepstack.start, self.deepstack.interval)
        settings = {"image": self.image, "vision": VISION, "decoder": self.decoder, "schedule": schedule}
        return DeepStack(**(settings | overrides))


def load_case(name: str) -> Case:
    info = json.loads((GOLDEN / name / "case.json").read_text())
    with np.load(GOLDEN / name / "case.npz") as stored:
        arrays = dict(stored)
    c = info["config"]
    decoder = DecoderConfig(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"],
        mlp=c["intermediate_size"],
        norm_eps=c["rms_norm_eps"],
        rope_theta=c["rope_theta"],
    )
    if c["image_aspect_ratio"] == "pad":
        image, deepstack = ImageConfig(mode="pad", size=CROP, num_crops=0), DeepStackConfig(stack="none")
    else:
        sequence, stack = ABLATIONS[c["deepstack_args_for_ablation"]]
        image = ImageConfig(mode="deepstack", size=CROP, num_crops=c["num_crops"])
        deepstack = DeepStackConfig(sequence, stack, c["deepstack_sampling"], c["deepstack_start_id"], c["deepstack_interval"])
    return Case(name, info, arrays, image, decoder, deepstack)


def load_params(case: Case, shapes: dict) -> dict:
    """Official weights in our tree; `shapes` is the abstract parameter tree."""
    tensors = load_file(GOLDEN / case.info["hf_weights"])
    flat = {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(shapes["params"]).items()}
    ours = from_official(tensors, flat)
    return {"params": traverse_util.unflatten_dict({tuple(path.split("/")): leaf for path, leaf in ours.items()})}


def uint8_pixels(pixels: np.ndarray) -> np.ndarray:
    """Undo the normalisation: f32[n, 3, y, x] -> u8[n, y, x, 3]."""
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    return np.rint((pixels.transpose(0, 2, 3, 1) * CLIP_STD + CLIP_MEAN) * 255).astype(np.uint8)


def build_batch(case: Case, rows: list[int] | None = None) -> Batch:
    """The case's samples, one per row, right padded to the case's own length."""
    a = case.arrays
    rows = list(range(len(a["input_ids"]))) if rows is None else rows
    m = visual_token_count(case.deepstack.sequence, case.image.num_crops, PATCHES)
    groups = group_count(case.deepstack.stack, case.image.num_crops)
    length = a["labels_expanded"].shape[1]
    batch = empty_batch(BatchShape(len(rows), length, 1 + case.image.num_crops, CROP, m, groups, 1))
    for at, row in enumerate(rows):
        grid = tuple(int(n) for n in a["bestgrid"][row][::-1]) if "bestgrid" in a else None
        layout = image_layout(
            grid,
            SIDE,
            num_crops=case.image.num_crops,
            sampling=case.deepstack.sampling,
            sequence=case.deepstack.sequence,
            stack=case.deepstack.stack,
        )
        ids = a["input_ids"][row][a["attention_mask"][row].astype(bool)].astype(np.int32)
        labels = a["labels"][row][a["attention_mask"][row].astype(bool)]
        pixels = uint8_pixels(a[f"pixels_{row}"])
        place_example(batch, at, EncodedExample(row, ids, labels != -100, (pixels,), (layout,)), Cursor(), PATCHES)
    return batch
