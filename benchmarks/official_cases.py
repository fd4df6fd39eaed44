"""Runs the official PyTorch code over many variants and writes what it computes, for `benchmarks.parity_table` to compare.

Runs in an environment of its own, since the official code needs old versions:

    pip install torch transformers==4.39.3 "numpy<2" pillow==13.0.0 safetensors sentencepiece
    git clone https://github.com/MengLcool/DeepStack-VL
    python benchmarks/official_cases.py DeepStack-VL cases/
    python -m benchmarks.parity_table cases/          # back in this project's environment

Each case becomes a folder `hf/` as `save_pretrained` writes it, `clip/`, and case.npz with input ids, mask, and logits. Weights
are those of `tests/golden`, and seeded noise where a variant has other shapes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from official_pictures import GOLDEN, pictures
from safetensors.torch import load_file

FACTORS = [1.0, 1.2, 1.5, 2.0, 2.5, 3.0]
LONGROPE = {"short_factor": FACTORS, "long_factor": [3 * factor for factor in FACTORS]}


def flags(text: str) -> dict:
    return {"deepstack_args_for_ablation": text}


def vit(start: str) -> dict:
    return flags(f"2xsample+deepstack_vit{start}")


# name: (golden case that the configuration starts from, what is changed)
CASES: dict[str, tuple[str, dict]] = {
    "l": ("l_2d", {}),
    "l_6_crops": ("l_2d", {"num_crops": 6}),
    "l_9_crops_start_0": ("l_2d", {"num_crops": 9, "deepstack_start_id": 0}),
    "l_2xsample_6_crops": ("l_2d", {"num_crops": 6, **flags("2xsample")}),
    "l_letterbox": ("l_2d", flags("anyres_unpad")),
    "l_letterbox_1d": ("l_2d", {"deepstack_sampling": "1d", **flags("inconsistent")}),
    "l_dummy": ("l_2d", flags("dummy_local")),
    "l_global_and_local": ("l_2d", flags("global_and_local")),
    "l_only_global": ("l_2d", flags("only_global_features")),
    "l_string_woglobal": ("l_2d", flags("string_woglobal")),
    "l_string_withglobal": ("l_2d", flags("string_withglobal")),
    "l_gqa": ("l_2d", {"num_key_value_heads": 2}),
    "l_linear_rope": ("l_2d", {"num_key_value_heads": 1, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "l_theta": ("l_2d", {"rope_theta": 500000.0, "rms_norm_eps": 1e-6}),
    "l_feature_layer_-3": ("l_2d", {"mm_vision_select_layer": -3}),
    "l_feature_layer_-1": ("l_2d", {"mm_vision_select_layer": -1}),
    "l_feature_layer_2": ("l_2d", {"mm_vision_select_layer": 2}),
    "l_linear_projector": ("l_2d", {"mm_projector_type": "linear"}),
    "l_mlp3_projector": ("l_2d", {"mm_projector_type": "mlp3x_gelu"}),
    "l_unused_newline": ("l_2d", {"mm_patch_merge_type": "spatial_unpad"}),
    "pad": ("l_2d", {"image_aspect_ratio": "pad"}),
    "square": ("l_2d", {"image_aspect_ratio": "square"}),
    "pad_pooled": ("l_2d", {"image_aspect_ratio": "pad", **flags("scaledown_clip")}),
    "v_0": ("v", vit("+lsvit_start_layer_0")),
    "v_1": ("v", vit("+lsvit_start_layer_1")),
    "v_3": ("v", vit("+lsvit_start_layer_3")),
    "v_4_post_encoder": ("v", vit("+lsvit_start_layer_4")),
    "v_5_post_encoder": ("v", vit("+lsvit_start_layer_5")),
    "v_9_crops": ("v", {"num_crops": 9, **vit("+lsvit_start_layer_1")}),
    "hd": ("hd", {}),
    "hd_9_crops": ("hd", {"num_crops": 9}),
    "hd_6_crops": ("hd", {"num_crops": 6}),
    "hd_start_2_interval_2": ("hd", {"deepstack_start_id": 2, "deepstack_interval": 2}),
    "hd_dummy": ("hd", flags("dummy_local")),
    "hd_letterbox": ("hd", flags("anyres_unpad")),
    "hd_2xsample": ("hd", flags("2xsample")),
    "next_flat": ("llava_next", {"mm_patch_merge_type": "flat"}),
    "next_spatial": ("llava_next", {"mm_patch_merge_type": "spatial"}),
    "next_spatial_unpad": ("llava_next", {}),
    "next_other_pinpoints": ("llava_next", {"image_grid_pinpoints": [[28, 28], [84, 56], [56, 84], [112, 28]]}),
    "llava15": ("llava15", {}),
    "llava15_square": ("llava15", {"image_aspect_ratio": "square"}),
    "phi": ("phi", {}),
    "phi_gqa": ("phi", {"num_key_value_heads": 2}),
    "phi_sliding_window": ("phi", {"sliding_window": 7}),
    "phi_longrope_short": ("phi", {"rope_scaling": {"type": "su", **LONGROPE}, "original_max_position_embeddings": 1024}),
    "phi_longrope_long": ("phi", {"rope_scaling": {"type": "su", **LONGROPE}, "original_max_position_embeddings": 16}),
    "phi_yarn": ("phi", {"rope_scaling": {"type": "yarn", **LONGROPE}, "original_max_position_embeddings": 16}),
    "phi_v": ("phi", vit("+lsvit_start_layer_2")),
    "phi_hd": ("phi", {"is_anyres_deepstack": True, "mm_patch_merge_type": "spatial_unpad"}),
}
TEXTS = ((3, 9), (1, 5), (6, 4))  # words before and after the image of each row


def build(name: str, out: Path):
    """The official model of a case, with its folder begun at `out`."""
    from llava.model.language_model.deepstack_llama import DeepstackConfig, DeepstackLlamaForCausalLM
    from llava.model.language_model.deepstack_phi import DeepstackPhiConfig, DeepstackPhiForCausalLM
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    base, changes = CASES[name]
    case = json.loads((GOLDEN / base / "case.json").read_text())
    values = json.loads((GOLDEN / base / "hf" / "config.json").read_text()) | changes
    config_class, model_class = {
        "llama": (DeepstackConfig, DeepstackLlamaForCausalLM),
        "phi3": (DeepstackPhiConfig, DeepstackPhiForCausalLM),
        "llava": (LlavaConfig, LlavaLlamaForCausalLM),
    }[case["arch"]]
    shutil.copytree(GOLDEN / "clip", out / "clip")
    shutil.copyfile(GOLDEN / "weights" / "clip4" / "model.safetensors", out / "clip" / "model.safetensors")
    values = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
    config = config_class(**values | {"mm_vision_tower": str((out / "clip").resolve())})
    config._attn_implementation = "eager"
    model = model_class(config).eval().float()
    if not model.get_vision_tower().is_loaded:
        model.get_vision_tower().load_model()
    stored = load_file(GOLDEN / case["hf_weights"])
    noise = torch.Generator().manual_seed(7)
    state = model.state_dict()
    for key, tensor in state.items():
        if key in stored and stored[key].shape == tensor.shape:
            tensor.copy_(stored[key])
        elif "vision_tower.vision_tower" not in key and tensor.is_floating_point():
            centre = float("norm" in key and key.endswith("weight"))
            tensor.copy_(centre + 0.15 * torch.randn(tensor.shape, generator=noise))
    model.load_state_dict(state)
    return model


@torch.no_grad()
def run(name: str, out: Path) -> None:
    from llava.mm_utils import process_anyres_image, process_images

    shutil.rmtree(out, ignore_errors=True)
    model, images = build(name, out), pictures()
    config, processor = model.config, model.get_vision_tower().image_processor
    pixels = process_images(images, processor, config)
    more: dict = {}
    if config.image_aspect_ratio == "deepstack":
        settings = (config.num_crops, config.is_anyres_deepstack, config.deepstack_args_for_ablation)
        more["bestgrid_list"] = [process_anyres_image(image, processor, *settings)[1] for image in images]
    elif config.image_aspect_ratio != "anyres":
        pixels = torch.stack(list(pixels))
    rng = np.random.default_rng(3)

    def words(count: int) -> list[int]:
        return rng.integers(3, config.vocab_size, count).tolist()

    rows = [[1, *words(before), -200, *words(after)] for before, after in TEXTS]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros(ids.shape, bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
    pixels = pixels if isinstance(pixels, torch.Tensor) else list(pixels)
    logits = model(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        images=pixels,
        image_sizes=[image.size for image in images],
        use_cache=False,
        **more,
    ).logits
    config.mm_vision_tower = "clip"
    model.save_pretrained(out / "hf", safe_serialization=True)
    np.savez_compressed(out / "case.npz", input_ids=ids, attention_mask=mask, logits=logits.numpy())
    print(f"{name}: logits {tuple(logits.shape)}, largest {float(logits.abs().max()):.2f}", flush=True)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/official_cases.py PATH_OF_DeepStack-VL OUTPUT_FOLDER")
    sys.path.insert(0, sys.argv[1])
    for name in CASES:
        run(name, Path(sys.argv[2]) / name)


if __name__ == "__main__":
    main()
