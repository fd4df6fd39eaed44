"""What a run leaves behind to read: metrics.jsonl, TensorBoard curves, and the quarantine list."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from deepstack_jax import __version__
from deepstack_jax.data.encode import BadExample


class MetricsLog:
    """Appends one JSON line per record to metrics.jsonl, and its numbers to TensorBoard.

    Args:
      workdir: an existing folder.
      resume_step: records past it are dropped: the steps after the checkpoint run again.
    """

    def __init__(self, workdir: Path, resume_step: int) -> None:
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
            scratch = self._path.with_suffix(".tmp")
            scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(scratch, self._path)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record `values` at `step`; numbers become curves."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Show a text in TensorBoard."""
        self._board.add_text(name, markdown, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All records of a run; a last line that a kill cut short is left out."""
    records = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class Quarantine:
    """Counts examples that could not be used and writes each, once, with its reason to quarantine.jsonl.

    Args:
      workdir: where the list is kept.
      max_fraction: share of the examples seen so far that may be bad; judged as if at least GRACE had been seen, or the whole
        source where it is smaller, so that one bad image in the first batch is no catastrophe.
      examples: rows of the source.
    """

    GRACE = 1000

    def __init__(self, workdir: Path, max_fraction: float, examples: int) -> None:
        self._path = workdir / "quarantine.jsonl"
        self._max_fraction, self._grace = max_fraction, min(self.GRACE, examples)
        self._bad: set[int] = set()  # of this attempt: what was mended since the last one no longer counts
        self._known: set[int] = set()
        if self._path.exists():
            self._known = {json.loads(line)["index"] for line in self._path.read_text().splitlines()}

    def add(self, bad: tuple[BadExample, ...], seen: int) -> int:
        """Record the bad ones among `seen` examples since this attempt began; returns how many distinct ones there are.

        Raises:
          QuarantineError: they are more than the configured share. Training on would silently shrink the data.
        """
        for example in bad:
            self._bad.add(example.index)
            if example.index in self._known:
                continue
            self._known.add(example.index)
            with self._path.open("a") as file:
                file.write(json.dumps({"index": example.index, "name": example.name, "reason": example.reason}) + "\n")
        if bad and len(self._bad) > self._max_fraction * max(seen, self._grace):
            raise QuarantineError(
                f"{len(self._bad)} of {max(seen, self._grace)} examples cannot be used, more than "
                f"config.data.max_bad_fraction={self._max_fraction}; the last: {bad[-1].reason}; "
                f"all of them with reasons: {self._path}"
            )
        return len(self._bad)


class QuarantineError(ValueError):
    """Too much of the data cannot be used."""


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(scratch, path)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    return {"deepstack_jax": __version__, **{name: version(name) for name in names}, "devices": str(jax.devices())}
