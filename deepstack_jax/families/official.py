"""config.json of the official DeepStack code and of the LLaVA before it, as our Config and back."""

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from deepstack_jax.config import Config, DataConfig, DeepStackConfig, ImageConfig, ProjectorConfig
from deepstack_jax.errors import WeightsError, nearest
from deepstack_jax.families.ablations import ablation_text, ablations_from, ablations_to, pooled_baseline
from deepstack_jax.families.base import DECODERS, DecoderFamily, decoder_of, tower_family, tower_from, tower_of
from deepstack_jax.families.processor import image_values, own_mode, pinpoints_from
from deepstack_jax.families.values import expect, flag, number, word
from deepstack_jax.layout.modes import MODES
from deepstack_jax.layout.sequence import MERGES
from deepstack_jax.printing import quote

VERSION = "4.39.3"  # of transformers, whose form these files have: the one that the official code runs on
# Keys of config.json that our Config does not describe and an export writes again.
PASSTHROUGH_KEYS = (
    *("attention_dropout", "bos_token_id", "embd_pdrop", "eos_token_id", "initializer_range"),
    *("pad_token_id", "pretraining_tp", "resid_pdrop", "use_cache"),
)
# Keys that can say the same in several ways; an export keeps the folder's own words where they still say the same.
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
_ASPECTS = ("deepstack", "pad", "anyres", "square")
_SAMPLINGS = ("2d", "1d", "grid", "2d_scaledown")


def official_types() -> dict[str, DecoderFamily]:
    """model_type of an official folder -> the family of its decoder."""
    return {kind: family for family in DECODERS.values() for kind in family.official}


def from_official(values: Mapping[str, Any], tower: Mapping[str, Any] | None, preprocessor: Mapping[str, Any]) -> Config:
    """The Config of an official folder; see `forms.from_hf`."""
    _refuse_unknown(values)
    for key in ("twoviews_unshare", "s2", "mm_use_im_start_end"):
        expect(values, key, False)
    expect(values, "mm_resampler_type")
    if tower is None:
        raise WeightsError(
            f"config.json: mm_vision_tower is {quote(values.get('mm_vision_tower'))}, which is not a folder here; put the "
            "tower's folder beside config.json under that name, or name it with --tower=DIR"
        )
    family = official_types()[values["model_type"]]
    vision, size = tower_from(tower)
    seen = tower_family(tower)
    expect(values, "mm_vision_select_feature", "patch", *(() if seen.prefix_tokens(vision) else ("cls_patch", "full")))
    layer = number({"mm_vision_select_layer": -2} | dict(values), "mm_vision_select_layer", above=None)
    expect(values, "mm_hidden_size", vision.width, move="the tower is another one than the projector was trained on")
    decoder = family.from_hf(values, family.official[values["model_type"]])
    parts = _deepstack(values, vision.layers) if values.get("image_aspect_ratio") == "deepstack" else _baseline(values)
    if parts["image"]["mode"] == "square":  # upstream then hands the image to the tower's own processor
        parts["image"]["mode"] = own_mode(preprocessor, "official", seen.processor)
    mode = MODES[parts["image"]["mode"]]
    if values["model_type"].startswith("deepstack") and mode.single:
        parts["deepstack"] |= pooled_baseline(ablation_text(values))
    if parts["deepstack"].get("start", 0) >= decoder.layers:  # upstream then injects nothing
        parts["deepstack"] = _never_injected(parts["deepstack"], decoder.layers)
    image = ImageConfig(size=size, **image_values(preprocessor, size, mode, "official", seen.processor), **parts["image"])
    config = Config(
        image=image,
        vision=dataclasses.replace(vision, feature_layer=layer, **parts["vision"]),
        projector=_projector(values),
        decoder=decoder,
        deepstack=DeepStackConfig(**parts["deepstack"]),
    )
    return with_data(config, values.get("tokenizer_model_max_length", decoder.max_positions), family.template)


def with_data(config: Config, length: Any, template: str) -> Config:
    """With template and length; a tokenizer's round 10**30 for "no limit" becomes the model's own."""
    needed = config.layout.max_tokens
    if type(length) is not int or not needed < length <= 2**24:
        length = max(config.decoder.max_positions, math.ceil((needed + 1) / 1024) * 1024)
    return dataclasses.replace(config, data=DataConfig(template=template, max_length=length))


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
    if not (match := re.fullmatch(r"linear|mlp([1-9])x_gelu", kind)):
        raise WeightsError(f"config.json: mm_projector_type is {quote(kind)}, expected linear or mlpNx_gelu")
    if kind == "mlp1x_gelu":  # named like a list of layers, and one nonetheless
        raise WeightsError("config.json: mm_projector_type is 'mlp1x_gelu', one layer: call it 'linear', its tensors too")
    return ProjectorConfig(int(match[1] or 1))


def _choice(values: Mapping[str, Any], key: str, default: str, *valid: str) -> str:
    """One of a few words."""
    value = word(values, key) or default
    if value not in valid:
        wanted = f"{', '.join(valid[:-1])} or {valid[-1]}"
        raise WeightsError(f"config.json: {key} is {quote(value)}, expected {wanted}; {nearest(value, valid)}")
    return value


