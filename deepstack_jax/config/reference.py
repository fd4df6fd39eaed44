"""Every key with its meaning, default and valid values: what docs/config.md and `--config.help` show."""

import dataclasses
import inspect
import typing
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from deepstack_jax.config.build import on_resume
from deepstack_jax.config.fields import (
    LENGTH,
    MAY_CHANGE,
    SAME_EXAMPLES,
    by_architecture,
    hints,
    meanings,
    unwrap,
    valid_values,
)
from deepstack_jax.config.schema import Config
from deepstack_jax.printing import cut


class Key(NamedTuple):
    """A key of the reference."""

    name: str  # dotted, without "config."
    value: str  # the default, or what a configuration has
    valid: str
    meaning: str
    resume: str  # what may change when a run goes on: "free", "same examples", "from its step on", or nothing


class Section(NamedTuple):
    """Keys that belong together."""

    name: str  # dotted; "" for those of no section
    meaning: str
    keys: list[Key]


def reference(config: Config | None = None) -> Iterator[Section]:
    """The sections in the schema's order, each before those in it, with the values of a configuration.

    Without one these are the defaults, and besides them there are the keys that single architectures add.
    """
    yield from _sections(config or Config(), "", all_defaults=config is None)


def _sections(section: Any, name: str, *, all_defaults: bool) -> Iterator[Section]:
    inner, keys = [], []
    for field, hint in hints(type(section)).items():
        value, path = getattr(section, field), f"{name}.{field}" if name else field
        kind, marks = unwrap(hint)
        if dataclasses.is_dataclass(value):
            inner += _sections(value, path, all_defaults=all_defaults)
            for architecture, cls in by_architecture(marks).items() if all_defaults else ():
                added = [_key(path, key, cls(architecture=architecture)) for key in hints(cls) if key not in hints(kind)]
                inner += [Section(path, f"With {path}.architecture={architecture} also:", added)] if added else []
        elif typing.get_origin(kind) is dict:
            named = {"NAME": typing.get_args(kind)[1]()} if all_defaults else value
            for item, entry in named.items():
                inner += _sections(entry, f"{path}.{item}", all_defaults=all_defaults)
        else:
            keys.append(_key(name, field, section))
    yield Section(name, inspect.cleandoc(type(section).__doc__ or ""), keys)
    yield from inner


def _key(section: str, field: str, values: Any) -> Key:
    cls = type(values)
    valid, meaning = valid_values(hints(cls)[field]), meanings(cls)[field]
    name = f"{section}.{field}" if section else field
    resume = {MAY_CHANGE: "free", SAME_EXAMPLES: "same examples", LENGTH: "from its step on"}.get(on_resume(name), "")
    return Key(name, cut(repr(getattr(values, field)), 100), valid, meaning, resume)


def as_text(config: Config | None = None, left_open: Collection[str] = ()) -> str:
    """The reference as `--config.help` prints it, by flags.

    Args:
      left_open: keys whose values the weights will say.
    """
    blocks = []
    for section in reference(config):
        lines = [section.name and f"{section.name}: {' '.join(section.meaning.split())}"]
        for key in section.keys:
            value = "(what the weights say)" if key.name in left_open else key.value
            lines += [f"  --config.{key.name}={value}", f"      {key.meaning} [{key.valid}]"]
        blocks.append("\n".join(filter(None, lines)))
    return "\n\n".join(blocks)


def as_markdown() -> str:
    """The reference as docs/config.md."""
    blocks = []
    for section in reference():
        title = f"## {section.name or 'config'}\n\n" if not section.meaning.startswith("With ") else ""
        rows = ["| key | default | valid values | meaning | on resume |", "|---|---|---|---|---|"]
        for name, value, valid, meaning, resume in section.keys:
            rows.append(f"| `{name}` | `{value}` | {valid} | {meaning.replace('|', '/')} | {resume} |")
        table = "\n".join(rows) if section.keys else ""
        blocks.append(f"{title}{' '.join(section.meaning.split())}\n\n{table}".strip())
    return "\n\n".join(blocks) + "\n"
