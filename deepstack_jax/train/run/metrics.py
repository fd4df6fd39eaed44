"""What a run leaves to read: metrics.jsonl, TensorBoard curves, and the quarantine list."""

import contextlib
import importlib
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
from tensorboardX.summary import image, scalar, text

from deepstack_jax.atomic import write_whole
from deepstack_jax.data.example import BadExample
from deepstack_jax.errors import ConfigError, UserError
from deepstack_jax.json_lines import Lines, read_lines
from deepstack_jax.printing import printable

log = logging.getLogger(__name__)

FLUSH_SECONDS = 30  # from one writing of TensorBoard's file to the next


class MetricsLog:
    """Appends one JSON line per record to metrics.jsonl, and shows its numbers in TensorBoard and Weights & Biases.

    Args:
      workdir: an existing folder; None writes nothing, as on all hosts but the first.
      resume_step: records past it are dropped: the steps after the checkpoint run again.
      wandb_run: of the package wandb, where the run is shown there too.
    """

    def __init__(self, workdir: Path | None, resume_step: int, wandb_run: Any = None) -> None:
        self._lines, self._board, self._wandb = None, None, wandb_run
        if workdir is None:
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step] if path.exists() else []
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = Lines(path)
        self._board = TensorBoardWriter(workdir / "tensorboard", resume_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record `values` at `step`; finite numbers become curves."""
        if self._lines is None or self._board is None:
            return
        self._lines.append({"step": step, **values})
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
        self._board.scalars(step, numbers)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def sample(self, step: int, name: str, markdown: str, picture: np.ndarray | None) -> None:
        """Show a text, and what it is about as u8[y, x, 3]."""
        if self._board is not None:
            self._board.sample(step, name, markdown, picture)

    def close(self) -> None:
        """Write what still waits; a full disk is a warning."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


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
            self._write(Event(step=step, summary=scalar(name, value)))

    def sample(self, step: int, name: str, markdown: str, picture: np.ndarray | None) -> None:
        """Show a text, and what it is about as u8[y, x, 3]."""
        # Half a surrogate would end the run.
        self._write(Event(step=step, summary=text(name, printable(markdown))))
        if picture is not None:
            self._write(Event(step=step, summary=image(name, picture, dataformats="HWC")))

    def close(self) -> None:
        """Write what still waits."""
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._give_up(error)
        self._file = None

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


def start_wandb(project: str, workdir: Path, name: str, config: dict[str, Any]) -> Any:
    """The run of the package wandb for this workdir: a new one, or the one that an earlier attempt began.

    Raises:
      ConfigError: the package is not there.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"config.train.wandb={project!r} needs the package wandb: pip install wandb, or leave config.train.wandb empty"
        ) from error
    stored = workdir / "wandb_id.txt"
    if not stored.exists():
        write_whole(stored, wandb.util.generate_id())
    return wandb.init(project=project, name=name, id=stored.read_text(), resume="allow", dir=str(workdir), config=config)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All records of a run; a line that a kill or a full disk cut short is left out."""
    return [line for line in read_lines(workdir / "metrics.jsonl") if isinstance(line.get("step"), int)]


def seconds_per_step(workdir: Path) -> float | None:
    """The median over the run's log lines; None where it was too short to be timed."""
    timed = [record["seconds_per_step"] for record in read_metrics(workdir) if "seconds_per_step" in record]
    return float(np.median(timed)) if timed else None


class Quarantine:
    """Counts examples that could not be used and writes each, once, with its reason to quarantine.jsonl.

    Args:
      workdir: where the list is kept.
      max_fraction: share of the examples seen so far that may be bad; judged as if at least GRACE had been seen, or the whole
        source where it is smaller, so that one bad image in the first batch is not a catastrophe.
      examples: records of the source.
      host: number of this process; each keeps a list of its own, that of the first is quarantine.jsonl.
    """

    GRACE = 1000

    def __init__(self, workdir: Path, max_fraction: float, examples: int, host: int = 0) -> None:
        self._path = workdir / ("quarantine.jsonl" if host == 0 else f"quarantine-{host}.jsonl")
        self._max_fraction, self._grace = max_fraction, min(self.GRACE, examples)
        self._bad: set[int] = set()  # of this attempt: what was fixed since the last one no longer counts
        self._known: set[int] = set()
        self._last = ""
        self._lines = Lines(self._path)
        if self._path.exists():
            self._known = {line["index"] for line in read_lines(self._path) if isinstance(line.get("index"), int)}

    def add(self, bad: tuple[BadExample, ...]) -> int:
        """Record the bad ones; returns how many distinct ones this host has met in this attempt."""
        for example in bad:
            self._bad.add(example.index)
            self._last = example.reason
            if example.index in self._known:
                continue
            if self._lines.append({"index": example.index, "name": example.name, "reason": example.reason}):
                self._known.add(example.index)
        return len(self._bad)

    def check(self, bad: int, seen: int) -> None:
        """Judge the number of bad examples of all hosts among `seen` examples since this attempt began.

        Raises:
          QuarantineError: they are more than the configured share. Training on would silently shrink the data.
        """
        if bad > self._max_fraction * max(seen, self._grace):
            raise QuarantineError(
                f"{bad} of {max(seen, self._grace)} examples cannot be used, more than "
                f"config.data.max_bad_fraction={self._max_fraction}; the last: {self._last or 'on another host'}; "
                f"all of them with reasons: {self._path}"
            )


class QuarantineError(UserError):
    """Too much of the data cannot be used."""
