"""What a reader did while it read a hostile file: Python's own audit events, and the shape of a refusal."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RUNS_CODE = (
    "exec",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "ctypes.dlopen",
)
_seen: list[tuple[str, str]] | None = None
for _name in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
    codecs.lookup(_name)  # a module of Python, imported at the first JSON file that begins in such a way


def _hook(event: str, arguments: tuple) -> None:
    if event == "exec" and sys._getframe(1).f_globals["__name__"] == "typing":
        return  # the annotations of a dataclass
    if _seen is not None and (event == "open" or event.startswith(("socket.", *_RUNS_CODE, "os.re", "os.unlink", "shutil."))):
        _seen.append((event, str(arguments[0]) if arguments else ""))


sys.addaudithook(_hook)


@contextmanager
def reads_only(folder: Path) -> Iterator[None]:
    """Fails where anything but reading inside `folder` happened: another file, a connection, a process, code that runs."""
    global _seen
    _seen = []
    try:
        yield
    finally:
        seen, _seen = _seen, None
    others = [(event, what) for event, what in seen if event != "open" or not what.startswith(str(folder))]
    assert not others, others[:3]


def is_one_line(error: Exception, most: int = 700) -> None:
    """A refusal is one printable line that holds little of what a stranger wrote."""
    text = str(error)
    assert len(text.splitlines()) == 1
    assert len(text) < most, text
