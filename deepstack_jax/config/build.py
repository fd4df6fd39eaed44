"""From ml_collections' ConfigDict, or config.json, to frozen dataclasses and back."""

import contextlib
import dataclasses
import json
import math
import typing
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

from deepstack_jax.config.checks import check_config
from deepstack_jax.config.fields import LENGTH, MAY_CHANGE, SAME_EXAMPLES, by_architecture, find, hints, unwrap
from deepstack_jax.config.schema import SECTIONS, Config, DecoderConfig, VisionConfig
from deepstack_jax.config.upgrade import SCHEMA, upgrade
from deepstack_jax.errors import ConfigError, nearest
from deepstack_jax.printing import label, quote, redacted

T = TypeVar("T")


def default_config(vision: str = VisionConfig.architecture, decoder: str = DecoderConfig.architecture) -> ConfigDict:
    """All defaults as a ConfigDict, for the files in `configs/` to change; two sections have the keys of their architectures.

    Raises:
      ConfigError: an architecture that nobody has registered.
    """
    sections = {}
    for section, name in (("vision", vision), ("decoder", decoder)):
        if name not in SECTIONS[section]:
            raise ConfigError(f"{section} architecture got {quote(name)}; {nearest(name, SECTIONS[section])}")
        sections[section] = SECTIONS[section][name](architecture=name)
    return ConfigDict(to_dict(Config(**sections)), convert_dict=True)


def build_config(source: ConfigDict | dict[str, Any]) -> Config:
    """The frozen Config of a ConfigDict, checked.

    Raises:
      ConfigError: an unknown key (the nearest valid one is named), a value of the wrong type, or an impossible combination.
    """
    config = _convert(source.to_dict() if isinstance(source, ConfigDict) else source, Config, "config")
    check_config(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of a Config; `build_config` reads it back."""
    return dataclasses.asdict(config)


def to_stored(config: Config) -> dict[str, Any]:
    """What config.json of a workdir holds: every key, and the number of the schema that they are of."""
    return {"schema": SCHEMA, **to_dict(config)}


def from_stored(stored: dict[str, Any]) -> Config:
    """The Config of a config.json, which this or an earlier release wrote.

    Raises:
      ConfigError: as `build_config`, and for a file of a later release.
    """
    return build_config(upgrade(stored))


def differences(ours: Config, stored: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ from a config.json, also one of an earlier release, as {dotted key: (ours, theirs)}.

    Both sides are as JSON would write them, without credentials.
    """

    def flatten(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for key in value for k, v in flatten(value[key], f"{path}.{key}" if path else str(key)).items()}
        return {path: list(value) if isinstance(value, tuple) else value}

    theirs = upgrade(stored)
    with contextlib.suppress(ConfigError):  # a key that was not there yet had what is its default by now
        theirs = to_dict(_build(Config, theirs, "config"))
    mine, other = (flatten(redacted(json.loads(json.dumps(side))), "") for side in (to_dict(ours), theirs))
    keys = [*mine, *(key for key in other if key not in mine)]
    return {key: (mine.get(key), other.get(key)) for key in keys if mine.get(key) != other.get(key)}


def on_resume(key: str) -> str:
    """`MAY_CHANGE`, `SAME_EXAMPLES` or `LENGTH` of a dotted key, "" where a run with another value would be another run."""
    with contextlib.suppress(ConfigError):  # a key of another release
        return next((mark for mark in find(Config, key)[1] if mark in (MAY_CHANGE, SAME_EXAMPLES, LENGTH)), "")
    return ""


def _build(cls: type[T], values: dict[str, Any], path: str) -> T:
    valid = hints(cls)
    for key in values:
        if key not in valid:
            raise ConfigError(f"unknown key {path}.{label(key)}; {nearest(key, valid)}")
    return cls(**{key: _convert(value, valid[key], f"{path}.{key}") for key, value in values.items()})


def _convert(value: Any, hint: Any, path: str) -> Any:
    """The value as its annotation has it; only its type is looked at."""
    kind, marks = unwrap(hint)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{path} got {quote(value)}, expected the keys of {kind.__name__}")
        classes, default = by_architecture(marks), typing.cast(Any, kind)
        name = value.get("architecture", default.architecture) if classes else ""
        return _build(classes.get(name, kind) if isinstance(name, str) else kind, value, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path} got {quote(value)}, expected a dict of {args[1].__name__}")
        return {str(key): _convert(item, args[1], f"{path}.{label(key)}") for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} got {quote(value)}, expected a list")
        items = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(items) != len(value):
            raise ConfigError(f"{path} got {len(value)} values, expected {len(items)}")
        return tuple(_convert(item, inner, f"{path}[{i}]") for i, (item, inner) in enumerate(zip(value, items, strict=True)))
    kind = str if origin is Literal else kind
    if not isinstance(value, (int, float) if kind is float else kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{path} got {quote(value)} ({type(value).__name__}), expected {kind.__name__}")
    if kind is str and "\0" in value:
        raise ConfigError(f"{path} got {quote(value)}, expected text without a null character, which no name of a file has")
    if kind is float and isinstance(value, int):
        return float(value) if abs(value) < 2**1000 else math.inf if value > 0 else -math.inf
    return value
