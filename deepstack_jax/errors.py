"""What is wrong with what the user gave, in one line that names the next move."""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from deepstack_jax.printing import label, one_line, quote


class UserError(ValueError):
    """A mistake in what was given, or in the world around: a verb shows the message in one line, without a traceback."""


class ConfigError(UserError):
    """A configuration that cannot run; the message names the key, what it got, what was expected and the next move.

    Several messages may come at once; a verb then shows each on a line of its own.
    """

    def __str__(self) -> str:
        return "; ".join(self.args)


class WeightsError(ConfigError):
    """A checkpoint that cannot be used; the message names what, what was expected and the next move."""

    def __init__(self, *messages: str) -> None:
        """Nothing in the names and values of a stranger's file can end a line, fill the screen or speak to a terminal."""
        super().__init__(*map(one_line, messages))


def try_all(*calls: Callable[[], Any]) -> list[Any]:
    """What every call returns.

    Raises:
      ConfigError: with the problems of all of them, each once.
    """
    results, problems = [], {}
    for call in calls:
        try:
            results.append(call())
        except ConfigError as error:
            problems |= dict.fromkeys(error.args)
    if problems:
        raise ConfigError(*problems)
    return results


@contextlib.contextmanager
def flags_as(names: Mapping[str, str]) -> Iterator[None]:
    """Messages about weights name the flags of `convert`; within this block they name what the caller has in their place.

    Args:
      names: flag, without dashes, -> the words for it.
    """
    try:
        yield
    except UserError as error:
        told = [
            re.sub(r"(?<![\w-])--(\w+)(?![\w-])", lambda flag: names.get(flag[1], flag[0]), str(part)) for part in error.args
        ]
        if told == list(error.args):
            raise
        raise type(error)(*told) from error


def fetch_command(path: str) -> str:
    """The command that gets OWNER/NAME of the Hugging Face hub into a folder whose path ends so; "" for other names."""
    found = "://" not in path and re.search(r"[\w.-]+/[\w.-]+$", path)
    return f"hf download {found[0]} --local-dir {path}" if found and path.count("/") > 1 else ""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The nearest valid name, or all of them if none is near, as the end of an error message."""
    valid = sorted(map(str, valid))
    close = difflib.get_close_matches(str(name)[:200], valid, n=1, cutoff=0.5)
    return f"nearest valid name: {quote(close[0])}" if close else f"valid names: {label(', '.join(valid), 500)}"
