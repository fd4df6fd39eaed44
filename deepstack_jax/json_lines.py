"""Files of JSON lines that a run adds to, and that are read whatever a kill or a full disk left of them."""

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Lines:
    """Appends records to a file. Where it cannot be written, a warning says so once, and the run goes on: it can still save.

    Args:
      path: in an existing folder; None writes nothing, as on all hosts but the first.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._failed = False  # the last time; a disk stays full for many records

    def append(self, record: dict[str, Any]) -> bool:
        """Add one line; returns whether it is written."""
        if self._path is None:
            return False
        line = json.dumps(record).encode() + b"\n"
        try:
            with self._path.open("ab+") as file:
                if size := file.tell():
                    file.seek(size - 1)
                    line = line if file.read(1) == b"\n" else b"\n" + line  # what was cut short must not spoil this one
                file.write(line)
        except OSError as error:
            if not self._failed:
                log.warning("cannot write to %s: %s; the run goes on without", self._path, error.strerror)
            self._failed = True
            return False
        self._failed = False
        return True


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All records of a file; a line that was cut short or damaged is left out.

    Raises:
      OSError: it cannot be read.
    """
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
