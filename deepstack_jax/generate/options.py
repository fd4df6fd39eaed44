"""What a user may ask of an answer, checked before anything is read or compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deepstack_jax.errors import UserError, nearest
from deepstack_jax.generate.sampling import Sampling


class RequestError(UserError):
    """A prompt, an image count or an option that cannot be answered; one line with what, got, expected and the next move."""


@dataclasses.dataclass(frozen=True)
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

    Raises:
      RequestError: a value of the wrong type or out of range.
    """

    max_new_tokens: int = 64
    temperature: int | float = 0.0
    top_p: int | float = 1.0
    top_k: int = 0
    stop: str | Sequence[str] = ()
    seed: int | Sequence[int] = 0
    template: str | None = None
    exif: str = "apply"

    def __post_init__(self) -> None:
        _check(vars(self))

    def replace(self, changes: Mapping[str, Any]) -> Options:
        """The same with some of them changed.

        Raises:
          RequestError: an unknown name, or a value out of range.
        """
        unknown = [name for name in changes if name not in _VALID]
        if unknown:
            raise RequestError(f"unknown option {unknown[0]!r}; {nearest(unknown[0], _VALID)}")
        _check(changes)
        return dataclasses.replace(self, **changes)

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
        padded = [int(seed) & 0x7FFFFFFF for seed in seeds] + [0] * (-prompts % rows)
        return [
            Sampling(
                temperature=np.full(rows, self.temperature, np.float32),
                top_p=np.full(rows, self.top_p, np.float32),
                top_k=np.full(rows, min(self.top_k, 2**31 - 1), np.int32),
                seed=np.array(padded[first : first + rows], np.int32),
            )
            for first in range(0, prompts, rows)
        ]


_WHOLE = (int, np.integer)
_NUMBER = (int, float, np.integer, np.floating)
# Option -> types that it may have, what else must hold, and both in words.
_VALID: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "max_new_tokens": (_WHOLE, lambda value: value >= 1, "a whole number from 1 on"),
    "temperature": (_NUMBER, lambda value: 0 <= value < 1e38, "0 (greedy) or more"),
    "top_p": (_NUMBER, lambda value: 0 < value <= 1, "more than 0 and at most 1 (1 = all tokens)"),
    "top_k": (_WHOLE, lambda value: value >= 0, "0 (all tokens) or more"),
    "stop": ((str, list, tuple), lambda _: True, "a string or a list of them"),
    "seed": ((*_WHOLE, list, tuple, np.ndarray), lambda _: True, "a whole number, or one per prompt"),
    "template": ((str, type(None)), lambda _: True, "the name of a conversation template"),
    "exif": ((str,), lambda value: value in ("apply", "ignore"), "'apply' or 'ignore'"),
}


def _check(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        kinds, fits, expected = _VALID[name]
        if not isinstance(value, kinds) or isinstance(value, bool) or not fits(value):
            raise RequestError(f"{name} got {value!r}, expected {expected}")
    stop = values.get("stop", ())
    for text in [stop] if isinstance(stop, str) else stop:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop got {text!r}, expected strings that are not empty")
