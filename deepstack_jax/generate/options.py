"""What a user may ask of an answer, checked before anything is read or compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from deepstack_jax.data.encode.tokenizer import Tokenizer
from deepstack_jax.errors import UserError, nearest
from deepstack_jax.generate.sampling import Sampling


@runtime_checkable
class AnswerTokenizer(Tokenizer, Protocol):
    """A Tokenizer, in a form that annotations of this room can be checked against at run time."""


class RequestError(UserError):
    """A prompt, an image count or an option that cannot be answered; one line with what, got, expected and the next move."""


@dataclass(frozen=True)
class Options:
    """How an answer is made.

    Attributes:
      max_new_tokens: most tokens of the answer.
      temperature: 0 = always the most likely token; 1 = as the model weighs them.
      top_p: probability of the nucleus that is drawn from, in (0, 1].
      top_k: number of likeliest tokens that are drawn from; 0 = all.
      stop: the answer ends before the first of these strings, besides the template's own end of turn.
      seed: of the noise; one for all prompts, or one each. A prompt draws the same alone and in any batch.
      template: name of the conversation template; None = the checkpoint's own.
      exif: "apply" turns images upright as EXIF says, "ignore" takes them as they are stored, as the official code does.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: str | Sequence[str] = ()
    seed: int | Sequence[int] = 0
    template: str | None = None
    exif: str = "apply"

    def __post_init__(self) -> None:
        """Raises RequestError on a value of the wrong type or out of range."""
        _check_types(vars(self))
        _within("max_new_tokens", self.max_new_tokens, int, self.max_new_tokens >= 1, "a whole number from 1 on")
        _within("temperature", self.temperature, float, 0 <= self.temperature < float("inf"), "0 (greedy) or more")
        _within("top_p", self.top_p, float, 0 < self.top_p <= 1, "more than 0 and at most 1 (1 = all tokens)")
        _within("top_k", self.top_k, int, self.top_k >= 0, "0 (all tokens) or more")
        _within("exif", self.exif, str, self.exif in ("apply", "ignore"), "'apply' or 'ignore'")
        for text in self.stops:
            _within("stop", text, str, isinstance(text, str) and bool(text), "strings that are not empty")

    def but(self, changes: Mapping[str, Any]) -> Options:
        """The same with some of them changed.

        Raises:
          RequestError: an unknown name, or a value out of range.
        """
        names = [known.name for known in fields(self)]
        unknown = [name for name in changes if name not in names]
        if unknown:
            raise RequestError(f"unknown option {unknown[0]!r}; {nearest(unknown[0], names)}")
        _check_types(changes)
        return replace(self, **changes)

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, prompts: int, rows: int) -> list[Sampling]:
        """The settings of `prompts` prompts as arrays, `rows` at a time, the last ones padded.

        Raises:
          RequestError: the number of seeds is another than that of the prompts.
        """
        seeds = [self.seed] * prompts if isinstance(self.seed, int | np.integer) else list(self.seed)
        if len(seeds) != prompts:
            raise RequestError(f"seed got {len(seeds)} numbers for {prompts} prompts; give one, or one per prompt")
        parts = []
        for first in range(0, prompts, rows):
            part = [int(seed) & 0x7FFFFFFF for seed in seeds[first : first + rows]]
            parts.append(
                Sampling(
                    temperature=np.full(rows, self.temperature, np.float32),
                    top_p=np.full(rows, self.top_p, np.float32),
                    top_k=np.full(rows, min(self.top_k, 2**31 - 1), np.int32),
                    seed=np.array(part + [0] * (rows - len(part)), np.int32),
                )
            )
        return parts


_WHOLE = (int, np.integer)
_NUMBER = (int, float, np.integer, np.floating)
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "max_new_tokens": (_WHOLE, "a whole number from 1 on"),
    "temperature": (_NUMBER, "0 (greedy) or more"),
    "top_p": (_NUMBER, "more than 0 and at most 1 (1 = all tokens)"),
    "top_k": (_WHOLE, "0 (all tokens) or more"),
    "stop": ((str, list, tuple), "a string or a list of them"),
    "seed": ((*_WHOLE, list, tuple, np.ndarray), "a whole number, or one per prompt"),
    "template": ((str, type(None)), "the name of a conversation template"),
    "exif": ((str,), "'apply' or 'ignore'"),
}


def _check_types(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        kinds, expected = _KINDS[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise RequestError(f"{name} got {value!r}, expected {expected}")


def _within(name: str, value: Any, kind: type, fits: bool, expected: str) -> None:
    if not fits or (kind is int and int(value) != value):
        raise RequestError(f"{name} got {value!r}, expected {expected}")
