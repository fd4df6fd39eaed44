"""A Hugging Face config.json as our Config: official DeepStack, original LLaVA, `llava-hf`, and the towers that they name."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from deepstack_jax.config import Config, DataConfig, DeepStackConfig, ImageConfig, ProjectorConfig, VisionConfig, check_config
from deepstack_jax.config.checks import CHOICES
from deepstack_jax.errors import nearest
from deepstack_jax.printing import quote
from deepstack_jax.weights.ablations import ablation_text, ablations_from, pooled_baseline
from deepstack_jax.weights.files import WeightsError
from deepstack_jax.weights.hf_decoder import decoder_from, expect, flag, number, real, section, word
from deepstack_jax.weights.hf_image import check_pinpoints, image_values, pads, pinpoints_from
from deepstack_jax.weights.io import present

# model_type -> the decoder that it has.
OFFICIAL = {
    "deepstack_llama": "llama",
    "deepstack_phi": "phi3",
    "llava_llama": "llama",
    "llava": "llama",
    "llava_mistral": "mistral",
}
DEEPSTACK = ("deepstack_llama", "deepstack_phi")
LLAVA_HF = ("llava", "llava_next")  # with a text_config
BARE = {"llama": "llama", "mistral": "mistral", "phi3": "phi3"}
TOWERS = ("clip", "clip_vision_model")
_TOWER_DEFAULTS = {  # transformers' CLIPVisionConfig
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_LLAVA_HF_TOWER = {  # what `llava-hf` folders assume where their vision_config says nothing
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# Keys of config.json that our Config does not describe and an export carries over.
PASSTHROUGH_KEYS = (
    "attention_dropout",
    "bos_token_id",
    "embd_pdrop",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "pretraining_tp",
    "resid_pdrop",
    "use_cache",
)
# Keys that can say the same in several ways; an export keeps the folder's own way where it still says the same.
VERBATIM_KEYS = ("deepstack_args_for_ablation", "deepstack_start_id", "deepstack_sampling", "image_grid_pinpoints")
# Keys of the multimodal part that have no prefix to be known by.
UNPREFIXED = ("is_anyres_deepstack", "num_crops", "twoviews_unshare")
# Keys of the multimodal part that official and LLaVA's folders have, those that only their trainers read included.
KNOWN = (
    *UNPREFIXED,
    *("deepstack_args_for_ablation", "deepstack_interval", "deepstack_sampling", "deepstack_start_id"),
    *("image_aspect_ratio", "image_crop_resolution", "image_grid_pinpoints", "image_split_resolution"),
    *("mm_hidden_size", "mm_patch_merge_type", "mm_projector_lr", "mm_projector_type", "mm_resampler_type"),
    *("mm_use_im_patch_token", "mm_use_im_start_end", "mm_vision_select_feature", "mm_vision_select_layer"),
    *("mm_vision_tower", "mm_vision_tower_lr"),
)
MERGES = CHOICES["image.merge"]


def is_llava_hf(values: Mapping[str, Any]) -> bool:
    """Whether this is a config.json of `llava-hf`, which names its parts, and not an original LLaVA."""
    return bool({"text_config", "vision_config"} & set(values)) or values.get("model_type") == "llava_next"


def from_hf(
    values: Mapping[str, Any], tower: Mapping[str, Any] | None = None, preprocessor: Mapping[str, Any] | None = None
) -> Config:
    """The Config of a checkpoint: model, image and DeepStack sections, template and length.

    Args:
      values: its config.json.
      tower: config.json of the vision tower that it names; `llava-hf` folders hold their own.
      preprocessor: settings of the image processor beside the tower (beside the folder's config.json for `llava-hf`).

    Raises:
      WeightsError: a value that is unknown or not implemented; going on would compute another model than the file's.
    """
    values, tower, pixels = present(values), present(tower), present(preprocessor or {})
    kind = word(values, "model_type")
    if "quantization_config" in values:
        raise WeightsError("config.json: quantization_config is set; quantised weights are not read: give the full model")
    inner = is_llava_hf(values) and kind in LLAVA_HF
    if not inner and kind not in OFFICIAL:
        valid = sorted({*OFFICIAL, *LLAVA_HF})
        raise WeightsError(
            f"config.json: model_type is {quote(kind)}, expected {', '.join(valid)} (a bare {', '.join(BARE)} needs --tower "
            f"and a recipe); {nearest(kind[:100], valid)}"
        )
    try:
        config = _from_llava_hf(values, pixels) if inner else _from_official(values, tower, pixels)
        check_config(config)
        return config
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"config.json describes a model that cannot run: {error}") from error


def _from_official(values: Mapping[str, Any], tower: Mapping[str, Any] | None, preprocessor: Mapping[str, Any]) -> Config:
    _refuse(values)
    if tower is None:
        raise WeightsError(
            f"config.json: mm_vision_tower is {quote(values.get('mm_vision_tower'))}, which is no folder here; put the "
            "tower's folder beside config.json under that name, or name it with --tower=DIR"
        )
    kind = OFFICIAL[values["model_type"]]
    vision, size = tower_from(tower)
    vision = dataclasses.replace(
        vision, feature_layer=number({"mm_vision_select_layer": -2} | dict(values), "mm_vision_select_layer", above=None)
    )
    expect(values, "mm_hidden_size", vision.width, move="the tower is another one than the projector was trained on")
    decoder = decoder_from(values, kind)
    parts = _deepstack(values, vision.layers) if values.get("image_aspect_ratio") == "deepstack" else _baseline(values)
    if values["model_type"] in DEEPSTACK and parts["image"]["mode"] in ("pad", "square"):
        parts["deepstack"] |= pooled_baseline(ablation_text(values))
    if parts["deepstack"].get("start", 0) >= decoder.layers:  # upstream then injects nothing
        parts["deepstack"] = _never_injected(parts["deepstack"], decoder.layers)
    image = ImageConfig(size=size, **image_values(preprocessor, size, parts["image"]["mode"], "official"), **parts["image"])
    vision = dataclasses.replace(vision, **parts["vision"])
    config = Config(
        image=image,
        vision=vision,
        projector=_projector(values),
        decoder=decoder,
        deepstack=DeepStackConfig(**parts["deepstack"]),
    )
    length = values.get("tokenizer_model_max_length", decoder.max_positions)
    return _with_data(config, length, "phi3_instruct" if kind == "phi3" else "v1")


def _refuse(values: Mapping[str, Any]) -> None:
    """What official folders can ask for and nothing here computes."""
    other = "choose a checkpoint without it"
    _refuse_unknown(values)
    for key in ("twoviews_unshare", "s2", "mm_use_im_start_end"):
        expect(values, key, False, move=other)
    expect(values, "mm_vision_select_feature", "patch", move=other)
    expect(values, "mm_resampler_type", move="choose a checkpoint without it")


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    """Keys of the multimodal part that nobody here knows: a misspelt one would silently be its default."""
    for key, value in values.items():
        if key in KNOWN:
            continue
        if key.startswith(("mm_", "image_", "deepstack_")) or difflib.get_close_matches(key, UNPREFIXED, cutoff=0.85):
            raise WeightsError(
                f"config.json: {key[:200]} is {quote(value)}, a key that the official code does not have; "
                f"{nearest(key, KNOWN)}; remove it if nothing depends on it"
            )


def _projector(values: Mapping[str, Any]) -> ProjectorConfig:
    kind = word(values, "mm_projector_type", "linear")
    match = re.fullmatch(r"linear|mlp([1-9])x_gelu", kind)
    if not match:
        raise WeightsError(f"config.json: mm_projector_type is {quote(kind)}, expected linear or mlpNx_gelu")
    if kind == "mlp1x_gelu":  # named like a list of layers, and one nonetheless
        raise WeightsError("config.json: mm_projector_type is 'mlp1x_gelu', one layer: call it 'linear', its tensors too")
    return ProjectorConfig(int(match[1] or 1))


def _deepstack(values: Mapping[str, Any], tower_layers: int) -> dict[str, dict[str, Any]]:
    """Image and DeepStack values of image_aspect_ratio 'deepstack', defaults as upstream has them."""
    parts = ablations_from(ablation_text(values), tower_layers)
    image, stack = parts["image"], parts["deepstack"]
    if "num_crops" not in values:
        raise WeightsError("config.json: num_crops is missing, which image_aspect_ratio 'deepstack' needs; the paper has 4")
    image["num_crops"] = number(values, "num_crops", above=0 if image.get("grid") == "square" else 1)
    image["mode"] = "hd" if flag(values, "is_anyres_deepstack", False) else "deepstack"
    image["merge"] = _merge(values)
    counts = {"deepstack_start_id": 1, "deepstack_interval": 1} | dict(values)
    stack["start"] = number(counts, "deepstack_start_id", above=-1)
    stack["interval"] = number(counts, "deepstack_interval")
    sampling = word(values, "deepstack_sampling", "2d")
    if sampling not in ("2d", "1d", "grid", "2d_scaledown"):
        raise WeightsError(
            f"config.json: deepstack_sampling is {quote(sampling)}, expected 2d, 1d, grid or 2d_scaledown; "
            + nearest(sampling, ("2d", "1d", "grid", "2d_scaledown"))
        )
    if image["mode"] == "deepstack" and stack.get("into") != "vision":  # elsewhere upstream does not look at it
        stack |= {"sampling": "2d", "pool": 2} if sampling == "2d_scaledown" else {"sampling": sampling}
    return parts


def _baseline(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Image values of LLaVA-1.5 and LLaVA-NeXT."""
    aspect = word(values, "image_aspect_ratio") or "square"
    modes = ("pad", "anyres", "square")
    if aspect not in modes:
        raise WeightsError(
            f"config.json: image_aspect_ratio is {quote(aspect)}, expected deepstack, pad, anyres or square; "
            + nearest(aspect, ("deepstack", *modes))
        )
    image: dict[str, Any] = {"mode": aspect, "merge": _merge(values)}
    if aspect == "anyres":
        image["pinpoints"] = pinpoints_from(values.get("image_grid_pinpoints"))
    return {"image": image, "deepstack": {"stack": "none"}, "vision": {}}


def _never_injected(stack: dict[str, Any], layers: int) -> dict[str, Any]:
    """DeepStack values of a folder whose injection begins behind the last layer."""
    if stack.get("into") != "vision" and stack.get("stack") != "none":
        warnings.warn(
            f"config.json: deepstack_start_id is {stack['start']}, behind the last of {layers} layers: nothing is injected",
            stacklevel=2,
        )
        stack = stack | {"stack": "none"}
    return stack | {"start": DeepStackConfig.start}


def _merge(values: Mapping[str, Any]) -> str:
    merge = word(values, "mm_patch_merge_type") or "flat"
    if merge not in MERGES:
        raise WeightsError(
            f"config.json: mm_patch_merge_type is {quote(merge)}, expected {', '.join(MERGES)}; {nearest(merge, MERGES)}"
        )
    return merge


def _from_llava_hf(values: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Config:
    other = "choose a checkpoint without it"
    text, inner = section(values, "text_config"), section(values, "vision_config")
    kind = word(text, "model_type", "llama")
    if kind not in BARE:
        raise WeightsError(f"config.json: text_config has model_type {quote(kind)}, expected {', '.join(BARE)}; {other}")
    expect(values, "vision_feature_select_strategy", "default", move=other)
    expect(values, "projector_hidden_act", "gelu", move=other)
    expect(values, "multimodal_projector_bias", True, move=other)
    expect(values, "tie_word_embeddings", False, move="save the model with a head of its own first")
    expect(values, "use_image_newline_parameter", True, move=other)
    vision, size = tower_from({"model_type": "clip_vision_model"} | _LLAVA_HF_TOWER | dict(inner))
    layer = values.get("vision_feature_layer", -2)
    if type(layer) is not int:
        raise WeightsError(f"config.json: vision_feature_layer is {quote(layer)}, expected one layer such as -2; {other}")
    model = values["model_type"]
    mode = "anyres" if model == "llava_next" else "pad" if pads(preprocessor) else "square"
    pixels = image_values(preprocessor, size, mode, model)
    if model == "llava_next":
        pairs = values.get("image_grid_pinpoints") or [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        check_pinpoints(preprocessor, pairs)
        points = tuple((width, height) for height, width in pinpoints_from(pairs))  # there they are (height, width)
        image = ImageConfig(mode=mode, merge="spatial_unpad", size=size, pinpoints=points, **pixels)
    else:
        image = ImageConfig(mode=mode, size=size, **pixels)
    decoder = decoder_from(text, kind)
    if decoder.rope.scaling == "yarn":  # transformers 5 computes Phi-3's as longrope
        decoder = dataclasses.replace(decoder, rope=dataclasses.replace(decoder.rope, scaling="longrope"))
    if decoder.sliding_window:  # transformers counts the token itself, upstream's masks do not
        decoder = dataclasses.replace(decoder, sliding_window=decoder.sliding_window - 1)
    config = Config(
        image=image,
        vision=dataclasses.replace(vision, feature_layer=layer),
        decoder=decoder,
        deepstack=DeepStackConfig(stack="none"),
    )
    return _with_data(config, config.decoder.max_positions, "phi3_instruct" if kind == "phi3" else "v1")


def tower_from(values: Mapping[str, Any]) -> tuple[VisionConfig, int]:
    """A CLIP's config.json (of a whole CLIP or of its tower) as VisionConfig and its picture size in pixels.

    Raises:
      WeightsError: no CLIP.
    """
    values = present(values)
    kind = word(values, "model_type")
    if kind not in TOWERS:
        raise WeightsError(
            f"the vision tower's config.json has model_type {quote(kind)}, expected {' or '.join(TOWERS)}; "
            "give one with --tower=DIR"
        )
    if kind == "clip":
        values = section(values, "vision_config") or section(values, "vision_config_dict")
    get = _TOWER_DEFAULTS | dict(values)
    expect(get, "hidden_act", "quick_gelu", "gelu", move="choose another tower")
    expect(get, "num_channels", 3, move="choose another tower")
    vision = VisionConfig(
        patch_size=number(get, "patch_size"),
        width=number(get, "hidden_size"),
        layers=number(get, "num_hidden_layers"),
        heads=number(get, "num_attention_heads"),
        mlp=number(get, "intermediate_size"),
        activation=get["hidden_act"],
        norm_eps=real(get, "layer_norm_eps"),
    )
    return vision, number(get, "image_size")


def _with_data(config: Config, length: Any, template: str) -> Config:
    """With template and length; a tokenizer's round 10**30 for "no limit" becomes the model's own."""
    needed = config.visual_tokens_per_image
    if type(length) is not int or not needed < length <= 2**24:
        length = max(config.decoder.max_positions, math.ceil((needed + 1) / 1024) * 1024)
    return dataclasses.replace(config, data=DataConfig(template=template, max_length=length))


def check_against(run: Config, stored: Config, *, bare: bool = False) -> None:
    """Refuse weights of other sizes than a run's model has.

    Args:
      run: the run's configuration. stored: the checkpoint's.
      bare: the checkpoint is a bare tower and a bare language model, which say nothing about the feature layer.

    Raises:
      WeightsError: lists every key that differs, both values.
    """
    ours, theirs = dataclasses.asdict(run), dataclasses.asdict(stored)
    keys = [
        "image.size",
        *(f"vision.{key}" for key in ("patch_size", "width", "layers", "heads", "mlp", "activation", "norm_eps")),
    ]
    keys += [] if bare else ["vision.feature_layer", "projector.layers"]
    sizes = ("architecture", "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp", "norm_eps", "rope")
    keys += [f"decoder.{key}" for key in (*sizes, "sliding_window")]
    differing = []
    for key in keys:
        section, name = key.split(".")
        if ours[section][name] != theirs[section][name]:
            differing.append(f"config.{key} is {ours[section][name]}, the weights have {theirs[section][name]}")
    if differing:
        raise WeightsError(f"the weights are of another model than the run's: {'; '.join(differing)}; change one of them")
