"""The held-out data of a training run: checked before it begins, asked about now and then, scored at its end."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deepstack_jax.atomic import write_json, write_lines
from deepstack_jax.config import Config, EvaluationConfig
from deepstack_jax.data.encode.encoder import Encoder, try_record
from deepstack_jax.data.encode.sizes import encoded_tokens, measure
from deepstack_jax.data.example import BadExample, Source, SourceError
from deepstack_jax.data.open import check_images, open_source
from deepstack_jax.data.order.mixture import epoch_order
from deepstack_jax.data.overlap import find_overlap, overlap_line
from deepstack_jax.evaluate.held_out import HeldOut
from deepstack_jax.evaluate.pictures import thumbnails
from deepstack_jax.evaluate.questions import check_rows, uninterrupted
from deepstack_jax.evaluate.results import data_name, flat_scores, protocol_of, summarise, table_of
from deepstack_jax.evaluate.tasks import Prediction
from deepstack_jax.evaluate.training_tasks import TrainingTasks, scores_of
from deepstack_jax.parallel.distributed import broadcast_str, is_first_host
from deepstack_jax.printing import Console, label, plural
from deepstack_jax.train.core.program import Program
from deepstack_jax.train.run.metrics import MetricsLog
from deepstack_jax.types import PyTree

THUMBNAIL = 448  # longest side, in pixels, of a picture in the log


class TrainingEvaluation:
    """What `train` asks of an evaluator (`train/run/train.py` says what), by `data.validation` and the section `evaluation`."""

    source: Source | None = None  # the held-out rows; None without any
    held_out: HeldOut | None = None  # what answers; None without any, and before `begin`
    train: Source
    log: MetricsLog

    def __init__(self, config: Config, workdir: Path, console: Console) -> None:
        self._config, self._workdir, self._console = config, workdir, console
        self._tasks = TrainingTasks(config, workdir, console)
        self.named: set[int] = set()  # rows that were left out and are known to be: each is told once

    def open(self, train: Source, *, starts: bool) -> None:
        """Open and check the held-out rows, before anything is compiled; raises as `check`."""
        self.train = train
        if self._config.data.generated or self._config.data.validation:
            self.source = open_source(self._config.data, "validation")
            self.check(self.source, starts=starts)
        self._tasks.open(train, starts=starts)

    def begin(self, program: Program, log: MetricsLog) -> None:
        """Take what answers are made with, and where numbers go."""
        self.log = log
        self._tasks.begin(program)
        if self.source is not None:
            self.held_out = HeldOut(self.source, self._config, program.loss, program.model, program.mesh)

    def check(self, source: Source, *, starts: bool) -> None:
        """Look through the held-out rows, and name those that cannot be used.

        Args:
          starts: False where a run goes on, whose steps are not to be lost for its held-out data: what is wrong is only told.

        Raises:
          SourceError: more than `data.max_bad_fraction`: loss and scores would be of another set.
          OverlongError: one is too long, and the configuration says to stop then.
        """
        config, console, rows = self._config, self._console, min(self._config.evaluation.examples, len(source))
        if starts:
            check_images(source, config.data, config.evaluation.examples)
        with console.status(f"looking through {plural(rows, 'held-out row')}"):
            bad = check_rows(source, config if starts else uninterrupted(config))
        self._name(bad)
        if problem := self._too_many(len(bad), rows):
            if starts:
                raise SourceError(f"{problem}, the last one: {bad[-1].reason}; fix them, or allow more")
            console.print(f"warning: {problem}; loss and scores will be of the others", soft_wrap=True)
        if starts and is_first_host():
            with console.status(f"looking for them among {plural(len(self.train), 'training row')}"):
                overlap = overlap_line(find_overlap(source, rows, self.train), rows, len(self.train))
            if overlap:
                console.print(f"warning: {overlap}", soft_wrap=True)

    def report(self, params: PyTree, step: int) -> float | None:
        """Held-out loss, a few answers and the scores of tasks, to the console and the logs.

        Returns:
          The loss, or the score `evaluation.best`; None where there is none, or none that can be compared with others, as
          where too many rows were left out.
        """
        loss, scores = self._report_rows(params, step), self._tasks.report(params, step)
        if scores:
            self.log.write(step, scores)
        return scores.get(self._config.evaluation.best) if self._config.evaluation.best else loss

    def _report_rows(self, params: PyTree, step: int) -> float | None:
        if self.held_out is None:
            return None
        numbers, bad = self.held_out.loss(params)
        left_out = self._left_out(bad)
        predictions, _ = self.held_out.predictions(params, 1)
        shown = predictions[: self._config.evaluation.samples]
        self.log.write(step, {**numbers, "validation_bad_examples": len(left_out)})
        if shown:
            pictures = thumbnails(self.held_out.task.source, shown[0].row, self._config.data, THUMBNAIL, 1)
            picture = np.asarray(pictures[0]) if pictures else None
            self.log.sample(step, "samples", "\n\n".join(map(sample_line, shown)), picture)
        self._console.print(f"step {step}: {loss_line(numbers, self.held_out.rows)}")
        self._print(shown)
        loss = numbers.get("validation_loss", math.nan)
        return loss if math.isfinite(loss) and not self._too_many(len(left_out), self.held_out.rows) else None

    def finish(self, params: PyTree, facts: dict[str, Any]) -> None:
        """Evaluate the trained model, unless that is done; write predictions.jsonl and results.json; print the scores.

        All hosts take part, the first one writes: with the scores `facts`, "steps" among them.
        """
        file, evaluation = self._workdir / "results.json", asdict(self._config.evaluation)
        known = self._stored(file) if is_first_host() else {}
        settings = asdict(EvaluationConfig()) | known.get("evaluation", {})  # of an earlier version, which had fewer
        done = "steps" in known and (known["steps"], settings) == (facts["steps"], evaluation)
        if self.held_out is not None and ("scores" not in known or self._too_many(known["bad_examples"], known["rows"])):
            done = False  # written by an earlier version, or rows may be fixed by now
        if broadcast_str("done" if done else ""):
            self._console.print(table_of(known))
            return
        facts = facts | first_sizes(self.train, self._config)
        results = {"name": self._config.name, **facts, "evaluation": evaluation}
        predictions = None
        if self.held_out is not None:
            predictions, scores = self._score(self.held_out, params)
            results |= scores
        tasks = self._tasks.finish(params)
        results |= {"tasks": tasks} if tasks else {}
        if not is_first_host():
            return
        if predictions is not None:
            write_lines(self._workdir / "predictions.jsonl", map(asdict, predictions))
            numbers = {name: value for name, value in results.items() if isinstance(value, float)}
            self.log.write(facts["steps"], numbers | flat_scores(results))
            self._print(predictions[: self._config.evaluation.samples])
        if tasks:
            self.log.write(facts["steps"], scores_of(tasks))
        write_json(file, results)
        self._console.print(table_of(results))

    def _score(self, held_out: HeldOut, params: PyTree) -> tuple[list[Prediction], dict[str, Any]]:
        """All answers, and loss and scores as results.json has them."""
        config = self._config
        numbers, bad = held_out.loss(params)
        self._left_out(bad)
        if not numbers:
            self._console.print(loss_line(numbers, held_out.rows))
        predictions, unasked = held_out.predictions(params, config.evaluation.examples)
        left_out = self._left_out([*bad, *unasked])
        protocol = protocol_of(config, held_out.options, config.data.template, held_out.task)
        scores = summarise(held_out.task, data_name(config), held_out.rows, predictions, left_out, protocol)
        return predictions, numbers | scores

    def _left_out(self, bad: Iterable[BadExample]) -> list[BadExample]:
        """Rows that could not be used, each with the first reason; told when first met, with a warning if they are many.

        By now they are not a reason to end a run: `check` has looked at all of them before it began.
        """
        assert self.held_out is not None, "who left them out"
        reasons: dict[int, BadExample] = {}
        for example in bad:
            reasons.setdefault(example.index, example)
        if self._name(reasons.values()) and (problem := self._too_many(len(reasons), self.held_out.rows)):
            others = "loss and scores are of the others; once they are fixed, the same command evaluates again"
            self._console.print(f"warning: {problem}; {others}", soft_wrap=True)
        return list(reasons.values())

    def _name(self, bad: Iterable[BadExample]) -> bool:
        """Print those that are not named yet; returns whether there were any."""
        new = [one for one in bad if one.index not in self.named]
        for one in new:
            self._console.print(f"held-out row {one.index} ({label(one.name)}) is left out: {one.reason}", soft_wrap=True)
        self.named.update(one.index for one in new)
        return bool(new)

    def _too_many(self, bad: int, rows: int) -> str:
        limit = self._config.data.max_bad_fraction
        if bad <= limit * rows:
            return ""
        return f"{bad} of {rows} held-out rows cannot be used, more than config.data.max_bad_fraction={limit}"

    def _stored(self, file: Path) -> dict[str, Any]:
        """What an earlier attempt wrote; nothing where that is damaged, which is told."""
        if not file.exists():
            return {}
        with suppress(ValueError):
            if isinstance(known := json.loads(file.read_text()), dict):
                return known
        self._console.print(f"{file} is damaged and is written again", soft_wrap=True)
        return {}

    def _print(self, predictions: Iterable[Prediction]) -> None:
        for one in predictions:
            self._console.print(f"  {sample_line(one)}", soft_wrap=True)


def loss_line(numbers: dict[str, float], rows: int) -> str:
    """The loss, or why there is none."""
    if not numbers:
        return f"no validation loss: none of the {rows} held-out rows has a supervised token that can be used"
    return f"validation loss {numbers['validation_loss']:.4f}"


def sample_line(prediction: Prediction) -> str:
    """A question, its answer and whether that is right."""
    mark = "right" if prediction.scores["exact_match"] else "wrong"
    expected = " or ".join(map(repr, prediction.references))
    return f"{mark}: {prediction.question!r} -> {prediction.prediction!r} (expected {expected})"


def first_sizes(source: Source, config: Config) -> dict[str, int]:
    """Of the examples that training begins with: positions of a row that holds one, and the most that one of them sees.

    "visual_tokens" counts distinct encoded tokens, in the sequence or injected: those of an example, however many share a row.
    """
    spec = uninterrupted(config).data_spec
    order, encoder = epoch_order(source, config.data.seed, config.data.shuffle), Encoder(spec)
    rows = order(0, np.arange(min(config.train.batch_size, len(order)))).tolist()
    found = [
        try_record(source, row, lambda one: (measure(one, encoder).tokens, encoded_tokens(one, spec)), lost=True)
        for row in rows
    ]
    usable = [sizes for sizes in found if not isinstance(sizes, BadExample)]
    longest, visual = (max(sizes, default=0) for sizes in zip(*usable, strict=True)) if usable else (0, 0)
    return {"context_length": spec.padded_length(longest), "visual_tokens": visual}
