"""Values out of a stranger's config.json: each is what it must be, or a WeightsError names key, value and the next move."""

from collections.abc import Mapping
from typing import Any

from deepstack_jax.errors import WeightsError
from deepstack_jax.printing import quote

# Keys whose null says something else than their absence: no sliding window (unsaid, Mistral has one), no such token.
_NULL_SAYS = ("sliding_window", "bos_token_id", "eos_token_id", "pad_token_id")
# Most that a size of config.json may be, where it is not _MOST: beyond, no model is meant, and tables of it would take hours.
_MOST = 2**24
_MOST_OF = {
    "num_hidden_layers": 1024,
    "num_crops": 100,
    "image_size": 8192,
    "patch_size": 8192,
    "max_position_embeddings": 2**31,
}
SOURCE = "take it from the model's source"
OTHER = "choose a checkpoint without it"


def present(value: Any) -> Any:
    """JSON without what is null in it: that key is absent, but for those few whose null says something of its own."""
    if isinstance(value, Mapping):
        return {key: present(inner) for key, inner in value.items() if inner is not None or key in _NULL_SAYS}
    return [present(inner) for inner in value] if isinstance(value, list) else value


def expect(values: Mapping[str, Any], key: str, *allowed: Any, move: str = OTHER) -> None:
    """Refuse a value, other than those allowed, that changes what is computed in a way that is not implemented."""
    if values.get(key) is not None and values[key] not in allowed:
        wanted = " or ".join(repr(value) for value in allowed) or "no such key"
        raise WeightsError(f"config.json: {key} is {quote(values[key])}, expected {wanted}; {move}")


def number(values: Mapping[str, Any], key: str, *, above: int | None = 0) -> int:
    """A whole number, larger than `above`, and no larger than such a number is in any model."""
    value, most = values[key], _MOST_OF.get(key, _MOST)
    over = type(value) is int and abs(value) > most
    if type(value) is not int or over or (above is not None and value <= above):
        wanted = "a whole number" + ("" if above is None else f" above {above}") + (f" up to {most}" if over else "")
        raise WeightsError(f"config.json: {key} is {quote(value)}, expected {wanted}; {SOURCE}")
    return value


def real(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number."""
    value = values.get(key, default)
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise WeightsError(f"config.json: {key} is {quote(value)}, expected a number; {SOURCE}")
    return float(value)


def flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """true or false."""
    return _of_kind(values, key, default, bool, "true or false")


def section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object inside an object, empty where it is absent."""
    return _of_kind(values, key, {}, Mapping, "an object")


def word(values: Mapping[str, Any], key: str, default: str = "") -> str:
    """A string."""
    return _of_kind(values, key, default, str, "a string")


def _of_kind(values: Mapping[str, Any], key: str, default: Any, kind: type, wanted: str) -> Any:
    value = values.get(key, default)
    if not isinstance(value, kind):
        raise WeightsError(f"{key} is {quote(value)}, expected {wanted}; {SOURCE}")
    return value
