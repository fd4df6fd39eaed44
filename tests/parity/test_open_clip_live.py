"""Towers that OpenCLIP's own package makes and saves, beside what it computes with them: runs where that is installed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import deepstack_jax as dsx
from deepstack_jax.data.encode.image import make_views
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.base import TOWER
from tests.parity.goldens import write_folder

torch = pytest.importorskip("torch", reason="torch is not installed: the package does not need it, only this comparison does")
open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed: only this comparison needs it")
from open_clip.model import set_model_preprocess_cfg  # noqa: E402, since it needs both
from open_clip.push_to_hf_hub import save_for_hf  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402

TEXT = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
# As the package's own configurations of these names, an eighth or less of the width.
TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ViT-B-32": ({"vision_cfg": {"image_size": 64, "layers": 3, "width": 32, "head_width": 8, "patch_size": 32}}, {}),
    "DFN's ViT-H-14-378": (
        {
            "quick_gelu": True,
            "vision_cfg": {"image_size": 42, "layers": 4, "width": 32, "head_width": 16, "patch_size": 14},
        },
        {"interpolation": "bicubic", "resize_mode": "squash"},
    ),
}


class NoTokenizer:
    """Of the text part, which is not looked at."""

    def save_pretrained(self, folder: Path) -> None:
        pass


@pytest.fixture(params=TOWERS)
def made(request, tmp_path):
    """(OpenCLIP's model, its image transform, an official folder with that tower)."""
    values, preprocess = TOWERS[request.param]
    config = {"embed_dim": 16, "text_cfg": TEXT, **values}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.2)
    settings = PreprocessCfg(size=values["vision_cfg"]["image_size"], **preprocess)
    set_model_preprocess_cfg(model, dataclasses.asdict(settings))
    folder = write_folder("l_2d", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if not name.startswith(TOWER)}, folder / "model.safetensors")
    clip = folder.parent / "clip"
    for file in list(clip.iterdir()):
        file.unlink()
    save_for_hf(model, NoTokenizer(), config, clip, safe_serialization="both")
    transform = image_transform_v2(settings, is_train=False)
    return model, transform, folder


def test_features_are_those_of_open_clip(made):
    """Of the next to last layer, from pixels that its transform makes where the image is squashed as here."""
    model, transform, folder = made
    lmm = dsx.load(folder)
    size, own = lmm.config.image.size, lmm.config.image
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    squashes = json.loads((folder.parent / "clip" / "open_clip_config.json").read_text())["preprocess_cfg"]
    if squashes.get("resize_mode") != "squash":
        picture = picture.resize((size, size))
    values = transform(picture)
    view = make_views(picture, dataclasses.replace(own, mode="stretch", global_filter="bicubic")).pixels[:1]
    mine = (view[0].astype(np.float32) / 255 - np.float32(own.mean)) / np.float32(own.std)
    np.testing.assert_allclose(np.moveaxis(mine, -1, 0), values.numpy(), atol=1e-6)
    with torch.no_grad():
        found = model.visual.forward_intermediates(values[None], indices=[-2], output_fmt="NLC", stop_early=True)
    wanted = found["image_intermediates"][-1][0].numpy()
    features = lmm.answerer.model.apply({"params": lmm.params}, view[None], method="encode")[0]
    np.testing.assert_allclose(np.asarray(features)[0], wanted, atol=1e-4)


def test_a_squashed_tower_is_not_shown_the_middle_alone(made):
    """`square` cuts it out, which is what the other towers of OpenCLIP are made for."""
    _, _, folder = made
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "llava_llama", "image_aspect_ratio": "square"}
    (folder / "config.json").write_text(json.dumps(values))
    clip = json.loads((folder.parent / "clip" / "open_clip_config.json").read_text())
    if clip["preprocess_cfg"].get("resize_mode") == "squash":
        with pytest.raises(WeightsError, match="do_center_crop is False, expected True"):
            dsx.load(folder)
    else:
        assert dsx.load(folder).config.image.mode == "square"
