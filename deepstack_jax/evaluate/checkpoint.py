"""What an evaluation that was stopped has answered already, so that the same command goes on from there."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepstack_jax.evaluate.ask import Refusal, Result, result_of
from deepstack_jax.evaluate.tasks import Prediction
from deepstack_jax.json_lines import Lines, read_lines


class EvalCheckpoint:
    """Answers of one evaluation on their way to predictions.jsonl: a line for every batch, appended when it is there.

    A line that a kill cut short is dropped with its batch. What is asked after that are the batches that an uninterrupted
    evaluation would have asked, and so its answers, byte for byte.

    Args:
      folder: where they are kept until it is done; None keeps none.
      key: all that the answers depend on: another model, other data or options have another file.
    """

    def __init__(self, folder: Path | None, key: dict[str, Any] | None) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.file = None if folder is None else folder / f"predictions-{digest}.unfinished"
        self._lines = Lines(self.file)
        lines = read_lines(self.file) if self.file and self.file.exists() else []
        self.results = [result_of(one) for line in lines for one in line["batch"]]
        found = [] if folder is None else sorted(folder.glob("predictions-*.unfinished"))
        self.others = [file for file in found if file != self.file]  # of another key

    def add(self, batch: Sequence[Result]) -> None:
        """Append a batch, rows that could not be read left out: they may be fixed by the next attempt."""
        if kept := [asdict(one) for one in batch if isinstance(one, Prediction | Refusal)]:
            self._lines.append({"batch": kept})

    def remove(self) -> None:
        """The answers are elsewhere now."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
