"""Reads a golden case: what the official PyTorch code computed, as this project's config, parameters and batch."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax import traverse_util
from PIL import Image
from safetensors.numpy import load_file, save_file

from deepstack_jax.batch import Batch, empty_batch
from deepstack_jax.config import Config
from deepstack_jax.data.encode.batch_rows import Cursor, EncodedExample, place_example
from deepstack_jax.data.encode.image import image_grid, make_views
from deepstack_jax.families.build import build_model
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.weights import load as weights
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.open_checkpoint import StoredModel, open_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Case:
    name: str
    info: dict
    arrays: dict[str, np.ndarray]
    checkpoint: StoredModel
    config: Config

    def model(self, **more) -> DeepStack:
        return build_model(self.config, **more)


def load_case(name: str) -> Case:
    """A case through the importer: configuration and weights come from the checkpoint folder as users have it."""
    info = json.loads((GOLDEN / name / "case.json").read_text())
    with np.load(GOLDEN / name / "case.npz") as stored:
        arrays = dict(stored)
    folder = Path(_scratch().name) / name
    checkpoint = open_checkpoint(folder / "hf" if folder.exists() else write_folder(name, folder))
    train = dataclasses.replace(checkpoint.config.train, compute_dtype="float32")
    return Case(name, info, arrays, checkpoint, dataclasses.replace(checkpoint.config, train=train))


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="golden-")


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


def load_params(case: Case) -> dict:
    """The case's weights as variables of our model."""
    return {"params": weights.load_params(case.checkpoint.tensors, case.config)}


def official_names(case: Case, tree: dict) -> dict[str, np.ndarray]:
    """A tree like the parameters (say, their gradients) under the official names and shapes, by the exporter's table."""
    leaves = {"/".join(path): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree).items()}
    table = NameTable(case.config)
    return {name: table.theirs(name, leaves) for name in table.tensors}


def open_images() -> list[Image.Image]:
    """The two pictures of all cases."""
    return [Image.open(GOLDEN / "images" / f"img{i}.png") for i in (0, 1)]


def build_batch(case: Case, rows: list[int] | None = None) -> Batch:
    """The case's samples, one per row, right padded to the case's own length."""
    a, spec, images = case.arrays, case.config.layout, open_images()
    rows = list(range(len(a["input_ids"]))) if rows is None else rows
    length = a["labels_expanded"].shape[1]
    batch = empty_batch(case.config.data_spec.batch_shape(len(rows), length))
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
