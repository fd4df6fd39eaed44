"""config.json and names of `llava-hf` folders, which transformers' Llava and LlavaNext load."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepstack_jax.config import Config, DeepStackConfig, ImageConfig
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.base import TOWER, decoder_of, language_models, tower_family, tower_from, tower_of
from deepstack_jax.families.official import is_baseline, tower_to_hf, with_data
from deepstack_jax.families.processor import (
    RESAMPLE,
    check_pinpoints,
    cropping_processor,
    image_values,
    own_mode,
    pinpoints_from,
    preprocessor_to_hf,
)
from deepstack_jax.families.values import OTHER, expect, flag, section, word
from deepstack_jax.layout.modes import MODES
from deepstack_jax.printing import quote

MODEL_TYPES = ("llava", "llava_next")  # with a text_config
_TOWER = {  # what such folders assume where their vision_config says nothing
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# Beginnings of names, longest first where one begins another, and what they are in an official checkpoint.
NAMES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    *(
        (f"{head}{theirs}", ours)
        for head in ("model.", "")
        for theirs, ours in (
            ("vision_tower.vision_model.", TOWER + "vision_model."),
            ("vision_tower.", TOWER + "vision_model."),
            ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
            ("image_newline", "model.image_newline"),
        )
    ),
)


def is_llava_hf(values: Mapping[str, Any]) -> bool:
    """Whether this is a config.json of `llava-hf`, which names its parts, and not an original LLaVA."""
    return bool({"text_config", "vision_config"} & set(values)) or values.get("model_type") == "llava_next"


def llava_hf_name(official: str) -> str:
    """What `llava-hf` folders call an official tensor."""
    rules = sorted((rule for rule in NAMES if not rule[0].startswith("model.")), key=lambda rule: -len(rule[1]))
    return next((theirs + official[len(ours) :] for theirs, ours in rules if official.startswith(ours)), official)


def from_llava_hf(values: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Config:
    """The Config of a `llava-hf` folder; see `forms.from_hf`."""
    text, inner = section(values, "text_config"), section(values, "vision_config")
    model, known, kind = values["model_type"], language_models(), word(text, "model_type", "llama")
    if kind not in known:
        raise WeightsError(f"config.json: text_config has model_type {quote(kind)}, expected {', '.join(known)}; {OTHER}")
    expect(values, "projector_hidden_act", "gelu")
    expect(values, "multimodal_projector_bias", True)
    expect(values, "use_image_newline_parameter", True)
    tower = {**_TOWER, **inner} if inner.get("model_type", _TOWER["model_type"]) == _TOWER["model_type"] else inner
    (vision, size), seen = tower_from(tower), tower_family(tower)
    chosen = "default" if seen.prefix_tokens(vision) else "full"  # what is dropped is no patch
    expect({"vision_feature_select_strategy": "default"} | dict(values), "vision_feature_select_strategy", chosen)
    layer = values.get("vision_feature_layer", -2)
    if type(layer) is not int:
        raise WeightsError(f"config.json: vision_feature_layer is {quote(layer)}, expected one layer such as -2; {OTHER}")
    mode = MODES["anyres" if model == "llava_next" else own_mode(preprocessor, model, seen.processor)]
    image: dict[str, Any] = {"mode": mode.name, "size": size, **image_values(preprocessor, size, mode, model, seen.processor)}
    if model == "llava_next":
        pairs = values.get("image_grid_pinpoints") or _PINPOINTS
        check_pinpoints(preprocessor, pairs)
        points = tuple((width, height) for height, width in pinpoints_from(pairs))  # there they are (height, width)
        image |= {"merge": "spatial_unpad", "pinpoints": points}
    tied = "tie_word_embeddings"
    decoder = known[kind].from_hf({**text, tied: flag(text, tied, False) or flag(values, tied, False)}, kind)
    if decoder.rope.scaling == "yarn":  # transformers 5 computes it as longrope
        decoder = dataclasses.replace(decoder, rope=dataclasses.replace(decoder.rope, scaling="longrope"))
    if decoder.sliding_window:  # transformers counts the token itself, upstream's masks do not
        decoder = dataclasses.replace(decoder, sliding_window=decoder.sliding_window - 1)
    config = Config(
        image=ImageConfig(**image),
        vision=dataclasses.replace(vision, feature_layer=layer),
        decoder=decoder,
        deepstack=DeepStackConfig(stack="none"),
    )
    return with_data(config, config.decoder.max_positions, known[kind].template)


def to_llava_hf(config: Config, image_token: int, dtype: str = "float32") -> dict[str, Any]:
    """The config.json that transformers' Llava and LlavaNext load; WeightsError where they compute no such model.

    Args:
      image_token: id that stands for an image; embeddings and head have a row more than the model's vocabulary for it.
    """
    image, decoder = config.image, config.decoder
    next_ = image.kind.grids == "pinpoints"
    if config.projector.layers != 2:
        raise WeightsError(f"a projector of {config.projector.layers} layers has no llava-hf form; use --format=official")
    stretched = image.kind.single and image.kind.fill == "stretch" != tower_of(config).processor.fill  # which its own does not
    merges = image.merge == ("spatial_unpad" if next_ else "flat")
    if not is_baseline(config) or not merges or stretched:
        raise WeightsError(
            f"image.mode {image.mode!r} with merge {image.merge!r}, stack {config.deepstack.stack!r} has no llava-hf form, "
            "expected LLaVA-1.5 (pad, square or stretch) or LLaVA-NeXT (anyres, spatial_unpad); use --format=official"
        )
    kind = decoder_of(config).model_type(decoder)
    text = decoder_of(config).to_hf(decoder) | {"model_type": kind, "vocab_size": image_token + 1, "torch_dtype": dtype}
    if decoder.sliding_window:  # transformers counts the token itself, upstream's masks do not
        text["sliding_window"] = decoder.sliding_window + 1
    tower = {key: value for key, value in tower_to_hf(config, dtype=dtype).items() if key != "transformers_version"}
    values = {
        "architectures": ["LlavaNextForConditionalGeneration" if next_ else "LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": image_token,
        "model_type": "llava_next" if next_ else "llava",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": decoder.tied_head,
        "torch_dtype": dtype,
        "vision_config": tower,
        "vision_feature_layer": config.vision.feature_layer,
        "vision_feature_select_strategy": "default" if tower_of(config).prefix_tokens(config.vision) else "full",
    }
    return values | ({"use_image_newline_parameter": True, **_pinpoints_to(image)} if next_ else {})


def llava_processor_to_hf(config: Config) -> dict[str, Any]:
    """preprocessor_config.json of a `llava-hf` folder."""
    image = config.image
    next_ = image.kind.grids == "pinpoints"
    if image.mode == tower_of(config).processor.fill == "stretch":
        return preprocessor_to_hf(config)
    kind = "LlavaNextImageProcessor" if next_ else "LlavaImageProcessor"
    own = {"do_pad": image.kind.fill == "pad", "image_processor_type": kind, "resample": RESAMPLE[image.global_filter]}
    return cropping_processor(config) | own | (_pinpoints_to(image) if next_ else {})


def _pinpoints_to(image: ImageConfig) -> dict[str, Any]:
    return {"image_grid_pinpoints": [[height, width] for width, height in image.pinpoints]}
