"""A Hugging Face config.json as our Config: official DeepStack, original LLaVA, `llava-hf`, and the towers that they name."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from deepstack_jax.config import Config, DataConfig, DeepStackConfig, ImageConfig, ProjectorConfig, VisionConfig
from deepstack_jax.config_checks import CHOICES, ConfigError, check_config, nearest
from deepstack_jax.weights.ablations import ablation_text, ablations_from, pooled_baseline
from deepstack_jax.weights.files import WeightsError
from deepstack_jax.weights.hf_decoder import decoder_from, expect, number, real

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
CARRIED = (
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
WORDED = ("deepstack_args_for_ablation", "deepstack_start_id", "deepstack_sampling", "image_grid_pinpoints")
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
    return "text_config" in values or values.get("model_type") == "llava_next"


def from_hf(
    values: Mapping[str, Any], tower: Mapping[str, Any] | None = None, preprocessor: Mapping[str, Any] | None = None
) -> Config:
    """The Config of a checkpoint: model, image and DeepStack sections, template and length.

    Args:
      values: its config.json.
      tower: config.json of the vision tower that it names; `llava-hf` folders hold their own.
      preprocessor: preprocessor_config.json of the tower (of the folder itself for `llava-hf`), for mean and deviation.

    Raises:
      WeightsError: a value that is unknown or not implemented; going on would compute another model than the file's.
    """
    kind = values.get("model_type")
    if "quantization_config" in values:
        raise WeightsError("config.json: quantization_config is set; quantised weights are not read: give the full model")
    if is_llava_hf(values) and kind in LLAVA_HF:
        config = _from_llava_hf(values, preprocessor or {})
    elif kind in OFFICIAL:
        config = _from_official(values, tower, preprocessor or {})
    else:
        valid = sorted({*OFFICIAL, *LLAVA_HF})
        raise WeightsError(
            f"config.json: model_type is {kind!r}, expected {', '.join(valid)} (a bare {', '.join(BARE)} needs --tower and a "
            f"recipe); {nearest(str(kind), valid)}"
        )
    try:
        check_config(config)
    except ConfigError as error:
        raise WeightsError(f"config.json describes a model that cannot run: {error}") from error
    return config


def _from_official(values: Mapping[str, Any], tower: Mapping[str, Any] | None, preprocessor: Mapping[str, Any]) -> Config:
    _refuse(values)
    if tower is None:
        raise WeightsError(
            f"config.json: mm_vision_tower is {values.get('mm_vision_tower')!r}, which is no folder here; put the "
            "tower's folder beside config.json under that name, or name it: convert --tower=DIR, train --config.train.tower=DIR"
        )
    kind = OFFICIAL[values["model_type"]]
    vision, size = tower_from(tower)
    vision = dataclasses.replace(
        vision, feature_layer=number({"mm_vision_select_layer": -2} | dict(values), "mm_vision_select_layer", above=None)
    )
    expect(values, "mm_hidden_size", vision.width, None, move="the tower is another one than the projector was trained on")
    decoder = decoder_from(values, kind)
    parts = _deepstack(values, vision.layers) if values.get("image_aspect_ratio") == "deepstack" else _baseline(values)
    if values["model_type"] in DEEPSTACK and parts["image"]["mode"] in ("pad", "square"):
        parts["deepstack"] |= pooled_baseline(ablation_text(values))
    if parts["deepstack"].get("start", 0) >= decoder.layers:  # upstream then injects nothing
        parts["deepstack"] = _never_injected(parts["deepstack"], decoder.layers)
    image = ImageConfig(size=size, **{**_pixels(preprocessor, size), **parts["image"]})
    vision = dataclasses.replace(vision, **parts["vision"])
    config = Config(
        image=image,
        vision=vision,
        projector=_projector(values),
        decoder=decoder,
        deepstack=DeepStackConfig(**parts["deepstack"]),
    )
    length = values.get("tokenizer_model_max_length") or decoder.max_positions
    return _with_data(config, length, "phi3_instruct" if kind == "phi3" else "v1")


def _refuse(values: Mapping[str, Any]) -> None:
    """What official folders can ask for and nothing here computes."""
    other = "choose a checkpoint without it"
    _refuse_unknown(values)
    for key in ("twoviews_unshare", "s2", "mm_use_im_start_end"):
        expect(values, key, False, None, move=other)
    expect(values, "mm_vision_select_feature", "patch", None, move=other)
    expect(values, "mm_resampler_type", None, move=other)


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    """Keys of the multimodal part that nobody here knows: a misspelt one would silently be its default."""
    for key, value in values.items():
        if key in KNOWN or value is None:
            continue
        if key.startswith(("mm_", "image_", "deepstack_")) or difflib.get_close_matches(key, UNPREFIXED, cutoff=0.85):
            raise WeightsError(
                f"config.json: {key} is {value!r}, a key that the official code does not have; {nearest(key, KNOWN)}; "
                "remove it if nothing depends on it"
            )


def _projector(values: Mapping[str, Any]) -> ProjectorConfig:
    kind = values.get("mm_projector_type", "linear")
    match = re.fullmatch(r"linear|mlp([1-9])x_gelu", str(kind))
    if not match:
        raise WeightsError(f"config.json: mm_projector_type is {kind!r}, expected linear or mlpNx_gelu")
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
    image["mode"] = "hd" if values.get("is_anyres_deepstack") else "deepstack"
    image["merge"] = _merge(values)
    counts = {"deepstack_start_id": 1, "deepstack_interval": 1} | dict(values)
    stack["start"] = number(counts, "deepstack_start_id", above=-1)
    stack["interval"] = number(counts, "deepstack_interval")
    sampling = values.get("deepstack_sampling", "2d")
    if sampling not in ("2d", "1d", "grid", "2d_scaledown"):
        raise WeightsError(
            f"config.json: deepstack_sampling is {sampling!r}, expected 2d, 1d, grid or 2d_scaledown; "
            + nearest(str(sampling), ("2d", "1d", "grid", "2d_scaledown"))
        )
    if image["mode"] == "deepstack" and stack.get("into") != "vision":  # elsewhere upstream does not look at it
        stack |= {"sampling": "2d", "pool": 2} if sampling == "2d_scaledown" else {"sampling": sampling}
    return parts


def _baseline(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Image values of LLaVA-1.5 and LLaVA-NeXT."""
    aspect = values.get("image_aspect_ratio") or "square"
    modes = ("pad", "anyres", "square")
    if aspect not in modes:
        raise WeightsError(
            f"config.json: image_aspect_ratio is {aspect!r}, expected deepstack, pad, anyres or square; "
            + nearest(str(aspect), ("deepstack", *modes))
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
    merge = values.get("mm_patch_merge_type") or "flat"
    if merge not in MERGES:
        raise WeightsError(
            f"config.json: mm_patch_merge_type is {merge!r}, expected {', '.join(MERGES)}; {nearest(str(merge), MERGES)}"
        )
    return merge


def pinpoints_from(value: Any) -> tuple[tuple[int, int], ...]:
    """image_grid_pinpoints, a list of pairs or its text.

    Raises:
      WeightsError: it is neither.
    """
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        return tuple((int(first), int(second)) for first, second in pairs)
    except (ValueError, TypeError, SyntaxError) as error:
        raise WeightsError(
            f"config.json: image_grid_pinpoints is {value!r}, expected pairs of pixels such as [[336, 672], [672, 336]]"
        ) from error


def _from_llava_hf(values: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Config:
    other = "choose a checkpoint without it"
    text = values.get("text_config") or {}
    kind = text.get("model_type", "llama")
    if kind not in BARE:
        raise WeightsError(f"config.json: text_config has model_type {kind!r}, expected {', '.join(BARE)}; {other}")
    expect(values, "vision_feature_select_strategy", "default", None, move=other)
    expect(values, "projector_hidden_act", "gelu", None, move=other)
    expect(values, "multimodal_projector_bias", True, None, move=other)
    expect(values, "tie_word_embeddings", False, None, move="save the model with a head of its own first")
    expect(values, "use_image_newline_parameter", True, None, move=other)
    inner = values.get("vision_config") or {}
    vision, size = tower_from({"model_type": "clip_vision_model"} | _LLAVA_HF_TOWER | dict(inner))
    layer = values.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise WeightsError(f"config.json: vision_feature_layer is {layer!r}, expected one layer such as -2; {other}")
    pixels = _pixels(preprocessor, size)
    if values["model_type"] == "llava_next":
        pairs = values.get("image_grid_pinpoints") or [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        points = tuple((width, height) for height, width in pinpoints_from(pairs))  # there they are (height, width)
        image = ImageConfig(mode="anyres", merge="spatial_unpad", size=size, pinpoints=points, **pixels)
    else:
        image = ImageConfig(mode="pad" if preprocessor.get("do_pad") else "square", size=size, **pixels)
    decoder = decoder_from(text, kind)
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
    kind = values.get("model_type")
    if kind not in TOWERS:
        raise WeightsError(
            f"the vision tower's config.json has model_type {kind!r}, expected {' or '.join(TOWERS)}; give one with --tower=DIR"
        )
    if kind == "clip":
        values = values.get("vision_config") or values.get("vision_config_dict") or {}
    get = _TOWER_DEFAULTS | {key: value for key, value in values.items() if value is not None}
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


def _pixels(preprocessor: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Mean and deviation of a preprocessor_config.json, whose crop must be the tower's picture."""
    crop = preprocessor.get("crop_size", size)
    sides = tuple(crop.get(side) for side in ("height", "width")) if isinstance(crop, Mapping) else (crop, crop)
    if sides != (size, size):
        raise WeightsError(f"preprocessor_config.json: crop_size is {crop}, expected the tower's {size}; take its own file")
    expect(preprocessor, "resample", 3, None, move="only bicubic resizing (3) is what the official code computes with")
    keys = (("image_mean", "mean"), ("image_std", "std"))
    for key in (theirs for theirs, _ in keys if theirs in preprocessor):
        value = preprocessor[key]
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(number, int | float) for number in value):
            raise WeightsError(
                f"preprocessor_config.json: {key} is {value!r}, expected three numbers; take the tower's own file"
            )
    return {ours: tuple(map(float, preprocessor[theirs])) for theirs, ours in keys if theirs in preprocessor}


def _with_data(config: Config, length: int, template: str) -> Config:
    """With template and length; a tokenizer's round 10**30 for "no limit" becomes the model's own."""
    needed = config.visual_tokens_per_image
    if not needed < length <= 2**24:
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
