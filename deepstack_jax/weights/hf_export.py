"""Our Config as the files that Hugging Face folders describe a model with; the inverse of `hf_config.py`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from deepstack_jax.config import Config
from deepstack_jax.weights.ablations import ablations_to
from deepstack_jax.weights.files import WeightsError
from deepstack_jax.weights.hf_config import PASSTHROUGH_KEYS, VERBATIM_KEYS, from_hf
from deepstack_jax.weights.hf_decoder import decoder_to
from deepstack_jax.weights.hf_image import RESAMPLE

TOWER_FOLDER = "clip"
# What the image processor of transformers 4.39 writes about itself.
_PROCESSOR_KEYS = (
    *("images", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb", "return_tensors", "data_format", "input_data_format"),
)
_SECTIONS = ("image.", "vision.", "projector.", "decoder.", "deepstack.")  # of the configuration, that say what is computed
_HOW_IT_RUNS = ("vision.position_std", "decoder.embed_std", "decoder.head_std", "decoder.scan", "decoder.remat")  # and not that
_VERSION = "4.39.3"  # of transformers, whose form these files have: the one that the official code runs on


def is_baseline(config: Config) -> bool:
    """Whether the model is LLaVA-1.5 or LLaVA-NeXT: no crops, or crops in the sequence, and nothing injected or averaged."""
    single = config.image.mode in ("pad", "square", "anyres") and config.deepstack.stack == "none"
    return single and config.deepstack.pool == 1


def to_hf(config: Config, passthrough: Mapping[str, Any] | None = None, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of an official folder.

    Args:
      passthrough: keys that our Config does not describe (token ids above all), as `Checkpoint.passthrough`.
      dtype: of the tensors beside it.

    Raises:
      WeightsError: the official code has no such model.
    """
    phi = config.decoder.architecture == "phi3"
    base = {"attention_dropout": 0.0, "bos_token_id": 1, "initializer_range": 0.02, "use_cache": True}
    base |= (
        {"embd_pdrop": 0.0, "eos_token_id": 32000, "pad_token_id": 32000, "resid_pdrop": 0.0}
        if phi
        else {"eos_token_id": 2, "pad_token_id": 0, "pretraining_tp": 1}
    )
    base |= {key: value for key, value in (passthrough or {}).items() if key in PASSTHROUGH_KEYS}
    values = {**base, **decoder_to(config.decoder), **_multimodal(config), "torch_dtype": dtype}
    values |= {"transformers_version": _VERSION, "deepstack_args_for_ablation": ablations_to(config)}
    if is_baseline(config) and not phi:
        mistral = config.decoder.sliding_window > 0
        values["model_type"] = "llava_mistral" if mistral else "llava_llama"
        values["architectures"] = ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"]
    else:
        if config.decoder.sliding_window and not phi:
            raise WeightsError(
                f"config.decoder.sliding_window {config.decoder.sliding_window} over LLaMA has no official DeepStack form"
            )
        values |= _deepstack(config)
        values["model_type"] = "deepstack_phi" if phi else "deepstack_llama"
        values["architectures"] = ["DeepstackPhiForCausalLM" if phi else "DeepstackLlamaForCausalLM"]
    return dict(sorted(_keep_verbatim(values, config, passthrough or {}).items()))


