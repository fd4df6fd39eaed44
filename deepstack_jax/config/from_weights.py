"""Keys that a configuration file leaves to the weights: None until they are known, then what the weights say.

    config = config_from_weights()  # in a configuration file
    config.train.weights = "checkpoints/llava-1.5-7b"

Who reads the file fills them in before anything is checked or built, so that config.json of a run has every value.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from deepstack_jax.config.build import default_config, to_dict
from deepstack_jax.config.fields import by_architecture, hints, unwrap
from deepstack_jax.config.schema import Config
from deepstack_jax.errors import ConfigError
from deepstack_jax.layout.modes import MODES
from deepstack_jax.printing import quote

_SECTIONS = ("image", "vision", "projector", "decoder", "deepstack")
_DATA = ("template", "tokenizer", "max_length")
_NAMED = ("data.sets", "optimizer.groups")  # whose keys are names of the user's choice


def config_from_weights() -> ConfigDict:
    """All defaults as a ConfigDict, but for what weights say of themselves: model, images, template, tokenizer and length.

    The dtype of activations is left open too, to the device.
    """
    config: Any = default_config()
    for section in _SECTIONS:
        config[section] = _left_open(hints(Config)[section])
    for key in _DATA:
        config.data[key] = config_dict.placeholder(_kind(hints(type(Config().data))[key]))
    config.train.compute_dtype = config_dict.placeholder(str)
    return config


def left_open(values: Mapping[str, Any]) -> list[str]:
    """Dotted keys of a configuration's values that are left to the weights."""
    return [key for key, value in _flat(values) if value is None and _may_be_open(key)]


def _may_be_open(key: str) -> bool:
    section, _, name = key.partition(".")
    return section in _SECTIONS or (section == "data" and name in _DATA) or key == "train.compute_dtype"


def filled_in(values: Mapping[str, Any], known: Config, sizes: Collection[str] = (), weights: str = "") -> dict[str, Any]:
    """The values with those left open as the weights have them.

    Args:
      known: what the weights are.
      sizes: dotted keys in which nothing else than the weights' own value can work.
      weights: their name, for messages.

    Raises:
      ConfigError: values that contradict the weights, each named.
    """
    stored = dict(_flat(to_dict(known)))
    wrong = [
        f"config.{key} got {quote(value)}, {weights} has {quote(stored[key])}; leave --config.{key} out, and the weights say it"
        for key, value in _flat(values)
        if value is not None and key in stored and _plain(value) != _plain(stored[key])
        if any(key == size or key.startswith(f"{size}.") for size in sizes)
    ]
    if wrong:
        raise ConfigError(*wrong)
    found: dict[str, Any] = {}
    for key, value in _flat(values):
        is_open = value is None and _may_be_open(key)
        if is_open and key not in stored:
            continue  # of another architecture than that of the weights
        *sections, name = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = stored[key] if is_open else value
    mode, stack = found["image"]["mode"], found["deepstack"]
    unused = stack["stack"] == "none" and stack["sequence"] == "global" and values["deepstack"]["stack"] is None
    if mode != known.image.mode and mode in MODES and MODES[mode].stacks_crops and unused:
        raise ConfigError(
            f"config.image.mode got {quote(mode)}, whose crops {weights} does not use, since its config.deepstack.stack is "
            "'none'; add --config.deepstack.stack=crops"
        )
    return found


def _left_open(hint: Any) -> ConfigDict:
    """A section, every key of every architecture of it open."""
    kind, marks = unwrap(hint)
    section: Any = ConfigDict()
    for name, inner in {k: v for cls in (*by_architecture(marks).values(), kind) for k, v in hints(cls).items()}.items():
        nested = dataclasses.is_dataclass(unwrap(inner)[0])
        section[name] = _left_open(inner) if nested else config_dict.placeholder(_kind(inner))
    return section


def _kind(hint: Any) -> type:
    """The type that a value of an annotated key has in a ConfigDict."""
    kind = unwrap(hint)[0]
    origin = typing.get_origin(kind)
    return str if origin is typing.Literal else origin or kind


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that are no section; a dict with names of the user's choice is one value."""
    for key, value in values.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping) and value and name not in _NAMED:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
