"""What a run shows in TensorBoard."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
from tensorboardX.summary import image, scalar, text

from deepstack_jax.printing import printable

log = logging.getLogger(__name__)

FLUSH_SECONDS = 30


class TensorBoardWriter:
    """Writes curves, texts and pictures where TensorBoard finds them, until that fails: then a warning, and nothing more.

    tensorboardX' own SummaryWriter writes in a thread. A full disk ends that thread, then its queue fills and the run
    waits for ever; so events are written here, at once.

    Args:
      folder: made where it is not there.
      resume_step: what an earlier attempt showed beyond it is not shown any more.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._folder = folder
        self._file: EventsWriter | None = None
        self._flush_at = 0.0
        try:
            folder.mkdir(exist_ok=True)
            self._file = EventsWriter(str(folder / "events"))
        except OSError as error:
            self._give_up(error)
        if resume_step:
            self._write(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Add a point to each curve."""
        for name, value in numbers.items():
            self._add(step, scalar(name, value))

    def sample(self, step: int, name: str, markdown: str, picture: np.ndarray | None) -> None:
        """Show a text, and what it is about as u8[y, x, 3]."""
        self._add(step, text(name, printable(markdown)))  # half a surrogate would end the run
        if picture is not None:
            self._add(step, image(name, picture, dataformats="HWC"))

    def close(self) -> None:
        """Write what still waits."""
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._give_up(error)
        self._file = None

    def _add(self, step: int, summary: Any) -> None:
        self._write(Event(step=step, summary=summary))

    def _write(self, event: Event) -> None:
        if self._file is None:
            return
        event.wall_time = time.time()
        try:
            self._file.write_event(event)
            if event.wall_time >= self._flush_at:
                self._file.flush()
                self._flush_at = event.wall_time + FLUSH_SECONDS
        except OSError as error:  # what is in the file may end within an event: nothing after it would be read
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("cannot write to %s: %s; TensorBoard shows no more of this attempt", self._folder, error.strerror)
        with contextlib.suppress(OSError):  # the same once more
            if self._file is not None:
                self._file.close()
        self._file = None
