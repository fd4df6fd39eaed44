"""Language models: a Hugging Face config.json as DecoderConfig, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepstack_jax.config import DecoderConfig, RopeConfig
from deepstack_jax.errors import nearest
from deepstack_jax.printing import quote
from deepstack_jax.weights.files import WeightsError
from deepstack_jax.weights.io import present

# What transformers assumes where a config.json says nothing.
_COMMON = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"intermediate_size": 11008},
    "mistral": _COMMON
    | {
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "phi3": _COMMON
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32064,
    },
}
_SCALINGS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "longrope": {"short_factor", "long_factor", "original_max_position_embeddings"},
    "yarn": {"short_factor", "long_factor", "original_max_position_embeddings"},
}
_SCALINGS["su"] = _SCALINGS["longrope"]
_FACTORS = {"short_factor", "long_factor"}  # lists, of one number per angle
# Most that a size of config.json may be, where it is not _MOST: beyond, no model is meant, and tables of it would take hours.
_MOST = 2**24
_MOST_OF = {
    "num_hidden_layers": 1024,
    "num_crops": 100,
    "image_size": 8192,
    "patch_size": 8192,
    "max_position_embeddings": 2**31,
}


def expect(values: Mapping[str, Any], key: str, *allowed: Any, move: str) -> None:
    """Refuse a value that changes what is computed in a way that is not implemented.

    Raises:
      WeightsError: naming the key, the value, the values that can be read, and `move`.
    """
    if values.get(key) is not None and values[key] not in allowed:
        wanted = " or ".join(repr(value) for value in allowed) or "no such key"
        raise WeightsError(f"config.json: {key} is {quote(values[key])}, expected {wanted}; {move}")


def decoder_from(values: Mapping[str, Any], kind: str) -> DecoderConfig:
    """The decoder of a config.json.

    Args:
      values: the object, or its `text_config`. kind: llama | mistral | phi3.

    Raises:
      WeightsError: a size is missing or a number it cannot be, or the model computes something that is not implemented.
    """
    get: dict[str, Any] = DEFAULTS[kind] | present(values)
    other = "choose a checkpoint without it"
    expect(values, "attention_bias", False, move=other)
    expect(values, "mlp_bias", False, move=other)
    expect(values, "hidden_act", "silu", move=other)
    expect(values, "tie_word_embeddings", False, move="save the model with a head of its own first")
    expect(values, "partial_rotary_factor", 1.0, move=other)
    heads, width = number(get, "num_attention_heads"), number(get, "hidden_size")
    head_dim = number(get | {"head_dim": get.get("head_dim", width // heads)}, "head_dim")
    window = 0
    if kind != "llama" and get.get("sliding_window") is not None:
        window = number(get, "sliding_window")
    return DecoderConfig(
        architecture="phi3" if kind == "phi3" else "llama",
        vocab_size=number(get, "vocab_size"),
        width=width,
        layers=number(get, "num_hidden_layers"),
        heads=heads,
        kv_heads=number(get | {"num_key_value_heads": get.get("num_key_value_heads", heads)}, "num_key_value_heads"),
        head_dim=head_dim,
        mlp=number(get, "intermediate_size"),
        norm_eps=real(get, "rms_norm_eps"),
        max_positions=number(get, "max_position_embeddings"),
        sliding_window=window,
        rope=_rope_from(get, kind),
    )


def _rope_from(get: dict[str, Any], kind: str) -> RopeConfig:
    """Rotary positions, read as transformers 5 does: a `rope_scaling` replaces `rope_parameters`, whatever that says."""
    given = get.get("rope_scaling") or get.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):  # one per kind of layer
        raise WeightsError(
            f"config.json: rope_scaling is {quote(given)}, expected one object of numbers with a type; take it from the "
            "model's source"
        )
    scaling = dict(given)
    theta = real(get | scaling, "rope_theta")
    scaling.pop("rope_theta", None)
    kinds = [scaling.pop(key, None) for key in ("rope_type", "type")]
    name = kinds[0] or kinds[1] or "default"
    expect(scaling, "partial_rotary_factor", 1.0, move="choose a checkpoint without it")
    scaling.pop("partial_rotary_factor", None)
    if name == "default":
        if not kinds[0] and not kinds[1] and set(scaling) & {"factor", "short_factor", "long_factor"}:
            raise WeightsError(
                f"config.json: rope_scaling is {quote(given)} without a type, which transformers ignores; say which"
            )
        return RopeConfig(theta=theta)
    if not isinstance(name, str) or name not in _SCALINGS or (name == "yarn" and kind != "phi3"):
        raise WeightsError(
            f"config.json: rope_scaling has type {quote(name)}, expected linear, llama3, su or longrope (yarn for Phi-3 only); "
            f"{nearest(name, _SCALINGS)}"
        )
    unknown = sorted(set(scaling) - _SCALINGS[name] - {"original_max_position_embeddings"})
    if unknown:
        raise WeightsError(
            f"config.json: rope_scaling of type {name!r} has {', '.join(unknown)}, expected "
            f"{', '.join(sorted(_SCALINGS[name]))}; remove what changes nothing, or choose a checkpoint without it"
        )
    needed = _SCALINGS[name] - {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
    if needed - set(scaling):
        raise WeightsError(
            f"config.json: rope_scaling of type {name!r} lacks {', '.join(sorted(needed - set(scaling)))}; take "
            "config.json from the model's source"
        )
    key = "original_max_position_embeddings"
    inside = {key: number(scaling, key)} if key in scaling else {}  # Phi-3's own stands outside and goes before
    original = number({key: get["max_position_embeddings"]} | inside | ({key: get[key]} if key in get else {}), key)
    scaling.pop(key, None)
    numbers: dict[str, Any] = {key: real(scaling, key) for key in scaling if key not in _FACTORS}
    for key in _FACTORS & set(scaling):
        if not isinstance(scaling[key], list):
            raise WeightsError(f"config.json: {key} is {quote(scaling[key])}, expected a list; take it from the model's source")
        numbers[key] = tuple(real({key: factor}, key) for factor in scaling[key])
    name = "longrope" if name == "su" else name
    return RopeConfig(theta=theta, scaling=name, original_positions=0 if name == "linear" else original, **numbers)


def decoder_to(config: DecoderConfig) -> dict[str, Any]:
    """The keys of config.json that describe the decoder.

    Raises:
      WeightsError: the heads have a width that the official code cannot have.
    """
    if config.head_dim * config.heads != config.width:
        raise WeightsError(
            f"config.decoder has {config.heads} heads of {config.head_dim} in a width of {config.width}; the official code has "
            f"heads of width / heads = {config.width / config.heads:g}; there is no official form of this model"
        )
    rope = config.rope
    scaling: dict[str, Any] | None = None
    if rope.scaling == "linear":
        scaling = {"type": "linear", "factor": rope.factor}
    elif rope.scaling == "llama3":
        scaling = {"rope_type": "llama3", "factor": rope.factor, "low_freq_factor": rope.low_freq_factor}
        scaling |= {"high_freq_factor": rope.high_freq_factor, "original_max_position_embeddings": rope.original_positions}
    elif rope.scaling != "none":
        name = "su" if rope.scaling == "longrope" else rope.scaling
        scaling = {"type": name, "short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    values = {
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": rope.theta,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }
    if config.architecture == "phi3":
        values["original_max_position_embeddings"] = rope.original_positions or config.max_positions
        values["sliding_window"] = config.sliding_window or None
    elif config.sliding_window:
        values["sliding_window"] = config.sliding_window
    else:
        values["attention_bias"] = False
    return values


def number(values: Mapping[str, Any], key: str, *, above: int | None = 0) -> int:
    """A whole number of config.json, larger than `above`, and no larger than such a number is in any model.

    Raises:
      WeightsError: it is something else.
    """
    value, most = values[key], _MOST_OF.get(key, _MOST)
    over = type(value) is int and abs(value) > most
    if type(value) is not int or over or (above is not None and value <= above):
        wanted = "a whole number" + ("" if above is None else f" above {above}") + (f" up to {most}" if over else "")
        raise WeightsError(f"config.json: {key} is {quote(value)}, expected {wanted}; take it from the model's source")
    return value


def real(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number of config.json.

    Raises:
      WeightsError: it is something else.
    """
    value = values.get(key, default)
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise WeightsError(f"config.json: {key} is {quote(value)}, expected a number; take it from the model's source")
    return float(value)


def flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """true or false; WeightsError where it is something else."""
    return _of_kind(values, key, default, bool, "true or false")


def section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object inside an object, empty where it is absent; WeightsError where it is something else."""
    return _of_kind(values, key, {}, Mapping, "an object")


def word(values: Mapping[str, Any], key: str, default: str = "") -> str:
    """A string; WeightsError where it is something else."""
    return _of_kind(values, key, default, str, "a string")


def _of_kind(values: Mapping[str, Any], key: str, default: Any, kind: type, wanted: str) -> Any:
    value = values.get(key, default)
    if not isinstance(value, kind):
        raise WeightsError(f"{key} is {quote(value)}, expected {wanted}; take it from the model's source")
    return value
