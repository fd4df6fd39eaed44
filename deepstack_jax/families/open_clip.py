"""CLIP in OpenCLIP's files, as DFN's towers are published: a configuration and names of their own, the same arithmetic."""

import re
from collections.abc import Mapping
from typing import Any

from deepstack_jax.errors import WeightsError
from deepstack_jax.families.values import expect, flag, number, real, section
from deepstack_jax.printing import quote

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MODEL_TYPE = "open_clip"  # which such a file does not say
# Of the whole model, what the tower does not need, beside what is called as in CLIP.
NOT_THE_TOWER = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "attn_mask", "visual.proj")
_NAMES = {
    "visual.class_embedding": "embeddings.class_embedding",
    "visual.conv1.": "embeddings.patch_embedding.",
    "visual.positional_embedding": "embeddings.position_embedding.weight",
    "visual.ln_pre.": "pre_layrnorm.",
    "visual.ln_post.": "post_layernorm.",
}
_LAYER = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.(.*)")
_IN_LAYER = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_FUSED = "attn.in_proj_"  # queries, keys and values in one tensor, one after the other
_SIZES = ("image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size")
_DEFAULTS = {"head_width": 64, "mlp_ratio": 4.0}
_WITHOUT_EFFECT = ("patch_dropout", "pool_type", "final_ln_after_pool", "output_tokens")  # in training, or after the features


def clip_names(name: str) -> tuple[str, ...]:
    """What CLIP calls a tensor of `visual.`, or the equal parts that its rows are cut into."""
    match = _LAYER.fullmatch(name)
    head, rest, table = (f"encoder.layers.{match[1]}.", match[2], _IN_LAYER) if match else ("", name, _NAMES)
    if match and rest.startswith(_FUSED):
        return tuple(f"{head}self_attn.{part}_proj.{rest.removeprefix(_FUSED)}" for part in "qkv")
    return (next((head + ours + rest[len(theirs) :] for theirs, ours in table.items() if rest.startswith(theirs)), name),)


def clip_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same tower; WeightsError where its arithmetic is another than CLIP's."""
    model = section(values, "model_cfg")
    vision = {**_DEFAULTS, **section(model, "vision_cfg")}
    if unknown := sorted(set(vision) - {*_SIZES, *_WITHOUT_EFFECT}):
        raise WeightsError(
            f"{CONFIG}: vision_cfg has {', '.join(unknown)[:200]}, expected a ViT of {', '.join(_SIZES)}; choose another tower"
        )
    missing = [key for key in _SIZES if key not in vision]
    if missing:
        raise WeightsError(f"{CONFIG}: vision_cfg lacks {', '.join(missing)}; take it from the model's source")
    width, head = number(vision, "width"), number(vision, "head_width")
    if width % head:
        raise WeightsError(f"{CONFIG}: width is {width}, expected a multiple of head_width {head}; take it from the source")
    return {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu" if flag(model, "quick_gelu", False) else "gelu",
        "hidden_size": width,
        "image_size": number(vision, "image_size"),
        "intermediate_size": int(width * real(vision, "mlp_ratio")),
        "num_attention_heads": width // head,
        "num_hidden_layers": number(vision, "layers"),
        "patch_size": number(vision, "patch_size"),
    }


def clip_processor(values: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json of the same tower, which may see the whole image squashed into a square."""
    given = section(values, "preprocess_cfg")
    expect(given, "resize_mode", "shortest", "squash", move="choose another tower")
    expect(given, "interpolation", "bicubic", move="choose another tower")
    expect(given, "mode", "RGB", move="choose another tower")
    if unknown := sorted(set(given) - {"mean", "std", "resize_mode", "interpolation", "mode", "size", "fill_color"}):
        raise WeightsError(f"{CONFIG}: preprocess_cfg has {quote(unknown[0])}, which is not known; choose another tower")
    numbers = {f"image_{key}": given[key] for key in ("mean", "std") if key in given}
    return numbers | ({"do_center_crop": False} if given.get("resize_mode") == "squash" else {})
