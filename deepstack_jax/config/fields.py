"""What the annotation of a key says: its type, its choices or range, and whether it may change while a run is stopped.

    size: Annotated[int, positive(16_384)] = 336  # side of a crop in pixels
    fit: Literal["stretch", "letterbox"] = "stretch"  # how an image gets the shape of its grid
    log_every: Annotated[int, positive(), MAY_CHANGE] = 10  # steps between lines of the log

The comment is the key's meaning, with its unit: `docs/config.md` and `--config.help` show it.
"""

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from deepstack_jax.errors import ConfigError, nearest
from deepstack_jax.printing import label, quote

MAY_CHANGE = "may change"
"""Marks a key, or a section, that changes no result: a run may go on with another value."""
SAME_EXAMPLES = "same examples"
"""Marks a key that may change as far as the same examples come out, token by token."""
LENGTH = "length"
"""Marks a key that says how long a run is: one that goes on may become longer, or shorter than it was to be."""


@dataclass(frozen=True)
class Range:
    """Valid numbers, from `least` to `most` unless `above` excludes the first or `below` the last; NaN is never valid.

    Args:
      expected: the range in words, for the error and the docs.
      most: None = what i32 or f32 holds with room to spare. What is beyond any machine is worth a limit, even if it could be
        represented: it would take the memory, or hours, before it failed.
    """

    least: float = -math.inf
    expected: str = "a number"
    most: float | None = None
    above: bool = False
    below: bool = False

    def problem(self, value: float) -> str:
        """What was expected, "" where the value lies inside."""
        limit = 2**31 - 1 if isinstance(value, int) else 1e30
        most = limit if self.most is None else self.most
        least = max(self.least, -limit)
        if (least < value if self.above else least <= value) and (value < most if self.below else value <= most):
            return ""
        return f"{self.expected}, at most {most:,}" if value > most else self.expected


@dataclass(frozen=True)
class OneOf:
    """Valid names that are registered at run time, or that another package lists."""

    names: Collection[str]


def positive(most: float | None = None) -> Range:
    """Numbers above 0."""
    return Range(0, "a number above 0", most, above=True)


def count(meaning_of_0: str = "none", most: float | None = None) -> Range:
    """Whole numbers from 0 on."""
    return Range(0, f"0 ({meaning_of_0}) or more", most)


NOT_NEGATIVE = Range(0, "a number from 0 on")
ANY_NUMBER = Range()
Seed = Annotated[int, Range(0, "a whole number from 0 to 4294967295", 2**32 - 1)]  # jax drops higher bits: two would be one


class ConfigValue(NamedTuple):
    """A value of a configuration that is not a section, or an item of a list in it."""

    key: str  # dotted, without "config."
    value: Any
    kind: Any  # its bare type
    marks: tuple[Any, ...]

    def problem(self) -> str:
        """Why the value is outside of its choices or range, "" where it is inside."""
        if valid := choices(self.kind, self.marks):
            return "" if self.value in valid else f"config.{self.key} got {quote(self.value)}; {nearest(self.value, valid)}"
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            return ""
        bounds = next((mark for mark in self.marks if isinstance(mark, Range)), ANY_NUMBER)
        expected = bounds.problem(self.value)
        return f"config.{self.key} got {quote(self.value)}, expected {expected}" if expected else ""


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The annotation of every field."""
    return typing.get_type_hints(cls, include_extras=True)


def unwrap(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The bare type of an annotation, and its marks."""
    return (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())


def by_architecture(marks: tuple[Any, ...]) -> dict[str, type]:
    """Classes of a section by its key `architecture`, which chooses one: the mark that is a dict; empty for others."""
    return next((mark for mark in marks if isinstance(mark, dict)), {})


def choices(kind: Any, marks: tuple[Any, ...]) -> tuple[str, ...]:
    """Valid values of a key that has a choice, () for others."""
    listed = next((tuple(mark.names) for mark in marks if isinstance(mark, OneOf)), ())
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else listed


def leaves(value: Any, hint: Any, key: str = "") -> Iterator[ConfigValue]:
    """Every value below `value`, which is of the annotated type."""
    kind, marks = unwrap(hint)
    if dataclasses.is_dataclass(value):
        for name, inner in hints(type(value)).items():
            yield from leaves(getattr(value, name), inner, f"{key}.{name}" if key else name)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, typing.get_args(kind)[1], f"{key}.{label(name)}")
    elif isinstance(value, tuple):
        items = typing.get_args(kind)
        for number, item in enumerate(value):
            yield from leaves(item, items[0] if items[-1] is Ellipsis else items[number], f"{key}[{number}]")
    else:
        yield ConfigValue(key, value, kind, marks)


def find(cls: type, key: str) -> tuple[Any, tuple[Any, ...]]:
    """The bare type of a dotted key, and the marks of it and of the sections that it lies in.

    Raises:
      ConfigError: no such key; the nearest is named.
    """
    kind, marks, path = cls, (), ""
    for name in key.split("."):
        if typing.get_origin(kind) is dict:
            inner = typing.get_args(kind)[1]
        elif dataclasses.is_dataclass(kind):
            valid = {k: v for one in (*by_architecture(marks).values(), kind) for k, v in hints(typing.cast(type, one)).items()}
            if name not in valid:
                raise ConfigError(f"unknown key config{path}.{label(name)}; {nearest(name, valid)}")
            inner = valid[name]
        else:
            raise ConfigError(f"unknown key config{path}.{label(name)}; config{path} is a value, which has no keys")
        kind, more = unwrap(inner)
        marks, path = (*(mark for mark in marks if not isinstance(mark, dict)), *more), f"{path}.{label(name)}"
    return kind, marks


def valid_values(hint: Any) -> str:
    """Valid values of an annotated key, in words."""
    kind, marks = unwrap(hint)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if valid := choices(kind, marks):
        return ", ".join(valid)
    if origin is dict:
        return "names of your choice, each with the keys below"
    if origin is tuple:
        inner = [valid_values(arg) for arg in args if arg is not Ellipsis]
        return f"list of {inner[0]}" if args[-1] is Ellipsis else f"({', '.join(inner)})"
    bounds = next((mark for mark in marks if isinstance(mark, Range)), None)
    if bounds is None:
        return {str: "text", bool: "True, False", int: "whole number", float: "number"}.get(kind, "")
    most = "" if bounds.most in (None, math.inf) or bounds.below else f", at most {bounds.most:,}"
    words = bounds.expected.replace("a number", "whole number" if kind is int else "number", 1)
    return words if f"{bounds.most}" in words else words + most


@functools.cache
def meanings(cls: type) -> types.MappingProxyType[str, str]:
    """The meaning of every field: the comment after it, or the lines of comment above it."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            code, _, comment = line.partition("#")
            if name := re.match(r" {4}(\w+): ", code):
                found[name[1]] = " ".join([*above, comment.strip()]).strip()
            above = [*above, comment.strip()] if comment and not code.strip() else []
    return types.MappingProxyType(found)
