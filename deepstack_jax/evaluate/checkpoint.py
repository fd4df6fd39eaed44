"""What an evaluation that was stopped has answered already, so that the same command goes on from there.

Every batch of answers is one line, appended when it is there. A line that a kill cut short is dropped with its batch: what is
asked after that are the batches that an uninterrupted evaluation would have asked, and so its answers, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepstack_jax.evaluate.held_out import Prediction, Refusal


class EvalCheckpoint:
    """Answers of one evaluation on their way to `predictions.jsonl`.

    Args:
      folder: where they are kept until it is done; None keeps none.
      key: all that the answers depend on: another model, other data or options have another file.

    Attributes:
      file: the answers so far; None without a folder.
    """

    def __init__(self, folder: Path | None, key: dict[str, Any] | None) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.file = None if folder is None else folder / f"predictions-{digest}.unfinished"
        self._before: list[dict[str, Any]] = []
        if self.file is None or not self.file.exists():
            return
        whole = 0
        for line in self.file.read_bytes().splitlines(keepends=True):
            try:
                self._before += json.loads(line.decode() if line.endswith(b"\n") else "cut short")
            except ValueError:
                break
            whole += len(line)
        os.truncate(self.file, whole)  # what is appended begins a line

    def answers(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Answers of earlier attempts by row and turn, as lines of predictions.jsonl."""
        return {(line["row"], line["turn"]): line for line in self._before if "prediction" in line}

    def refused(self) -> list[Refusal]:
        """Questions that earlier attempts could not ask."""
        return [Refusal(**line) for line in self._before if "prediction" not in line]

    def keep(self, results: Sequence[Prediction | Refusal]) -> None:
        """Append a batch."""
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps([result.as_dict() for result in results]) + "\n")

    def done(self) -> None:
        """The answers stand elsewhere now."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
