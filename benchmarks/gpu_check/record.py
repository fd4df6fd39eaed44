"""Figures of a stage, printed and saved one by one as they are known, so that a crash or a limit loses none of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.sizes import Size
from deepstack_jax.atomic import write_json

MOST = 1000.0  # a ratio where nothing is left to divide by


class AbsentError(Exception):
    """A stage cannot run here, for a reason that is no failure: a package or a part of this one is not there."""


class Record:
    """What a stage is given, and where its figures go.

    Attributes:
      size: of models and batches.
      earlier: figures of the stages that are done, by stage and name.
    """

    def __init__(self, size: Size, file: Path, earlier: dict[str, Any], limit: float) -> None:
        self.size, self.earlier = size, earlier
        self._file, self._figures, self._ends = file, {}, time.monotonic() + limit

    def add(self, name: str, figures: dict[str, Any]) -> None:
        """Print figures and save them beside those before."""
        self._figures[name] = figures
        write_json(self._file, self._figures)
        print(f"  {name}: {', '.join(f'{key} {_short(value)}' for key, value in figures.items())}", flush=True)

    def left(self) -> float:
        """Seconds until this stage is ended."""
        return self._ends - time.monotonic()

    def figures_of(self, stage: str, name: str) -> dict[str, Any]:
        """What an earlier stage found.

        Raises:
          AbsentError: it has not.
        """
        found = self.earlier.get(stage, {}).get(name)
        if found is None:
            raise AbsentError(f"stage {stage!r} has no figures {name!r} yet; run it first")
        return found


def target(got: float, wanted: float, *, at_most: bool = False) -> dict[str, Any]:
    """A goal, the figure that was reached, and their ratio, 1 or more where the goal is met."""
    better, worse = (wanted, got) if at_most else (got, wanted)
    ratio = better / worse if worse > 0 else MOST
    return {"target": wanted, "got": got, "ratio": ratio, "at_most": at_most}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
