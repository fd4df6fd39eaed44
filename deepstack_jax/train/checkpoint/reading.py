"""Reading checkpoints: retries transient failures, reports damage at once."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from deepstack_jax.errors import UserError
from deepstack_jax.jax_messages import is_out_of_memory, is_transient
from deepstack_jax.printing import cut

log = logging.getLogger(__name__)

T = TypeVar("T")

PAUSES = (1.0, 3.0, 10.0)
"""Seconds before each further try."""

# How the bytes of a damaged file fail in json, orbax and tensorstore; its DATA_LOSS and NOT_FOUND come as ValueErrors.
_UNDECODABLE = (ValueError, LookupError, TypeError, AttributeError, EOFError, RecursionError, OSError)
_NOW = "now: "  # before what a host says of a failure that is not damage


class CheckpointError(UserError):
    """The checkpoints in a workdir cannot be used by this run, or none could be written; no good one was touched."""


class UnreadableError(CheckpointError, OSError):
    """Storage that fails now, after several tries; nothing is known to be damaged, and nothing was changed."""


def is_damage(error: BaseException) -> bool:
    """Whether an error is about the bytes that were read (missing, cut, not what they should be) and nothing passing."""
    return isinstance(error, _UNDECODABLE) and not is_transient(error)


def read_or_damage(
    what: str, read: Callable[[], T], agree: Callable[[str], list[str]] = lambda said: [said]
) -> tuple[T | None, str]:
    """(what `read` gives, ""), or (None, what is damaged). All other failures are tried again, after a pause.

    Args:
      what: is read, for messages.
      agree: what all hosts say that read it together: they go on, try again or give up together. Alone by default.

    Raises:
      UnreadableError: the storage still fails at the last try.
      Exception: anything else is raised as it is: too little memory, or a defect.
    """
    for pause in (*PAUSES, None):
        result, failure = None, None
        try:
            result = read()
        except Exception as error:  # tensorstore, orbax and json each raise their own kinds
            failure = error.with_traceback(None)  # whose frames may hold what memory lacks
        mine = "" if failure is None else cause_line(failure) if is_damage(failure) else f"{_NOW}{cause_line(failure)}"
        said = [text for text in agree(mine) if text]
        passing = [text.removeprefix(_NOW) for text in said if text.startswith(_NOW)]
        if not passing:
            return (None, said[0]) if said else (result, "")
        if pause is not None:
            log.warning("%s cannot be read now (%s); trying again in %g s", what, passing[0], pause)
            time.sleep(pause)
        elif failure is not None and (is_out_of_memory(failure) or not is_transient(failure)):
            raise failure
        else:
            raise UnreadableError(
                f"{what} cannot be read now, in {len(PAUSES) + 1} tries: {passing[0]}; nothing is known to be damaged and "
                "nothing was changed: run the same command again when its storage answers"
            ) from failure
    raise AssertionError("the last try returns or raises")


def read_workdir_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a workdir.

    Raises:
      CheckpointError: it is missing or damaged, or (UnreadableError) cannot be read now.
    """
    value, damage = read_or_damage(str(file), lambda: json.loads(file.read_text()))
    if not damage and not isinstance(value, dict):
        damage = f"it holds a {type(value).__name__}, expected an object"
    if damage:
        raise CheckpointError(f"{file} is damaged ({damage})")
    return value or {}


def check_links(folder: Path) -> None:
    """Refuse a checkpoint with a link that leads out of it: a stranger's could make any file here parameters of the model.

    The folder itself may be one, and links of the Hugging Face cache lead to its `blobs`.

    Raises:
      CheckpointError: naming the link.
    """
    place = os.path.realpath(folder).split("/snapshots/")[0]
    for here, folders, names in os.walk(folder):
        for path in (os.path.join(here, name) for name in (*folders, *names)):
            if os.path.islink(path) and not os.path.realpath(path).startswith(f"{place}/"):
                raise CheckpointError(
                    f"{path} is a link out of its checkpoint, to {os.path.realpath(path)}; put the file there"
                )


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints that lie in a workdir, damaged ones among them; OSError where that cannot be told now."""
    folder = workdir / "checkpoints"
    names, _ = read_or_damage(str(folder), lambda: os.listdir(folder))
    return sorted(int(name) for name in names or () if name.isascii() and name.isdigit())


def cause_line(error: BaseException) -> str:
    """In one line; of a long chain of causes the beginning and the end, which has the first cause."""
    return cut((str(error).splitlines() or [type(error).__name__])[0])
