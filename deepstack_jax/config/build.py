"""From ml_collections' ConfigDict, or config.json, to frozen dataclasses and back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import typing
from typing import Any, TypeVar

from ml_collections import ConfigDict

from deepstack_jax.config.architectures import ARCHITECTURES
from deepstack_jax.config.checks import check_config
from deepstack_jax.config.schema import Config
from deepstack_jax.errors import ConfigError, nearest
from deepstack_jax.printing import label, quote, redacted

T = TypeVar("T")


def default_config() -> ConfigDict:
    """All defaults as a ConfigDict, for the files in `configs/` to change."""
    return ConfigDict(dataclasses.asdict(Config()), convert_dict=True)


def build_config(source: ConfigDict | dict[str, Any]) -> Config:
    """The frozen Config of a ConfigDict, checked.

    Raises:
      ConfigError: an unknown key (the nearest valid one is named), a value of the wrong type, or an impossible combination.
    """
    config = _convert(source.to_dict() if isinstance(source, ConfigDict) else source, Config, "config")
    check_config(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of a Config, for JSON; `build_config` reads it back."""
    return dataclasses.asdict(config)


def differences(ours: Config, theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, as {dotted key: (ours, theirs)}; both sides as JSON would write them, without credentials."""

    def flatten(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for key in value for k, v in flatten(value[key], f"{path}.{key}" if path else str(key)).items()}
        return {path: list(value) if isinstance(value, tuple) else value}

    with contextlib.suppress(ConfigError):  # a key that was not there yet had what is its default by now
        theirs = to_dict(_build(Config, theirs, "config"))
    mine, other = (flatten(redacted(json.loads(json.dumps(side))), "") for side in (to_dict(ours), theirs))
    keys = [*mine, *(key for key in other if key not in mine)]
    return {key: (mine.get(key), other.get(key)) for key in keys if mine.get(key) != other.get(key)}


def _build(cls: type[T], values: dict[str, Any], path: str) -> T:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"unknown key {path}.{label(key)}; {nearest(key, hints)}")
    return cls(**{key: _convert(value, hints[key], f"{path}.{key}") for key, value in values.items()})


def _class_of(plain: type[Any], values: dict[str, Any], path: str) -> type[Any]:
    """The class of a section's keys: that of the architecture which the section names, where it can name one."""
    if plain not in ARCHITECTURES:
        return plain
    known, name = ARCHITECTURES[plain], values.get("architecture", plain().architecture)
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{path}.architecture got {quote(name)}; {nearest(name, known)}")
    return known[name]


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{path} got {quote(value)}, expected the keys of {hint.__name__}")
        return _build(_class_of(hint, value, path), value, path)
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
        return tuple(_convert(item, kind, f"{path}[{i}]") for i, (item, kind) in enumerate(zip(value, items, strict=True)))
    if not isinstance(value, (int, float) if hint is float else hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{path} got {quote(value)} ({type(value).__name__}), expected {hint.__name__}")
    if hint is str and "\0" in value:
        raise ConfigError(f"{path} got {quote(value)}, expected text without a null character, which no name of a file has")
    if hint is float and isinstance(value, int):
        return float(value) if abs(value) < 2**1000 else math.inf if value > 0 else -math.inf
    return value