def _deepstack(values: Mapping[str, Any], tower_layers: int) -> dict[str, dict[str, Any]]:
    """Image and DeepStack values of image_aspect_ratio 'deepstack', defaults as upstream has them."""
    parts = ablations_from(ablation_text(values), tower_layers)
    image, stack = parts["image"], parts["deepstack"]
    if "num_crops" not in values:
        raise WeightsError("config.json: num_crops is missing, which image_aspect_ratio 'deepstack' needs; the paper has 4")
    image["num_crops"] = number(values, "num_crops", above=0 if image.get("grid") == "square" else 1)
    image["mode"] = "hd" if flag(values, "is_anyres_deepstack", False) else "deepstack"
    image["merge"] = _choice(values, "mm_patch_merge_type", "flat", *MERGES)
    counts = {"deepstack_start_id": 1, "deepstack_interval": 1} | dict(values)
    stack["start"] = number(counts, "deepstack_start_id", above=-1)
    stack["interval"] = number(counts, "deepstack_interval")
    sampling = _choice({"deepstack_sampling": "2d"} | dict(values), "deepstack_sampling", "", *_SAMPLINGS)
    if not MODES[image["mode"]].upsampled and stack.get("into") != "vision":  # elsewhere upstream does not look at it
        stack |= {"sampling": "2d", "pool": 2} if sampling == "2d_scaledown" else {"sampling": sampling}
    return parts


def _baseline(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Image values of LLaVA-1.5 and LLaVA-NeXT."""
    aspect = _choice(values, "image_aspect_ratio", "square", *_ASPECTS)
    image: dict[str, Any] = {"mode": aspect, "merge": _choice(values, "mm_patch_merge_type", "flat", *MERGES)}
    if MODES[aspect].grids == "pinpoints":
        image["pinpoints"] = pinpoints_from(values.get("image_grid_pinpoints"))
    return {"image": image, "deepstack": {"stack": "none"}, "vision": {}}


def _never_injected(stack: dict[str, Any], layers: int) -> dict[str, Any]:
    """DeepStack values of a folder whose injection begins after the last layer."""
    if stack.get("into") != "vision" and stack.get("stack") != "none":
        warnings.warn(
            f"config.json: deepstack_start_id is {stack['start']}, after the last of {layers} layers: nothing is injected",
            stacklevel=2,
        )
        stack = stack | {"stack": "none"}
    return stack | {"start": DeepStackConfig.start}


def without_taps(config: Config) -> Config:
    """The same without the groups that no official code knows."""
    stack = dataclasses.replace(config.deepstack, stack=config.deepstack.stack_of_views, taps=())
    return dataclasses.replace(config, deepstack=stack)


def is_baseline(config: Config) -> bool:
    """Whether the model is LLaVA-1.5 or LLaVA-NeXT: no crops, or crops in the sequence, and nothing injected or averaged."""
    return not config.image.kind.stacks_crops and config.deepstack.stack == "none" and config.deepstack.pool == 1


def to_official(config: Config, passthrough: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of an official folder; see `forms.to_hf`."""
    family, config = decoder_of(config), without_taps(config)
    kind, architecture = family.official_type(config.decoder, is_baseline(config))
    values = {"attention_dropout": 0.0, "bos_token_id": 1, "initializer_range": 0.02, "use_cache": True, **family.passthrough}
    values |= {key: value for key, value in passthrough.items() if key in PASSTHROUGH_KEYS}
    values |= {**family.to_hf(config.decoder), **_multimodal(config), "torch_dtype": dtype}
    values |= {"transformers_version": VERSION, "deepstack_args_for_ablation": ablations_to(config)}
    if not kind.startswith("llava"):
        values |= _stack_keys(config)
    return values | {"model_type": kind, "architectures": [architecture]}


def _multimodal(config: Config) -> dict[str, Any]:
    image, layers = config.image, config.projector.layers
    aspect = "deepstack" if image.kind.stacks_crops else image.mode if image.mode in _ASPECTS else "square"
    values: dict[str, Any] = {
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": aspect,
        "mm_hidden_size": config.vision.width,
        "mm_patch_merge_type": image.merge,
        "mm_projector_type": "linear" if layers == 1 else f"mlp{layers}x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision.feature_layer,
        "mm_vision_tower": tower_of(config).folder,
        "tokenizer_model_max_length": config.data.max_length,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,  # or the official loader would ignore the tower inside
        "use_mm_proj": True,
    }
    if image.kind.grids == "pinpoints":
        values["image_grid_pinpoints"] = [list(pair) for pair in image.pinpoints]
    return values


def _stack_keys(config: Config) -> dict[str, Any]:
    """The keys of DeepStack's own model types."""
    stack, sampling = config.deepstack, config.deepstack.sampling
    single = config.image.kind.single  # upstream then injects nothing, whatever the rest says
    if stack.schedule:
        raise WeightsError("config.deepstack.schedule is set; the official code knows start and interval only: set those")
    if stack.pool > 1:
        if (stack.pool, sampling) != (2, "2d"):
            raise WeightsError(
                f"config.deepstack.pool {stack.pool} with sampling {sampling!r} has no official form; expected pool 2 with '2d'"
            )
        sampling = "2d" if single else "2d_scaledown"  # of single views an ablation says it
    nothing = stack.stack == "none" and stack.sequence in ("global", "zero") and not single  # said by a start after the last
    return {
        "deepstack_interval": stack.interval,
        "deepstack_sampling": sampling,
        "deepstack_start_id": config.decoder.layers if nothing else stack.start,
        "hires": False,
        "is_anyres_deepstack": config.image.kind.upsampled,
        "num_crops": config.image.num_crops,
        "twoviews_unshare": False,
    }


def tower_to_hf(config: Config, passthrough: Mapping[str, Any] | None = None, dtype: str = "float32") -> dict[str, Any]:
    """config.json of the vision tower's own folder."""
    values, kept = tower_of(config).to_hf(config), passthrough or {}
    values |= {key: kept[key] for key in ("projection_dim",) if key in values and key in kept}
    return values | {"torch_dtype": dtype, "transformers_version": VERSION}
