"""The official '+'-joined `deepstack_args_for_ablation` and our typed configuration, one into the other."""

import re
from collections.abc import Mapping
from typing import Any

from deepstack_jax.config import Config
from deepstack_jax.errors import WeightsError, nearest
from deepstack_jax.printing import quote

# What is in the sequence and what is injected; an official folder has at most one of these.
_STACKS = {
    "dummy_local": ("global", "dummy"),
    "only_global_features": ("zero", "global"),
    "global_and_local": ("zero", "global_crops"),
    "string_withglobal": ("global_crops", "none"),
    "string_woglobal": ("crops", "none"),
}
_START = "lsvit_start_layer_"
_POOLED = "scaledown_clip"
_REFUSED = {_POOLED: "shrinks the sequence but not the stack; it goes with image_aspect_ratio 'pad', here use 2d_scaledown"}
KNOWN = (*_STACKS, "hires_local", "2xsample", "anyres_unpad", "inconsistent", "deepstack_vit", _START + "<layer>", *_REFUSED)
_POST_ENCODER = 5  # layers that upstream puts after a tower whose own layers all come before the injection


def ablation_text(values: Mapping[str, Any]) -> str:
    """The official string of a config.json, "" where it has none; WeightsError where it is not a string."""
    text = values.get("deepstack_args_for_ablation") or ""
    if not isinstance(text, str):
        raise WeightsError(
            f"config.json: deepstack_args_for_ablation is {quote(text)}, expected names joined by '+', such as '2xsample'"
        )
    return text


def ablations_from(text: str, tower_layers: int) -> dict[str, dict[str, Any]]:
    """Config values, by section ("image", "deepstack", "vision"), of an official string.

    WeightsError for an unknown or refused name (upstream would silently run the plain model), or two that exclude each other.
    """
    image: dict[str, Any] = {}
    deepstack: dict[str, Any] = {}
    vision: dict[str, Any] = {}
    flags = [flag for flag in text.split("+") if flag]
    stacks = [flag for flag in flags if flag in _STACKS]
    if len(set(stacks)) > 1:
        raise WeightsError(
            f"deepstack_args_for_ablation has {' and '.join(stacks)}, of which only one can hold; remove the others"
        )
    for flag in flags:
        if flag in _STACKS:
            deepstack["sequence"], deepstack["stack"] = _STACKS[flag]
        elif flag == "hires_local":
            deepstack["high_res"] = "view"
        elif flag == "2xsample":
            image["grid"] = "square"
        elif flag in ("anyres_unpad", "inconsistent"):
            image["fit"] = "letterbox"
        elif flag == "deepstack_vit":
            deepstack["into"] = "vision"
        elif re.fullmatch(_START + "[0-9]{1,4}", flag):
            deepstack["vision_start"] = int(flag.removeprefix(_START))
        else:
            why = _REFUSED.get(flag) or f"is unknown; {nearest(flag, KNOWN)}"
            raise WeightsError(f"deepstack_args_for_ablation got {quote(text)}: {quote(flag)} {why}")
    if deepstack.get("into") != "vision":
        deepstack.pop("vision_start", None)  # upstream reads it with deepstack_vit only
    elif deepstack.get("vision_start", -1) >= tower_layers:
        vision["post_layers"] = _POST_ENCODER
    return {"image": image, "deepstack": deepstack, "vision": vision}


def pooled_baseline(text: str) -> dict[str, Any]:
    """DeepStack values of an official string in a folder that injects nothing: upstream looks at one name alone then."""
    flags = [flag for flag in text.split("+") if flag]
    if "deepstack_vit" in flags:
        raise WeightsError(f"deepstack_args_for_ablation got {quote(text)}, which needs image_aspect_ratio 'deepstack'")
    ablations_from("+".join(flag for flag in flags if flag != _POOLED), 0)
    return {"pool": 2} if _POOLED in flags else {}


def ablations_to(config: Config) -> str:
    """The official string of a configuration; WeightsError where the official code has no such combination."""
    image, stack = config.image, config.deepstack
    flags = []
    if stack.into in ("input", "channels"):
        raise WeightsError(
            f"config.deepstack.into={stack.into!r} has no official form: that adds groups to layers; keep the workdir"
        )
    if image.kind.single:
        return _POOLED if stack.pool > 1 else ""
    if image.grid == "square":
        flags.append("2xsample")
    if image.fit == "letterbox" and image.kind.stacks_crops:
        flags.append("anyres_unpad")
    if stack.high_res == "view":
        flags.append("hires_local")
    if stack.into == "vision":
        start = config.vision.layers // 2 if stack.vision_start < 0 else stack.vision_start  # unsaid, upstream fails to start
        if config.vision.post_layers != (_POST_ENCODER if start >= config.vision.layers else 0):
            raise WeightsError(
                f"config.vision.post_layers {config.vision.post_layers} with an injection from layer {start} of "
                f"{config.vision.layers} has no official form, which has {_POST_ENCODER} from the last layer on and else none"
            )
        return "+".join([*flags, "deepstack_vit", f"{_START}{start}"])
    official = {pair: name for name, pair in _STACKS.items()}
    pair = (stack.sequence, stack.stack)
    if pair == ("zero", "none"):  # either of the two that blank the sequence, their injection after the last layer
        pair = ("zero", "global")
    if pair in official:
        flags.append(official[pair])
    elif pair not in (("global", "crops"), ("global", "none")):
        raise WeightsError(
            f"config.deepstack sequence={stack.sequence!r} with stack={stack.stack!r} has no official form; expected one of "
            + ", ".join(f"{sequence}/{stacked}" for sequence, stacked in official)
        )
    return "+".join(flags)