def _keep_verbatim(values: dict[str, Any], config: Config, passthrough: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that can say the same in several ways, in the words of the folder that the model came from.

    Several ways: the order of ablations, "inconsistent" for "anyres_unpad", any start behind the last layer, what upstream
    does not look at (an HD folder's sampling). A model that was changed since has its own words.
    """
    tower, pixels = tower_to_hf(config), preprocessor_to_hf(config)

    def meaning(values: Mapping[str, Any]) -> Config | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return from_hf(values, tower, pixels)
            except WeightsError:
                return None

    wanted = [key for key in VERBATIM_KEYS if key in values and passthrough.get(key, values[key]) != values[key]]
    meant = meaning(values) if wanted else None
    for key in wanted:
        worded = values | {key: passthrough[key]}
        if meant is not None and meaning(worded) == meant:
            values = worded
    return values


def _multimodal(config: Config) -> dict[str, Any]:
    image = config.image
    aspect = "deepstack" if image.mode in ("deepstack", "hd") else image.mode
    values: dict[str, Any] = {
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": aspect,
        "mm_hidden_size": config.vision.width,
        "mm_patch_merge_type": image.merge,
        "mm_projector_type": "linear" if config.projector.layers == 1 else f"mlp{config.projector.layers}x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision.feature_layer,
        "mm_vision_tower": TOWER_FOLDER,
        "tokenizer_model_max_length": config.data.max_length,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,  # or the official loader would ignore the tower inside
        "use_mm_proj": True,
    }
    if image.mode == "anyres":
        values["image_grid_pinpoints"] = [list(pair) for pair in image.pinpoints]
    return values


def _deepstack(config: Config) -> dict[str, Any]:
    stack = config.deepstack
    if stack.schedule:
        raise WeightsError("config.deepstack.schedule is set; the official code knows start and interval only: set those")
    sampling = stack.sampling
    if stack.pool > 1:
        if (stack.pool, sampling) != (2, "2d"):
            raise WeightsError(
                f"config.deepstack.pool {stack.pool} with sampling {sampling!r} has no official form; expected pool 2 with '2d'"
            )
        sampling = "2d" if config.image.mode in ("pad", "square") else "2d_scaledown"  # there an ablation says it
    single = config.image.mode in ("pad", "square")  # upstream then injects nothing, whatever the rest says
    said = stack.sequence in ("global", "zero") and not single
    nothing = stack.stack == "none" and said  # by a start behind the last layer
    return {
        "deepstack_interval": stack.interval,
        "deepstack_sampling": sampling,
        "deepstack_start_id": config.decoder.layers if nothing else stack.start,
        "hires": False,
        "is_anyres_deepstack": config.image.mode == "hd",
        "num_crops": config.image.num_crops,
        "twoviews_unshare": False,
    }


def tower_to_hf(config: Config, passthrough: Mapping[str, Any] | None = None, dtype: str = "float32") -> dict[str, Any]:
    """config.json of the vision tower's own folder."""
    vision = config.vision
    return {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": vision.activation,
        "hidden_size": vision.width,
        "image_size": config.image.size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": vision.mlp,
        "layer_norm_eps": vision.norm_eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "num_hidden_layers": vision.layers,
        "patch_size": vision.patch_size,
        "projection_dim": (passthrough or {}).get("projection_dim", 768),  # of the head that is not used here
        "torch_dtype": dtype,
        "transformers_version": _VERSION,
    }


def preprocessor_to_hf(config: Config) -> dict[str, Any]:
    """preprocessor_config.json of the vision tower: CLIP's resizing, crop and normalisation."""
    size = config.image.size
    return {
        "_valid_processor_keys": list(_PROCESSOR_KEYS),
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.image.mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(config.image.std),
        "resample": RESAMPLE[config.image.global_filter if config.image.mode in ("pad", "square") else "bicubic"],
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def llava_processor_to_hf(config: Config) -> dict[str, Any]:
    """preprocessor_config.json of a `llava-hf` folder."""
    image = config.image
    kind = "LlavaNextImageProcessor" if image.mode == "anyres" else "LlavaImageProcessor"
    own = {"do_pad": image.mode == "pad", "image_processor_type": kind, "resample": RESAMPLE[image.global_filter]}
    points = {"image_grid_pinpoints": [[h, w] for w, h in image.pinpoints]} if image.mode == "anyres" else {}
    return preprocessor_to_hf(config) | own | points


def may_say(key: str, value: Any) -> bool:
    """Whether deepstack_jax.json may say this beside official files: what is computed, and words of its own, never a path."""
    if key == "data.tokenizer":
        return isinstance(value, str) and (value == "bytes" or value.startswith("words:")) and not value.startswith("words:@")
    return key == "data.template" or (key.startswith(_SECTIONS) and key not in _HOW_IT_RUNS)


def to_llava_hf(config: Config, image_token: int, dtype: str = "float32") -> dict[str, Any]:
    """The config.json that transformers' Llava and LlavaNext load.

    Args:
      image_token: id that stands for an image; embeddings and head have a row more than the model's vocabulary for it.

    Raises:
      WeightsError: the model is no LLaVA baseline, or one that transformers computes otherwise.
    """
    image = config.image
    next_ = image.mode == "anyres"
    if config.projector.layers != 2:
        raise WeightsError(f"a projector of {config.projector.layers} layers has no llava-hf form; use --format=official")
    if not is_baseline(config) or (next_ and image.merge != "spatial_unpad") or (image.merge != "flat" and not next_):
        raise WeightsError(
            f"image.mode {image.mode!r} with merge {image.merge!r}, stack {config.deepstack.stack!r} has no llava-hf form, "
            "expected LLaVA-1.5 (pad or square) or LLaVA-NeXT (anyres, spatial_unpad); use --format=official"
        )
    kind = {"phi3": "phi3", "llama": "mistral" if config.decoder.sliding_window else "llama"}[config.decoder.architecture]
    text = decoder_to(config.decoder) | {"model_type": kind, "vocab_size": image_token + 1, "torch_dtype": dtype}
    if config.decoder.sliding_window:  # transformers counts the token itself, upstream's masks do not
        text["sliding_window"] = config.decoder.sliding_window + 1
    tower = {key: value for key, value in tower_to_hf(config, dtype=dtype).items() if key != "transformers_version"}
    values = {
        "architectures": ["LlavaNextForConditionalGeneration" if next_ else "LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": image_token,
        "model_type": "llava_next" if next_ else "llava",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vision_config": tower,
        "vision_feature_layer": config.vision.feature_layer,
        "vision_feature_select_strategy": "default",
    }
    if next_:
        values |= {"use_image_newline_parameter": True, "image_grid_pinpoints": [[h, w] for w, h in image.pinpoints]}
    return values
