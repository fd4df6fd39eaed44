"""The held-out data of a training run: checked before it begins, asked about now and then, scored at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepstack_jax.config import Config
from deepstack_jax.data.example import Source
from deepstack_jax.data.open import open_source
from deepstack_jax.evaluate.held_out import HeldOut
from deepstack_jax.evaluate.report import check_held_out, finish, first_sizes, report_held_out
from deepstack_jax.printing import Console
from deepstack_jax.train.core.program import Program
from deepstack_jax.train.run.metrics import MetricsLog
from deepstack_jax.types import PyTree


class TrainingEvaluation:
    """What `train` asks of an evaluator (`train/run/train.py` says what), by `data.validation` and the section `evaluation`.

    Args:
      config: of the run.
      workdir: where results.json and predictions.jsonl go.
    """

    def __init__(self, config: Config, workdir: Path, console: Console) -> None:
        self._config, self._workdir, self._console = config, workdir, console
        self.source: Source | None = None
        self._left_out: set[int] = set()
        self._held_out: HeldOut | None = None

    def open(self, train: Source, *, starts: bool) -> None:
        """Open and check the held-out rows, before anything is compiled."""
        config = self._config
        self._train = train
        if config.data.source == "pages" or config.data.validation:
            self.source = open_source(config.data, "validation")
            self._left_out = check_held_out(self.source, train, config, self._console, starts=starts)

    def begin(self, program: Program, log: MetricsLog) -> None:
        """Take what answers are made with."""
        self._log = log
        if self.source is not None:
            self._held_out = HeldOut(self.source, self._config, program.loss, program.model, program.mesh)
            self._held_out.named |= self._left_out

    def report(self, params: PyTree, step: int) -> float | None:
        """Held-out loss and some answers, printed and logged; returns the loss, where there is one."""
        if self._held_out is None:
            return None
        return report_held_out(self._held_out, self._config, params, step, self._log, self._console)

    def finish(self, params: PyTree, facts: dict[str, Any]) -> None:
        """Scores of the trained model, unless they are written already."""
        facts = facts | first_sizes(self._train, self._config)
        finish(self._held_out, self._config, params, facts, self._workdir, self._log, self._console)
