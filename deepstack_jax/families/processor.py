"""How a Hugging Face folder says that images become pixels: its image processor's settings as values of our ImageConfig."""

import ast
import re
from collections.abc import Mapping
from typing import Any

from deepstack_jax.config import CLIP_MEAN, CLIP_STD, Config
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.base import Processor, tower_of
from deepstack_jax.families.values import expect, flag, number, real
from deepstack_jax.layout.modes import ImageMode
from deepstack_jax.printing import quote

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4}  # Pillow's numbers
_FILE = "preprocessor_config.json"
# What the image processor of transformers 4.39 writes about itself.
_PROCESSOR_KEYS = (
    *("images", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb", "return_tensors", "data_format", "input_data_format"),
)
_CLASS = re.compile(r"(\w+?)(?:ImageProcessor|FeatureExtractor)(?:Fast|Pil)?")


def _kinds(model: str, own: Processor) -> tuple[str, ...]:
    """The processors that a kind of model can have; the last one where none is named."""
    return {"official": (own.name,), "bare": (own.name,), "llava": (own.name, "Llava"), "llava_next": ("LlavaNext",)}[model]


def own_mode(values: Mapping[str, Any], model: str, own: Processor) -> str:
    """The image mode of a model whose processor sees the image as it is.

    `pad`: squared with the mean colour, which LLaVA-1.5's own processor can; CLIP's ignores the wish.
    """
    kind = _class_of(values, model, own)
    if flag(values, "do_pad", False) and kind == "Llava":
        return "pad"
    return "stretch" if _stretches(kind, own) else "square"


def _stretches(kind: str, own: Processor) -> bool:
    return kind == own.name and own.fill == "stretch"


def image_values(values: Mapping[str, Any], size: int, mode: ImageMode, model: str, own: Processor) -> dict[str, Any]:
    """Mean, deviation and resizing filters, as keys of ImageConfig.

    Args:
      values: the processor's settings. size: side of the tower's picture in pixels.
      model: official | llava | llava_next, or bare, a tower to build on: what the processor is for. own: that of the tower.

    Raises:
      WeightsError: a setting that gives other pixels than can be made here; it is named.
    """
    stretches = _stretches(_class_of(values, model, own), own)
    expect(values, "use_square_size", False, move=f"remove it from {_FILE}")
    if mode.single:  # else the views are cut to the tower's size first, and the processor finds them so
        expect({"do_resize": flag(values, "do_resize", True)}, "do_resize", True, move="only resized images fit the tower")
    crops, cut = flag(values, "do_center_crop", not stretches), mode.fill == "centre"
    if cut and not crops:
        raise WeightsError(f"{_FILE}: do_center_crop is False, expected True or do_pad: the rest is not a square for the tower")
    sides, square = _sides(values, "size", size), mode.single and mode.fill == "stretch" and "size" in values
    if sides not in ((size,), (size, size)) or (cut and sides == (size, size)) or (square and sides == (size,)):
        edges = f"{{'shortest_edge': {size}}}" if cut else f"{{'height': {size}, 'width': {size}}}" if square else ""
        raise _wrong("size", values["size"], edges or f"the tower's {size}")
    if (crops or model == "llava_next") and _sides(values, "crop_size", size) not in ((size,), (size, size)):
        raise _wrong("crop_size", values["crop_size"], f"the tower's {size}")
    known = (own.mean, own.std) if stretches or not values else (CLIP_MEAN, CLIP_STD)  # where nothing is said
    return _numbers(values, mode.fill == "pad", *known) | _filters(values, mode, model)


def _wrong(key: str, value: Any, wanted: str) -> WeightsError:
    return WeightsError(f"{_FILE}: {key} is {quote(value)}, expected {wanted}; take the tower's own file")


def _class_of(values: Mapping[str, Any], model: str, own: Processor) -> str:
    kinds = _kinds(model, own)
    name = values.get("image_processor_type", values.get("feature_extractor_type", f"{kinds[-1]}ImageProcessor"))
    found = _CLASS.fullmatch(name) if isinstance(name, str) else None
    if not found or found[1] not in kinds:
        wanted = " or ".join(f"{kind}ImageProcessor" for kind in kinds)
        raise WeightsError(f"{_FILE}: image_processor_type is {quote(name)}, expected {wanted}; choose a checkpoint without it")
    return found[1]


def _sides(values: Mapping[str, Any], key: str, default: int) -> tuple[Any, ...]:
    """(shortest edge,) or (height, width) of a size, in any of the ways in which it is written."""
    value = values.get(key, default)
    if isinstance(value, Mapping):
        names = {("shortest_edge",): ("shortest_edge",), ("height", "width"): ("height", "width")}.get(tuple(sorted(value)))
        return tuple(number(value, name) for name in names) if names else (value,)
    return tuple(value) if isinstance(value, list) else (value,)


def _numbers(values: Mapping[str, Any], pads: bool, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """x * factor, less the mean, over the deviation, as the mean and deviation of x / 255; some where none are said."""
    mean, std = _three(values, "image_mean") or mean, _three(values, "image_std") or std
    factor = real(values, "rescale_factor", 1 / 255) if flag(values, "do_rescale", True) else 1.0
    normal = flag(values, "do_normalize", True)
    if factor <= 0:
        raise _wrong("rescale_factor", factor, "a number above 0")
    if pads and not 0 <= min(mean) <= max(mean) <= 1:
        raise WeightsError(f"{_FILE}: image_mean is {mean}, expected shares from 0 to 1: do_pad fills with that colour")
    if pads and not (factor == 1 / 255 and normal):
        raise WeightsError(
            f"{_FILE}: do_rescale, rescale_factor or do_normalize is changed, where the image is padded with image_mean; "
            "expected those of CLIP; choose a checkpoint without it"
        )
    scale = 255 * factor  # exactly 1 for the usual factor
    shifted = (mean, std) if normal else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return {key: tuple(value / scale for value in three) for key, three in zip(("mean", "std"), shifted, strict=True)}


def _three(values: Mapping[str, Any], key: str) -> tuple[float, ...]:
    value = values.get(key, [])
    three = [value] * 3 if isinstance(value, int | float) else value
    fits = isinstance(three, list) and all(type(n) in (int, float) and abs(n) < 1e6 for n in three)
    if not fits or (key in values and (len(three) != 3 or (key == "image_std" and not min(three) > 0))):
        raise _wrong(key, value, "three numbers above 0" if key == "image_std" else "three numbers")
    return tuple(map(float, three))


def _filters(values: Mapping[str, Any], mode: ImageMode, model: str) -> dict[str, str]:
    """The filter of what the processor itself resizes; the official code cuts crops by Pillow's bicubic before it."""
    official = model == "official" and not mode.single
    names = {3: "bicubic"} if official else {value: name for name, value in RESAMPLE.items()}
    resample = values.get("resample", RESAMPLE["bicubic"])
    if type(resample) is not int or resample not in names:
        raise _wrong("resample", resample, ", ".join(f"{value} ({name})" for value, name in names.items()))
    keys = () if official else ("global_filter",) if mode.single else ("global_filter", "crop_filter")
    return dict.fromkeys(keys, names[resample])


def pinpoints_from(value: Any, where: str = "config.json") -> tuple[tuple[int, int], ...]:
    """image_grid_pinpoints, a list of pairs or its text; WeightsError where it is neither."""
    try:
        pairs: Any = ast.literal_eval(value) if isinstance(value, str) and len(value) < 10_000 else value
        found = tuple((first, second) for first, second in pairs)
        if not found or len(found) > 1000 or not all(type(side) is int and 0 < side < 2**20 for pair in found for side in pair):
            raise ValueError
        return found
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise WeightsError(
            f"{where}: image_grid_pinpoints is {quote(value)}, expected pairs of pixels such as [[336, 672], [672, 336]]"
        ) from error


def check_pinpoints(values: Mapping[str, Any], pairs: Any) -> None:
    """Refuse a processor that cuts other crops than the model's config.json puts together."""
    own = values.get("image_grid_pinpoints")
    if own is not None and pinpoints_from(own, _FILE) != pinpoints_from(pairs):
        raise WeightsError(
            f"{_FILE}: image_grid_pinpoints is {quote(own)}, config.json has {quote(pairs)}; "
            "the crops must be those of the model: make them one"
        )


def preprocessor_to_hf(config: Config) -> dict[str, Any]:
    """preprocessor_config.json of the vision tower's own folder."""
    own, values = tower_of(config).processor, cropping_processor(config)
    values["image_processor_type"] = f"{own.name}ImageProcessor"
    if own.fill == "stretch":
        del values["_valid_processor_keys"], values["crop_size"], values["do_center_crop"]
        values["size"] = {"height": config.image.size, "width": config.image.size}
    return values


def cropping_processor(config: Config) -> dict[str, Any]:
    """The settings of CLIP's processor, and of LLaVA's beside what is its own: resizing, crop and normalisation."""
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
        "resample": RESAMPLE[config.image.global_filter if config.image.kind.single else "bicubic"],
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
