"""Rotary positions as Hugging Face folders spell them, and back."""

from collections.abc import Collection, Mapping
from typing import Any

from deepstack_jax.config import RopeConfig
from deepstack_jax.errors import WeightsError, nearest
from deepstack_jax.families.values import SOURCE, expect, number, real
from deepstack_jax.printing import quote

_ORIGINAL = "original_max_position_embeddings"
_FACTORS = {"short_factor", "long_factor"}  # lists, of one number per angle
_SCALINGS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "longrope": {*_FACTORS, _ORIGINAL},
    "yarn": {*_FACTORS, _ORIGINAL},
}
_SCALINGS["su"] = _SCALINGS["longrope"]


def rope_from(get: Mapping[str, Any], refused: Collection[str] = ("yarn",)) -> RopeConfig:
    """Rotary positions, read as transformers 5 does: a `rope_scaling` replaces `rope_parameters`, whatever that says.

    Args:
      get: config.json with its defaults filled in. refused: scalings that the model does not have, refused with a WeightsError.
    """
    given = get.get("rope_scaling") or get.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):  # one per kind of layer
        raise WeightsError(f"config.json: rope_scaling is {quote(given)}, expected one object of numbers with a type; {SOURCE}")
    scaling = dict(given)
    theta = real({**get, **scaling}, "rope_theta")
    kinds = [scaling.pop(key, None) for key in ("rope_type", "type")]
    name = kinds[0] or kinds[1] or "default"
    expect(scaling, "partial_rotary_factor", 1.0)
    for key in ("rope_theta", "partial_rotary_factor"):
        scaling.pop(key, None)
    if name == "default":
        if not any(kinds) and set(scaling) & {"factor", *_FACTORS}:
            raise WeightsError(
                f"config.json: rope_scaling is {quote(given)} without a type, which transformers ignores; say which"
            )
        return RopeConfig(theta=theta)
    _check(name, scaling, refused)
    original = number({_ORIGINAL: get["max_position_embeddings"]} | _inside(scaling) | _inside(get), _ORIGINAL)
    scaling.pop(_ORIGINAL, None)
    numbers: dict[str, Any] = {key: real(scaling, key) for key in scaling if key not in _FACTORS}
    for key in _FACTORS & set(scaling):
        if not isinstance(scaling[key], list):
            raise WeightsError(f"config.json: {key} is {quote(scaling[key])}, expected a list; {SOURCE}")
        numbers[key] = tuple(real({key: factor}, key) for factor in scaling[key])
    numbers["scaling"] = "longrope" if name == "su" else name
    return RopeConfig(theta=theta, original_positions=0 if name == "linear" else original, **numbers)


def _inside(values: Mapping[str, Any]) -> dict[str, int]:
    """The original context; Phi-3's own is outside of its rope_scaling, and takes precedence."""
    return {_ORIGINAL: number(values, _ORIGINAL)} if _ORIGINAL in values else {}


def _check(name: Any, scaling: Mapping[str, Any], refused: Collection[str]) -> None:
    """Refuse a scaling that is unknown, says more than it can or less than it must."""
    if not isinstance(name, str) or name not in _SCALINGS or name in refused:
        raise WeightsError(
            f"config.json: rope_scaling has type {quote(name)}, expected linear, llama3, su or longrope (yarn for Phi-3 only); "
            f"{nearest(name, _SCALINGS)}"
        )
    if unknown := sorted(set(scaling) - _SCALINGS[name] - {_ORIGINAL}):
        raise WeightsError(
            f"config.json: rope_scaling of type {name!r} has {', '.join(unknown)}, expected "
            f"{', '.join(sorted(_SCALINGS[name]))}; remove what changes nothing, or choose a checkpoint without it"
        )
    if missing := sorted(_SCALINGS[name] - {_ORIGINAL, "low_freq_factor", "high_freq_factor"} - set(scaling)):
        raise WeightsError(
            f"config.json: rope_scaling of type {name!r} lacks {', '.join(missing)}; take config.json from the model's source"
        )


def rope_to(rope: RopeConfig) -> dict[str, Any]:
    """The keys of config.json that describe rotary positions."""
    scaling: dict[str, Any] | None = None
    if rope.scaling == "linear":
        scaling = {"type": "linear", "factor": rope.factor}
    elif rope.scaling == "llama3":
        scaling = {"rope_type": "llama3", "factor": rope.factor, "low_freq_factor": rope.low_freq_factor}
        scaling |= {"high_freq_factor": rope.high_freq_factor, _ORIGINAL: rope.original_positions}
    elif rope.scaling != "none":
        name = "su" if rope.scaling == "longrope" else rope.scaling
        scaling = {"type": name, "short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    return {"rope_scaling": scaling, "rope_theta": rope.theta}
