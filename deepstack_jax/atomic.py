"""Files that are there whole or not at all."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from deepstack_jax.printing import printable

SCRATCH = ".part-"
"""How the name of a file begins that is still being written."""


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write to (and to seek and read), which takes the place of `path` at once when the block ends without an error.

    Whenever the machine stops, the old file is there or the new one. Until then it is beside it under a name that nobody
    else has: neither another process, nor a user's file, nor a link that was laid there.

    Raises:
      OSError: it cannot be written; names `path`, which a failed write does not know.
    """
    path = Path(path)
    scratch = path.with_name(f"{SCRATCH}{uuid.uuid4().hex}")
    try:
        try:
            with scratch.open("xb+") as file:  # x: never through a link
                yield file
                file.flush()
                os.fsync(file.fileno())  # else the name may be on the disk before what it names
            os.replace(scratch, path)
        except BaseException:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise
    except OSError as error:
        if error.filename in (None, str(scratch)):
            error.filename = str(path)
        raise


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace a file at once by `content`, text as UTF-8; OSError as `whole_file`."""
    with whole_file(path) as file:  # half a surrogate, which UTF-8 has no bytes for, becomes the escape that JSON has for it
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """The same of a value as JSON, in ASCII: it is read back, whatever the encoding of the system."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: str | os.PathLike[str], values: Iterable[Any]) -> None:
    """The same of JSON values, one a line, for people to read: what a terminal obeys, half a surrogate, and what some take for
    the end of a line, is escaped.
    """
    write_whole(path, "".join(f"{printable(json.dumps(value, ensure_ascii=False))}\n" for value in values))
