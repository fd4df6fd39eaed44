"""The loop: a batch in, a step, numbers out, until the run is done or told to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.encode import BadExample
from deepstack_jax.data.pipeline import Delivered, TrainingStream
from deepstack_jax.parallel.distributed import is_first_host, part_of_batch, put_batch, sum_over_hosts
from deepstack_jax.training.checkpoint import Checkpoints
from deepstack_jax.training.flops import CHIPS, step_flops
from deepstack_jax.training.journal import Journal
from deepstack_jax.training.metrics import MetricsLog, Quarantine
from deepstack_jax.training.program import Program
from deepstack_jax.training.progress import Progress
from deepstack_jax.training.replay import write_bundle
from deepstack_jax.types import TrainState

Numbers = dict[str, jax.Array]
_SHOWN = ("loss", "token_accuracy", "grad_norm", "lr_factor", "supervised_tokens")


class NotFiniteError(ValueError):
    """Too many steps in a row gave no finite loss or gradient."""


@dataclass(frozen=True)
class Run:
    """What the loop needs.

    Attributes:
      evaluate: (state, step) -> held-out loss, or None where there is no held-out data.
      about: what checkpoints say of the run.
      loss_at: held-out loss by the step that it was measured at.
    """

    config: Config
    workdir: Path
    steps: int
    program: Program
    stream: TrainingStream
    step: Callable[[TrainState, Batch], tuple[TrainState, Numbers]]
    evaluate: Callable[[TrainState, int], float | None]
    checkpoints: Checkpoints
    metrics: MetricsLog
    journal: Journal
    quarantine: Quarantine
    console: Console
    about: dict[str, Any]
    loss_at: dict[int, float] = field(default_factory=dict)


def loop(run: Run, state: TrainState, stop: Callable[[], bool]) -> TrainState:
    """Step until done or told to stop, then save; returns the last state.

    Args:
      stop: asked before every step whether to end; on several hosts all must be told before the same step.

    Raises:
      NotFiniteError: `train.max_bad_steps` steps in a row changed nothing.
      QuarantineError: too many examples cannot be used.
      CheckpointError: the last state could not be saved.
    """
    train, every = run.config.train, run.config.evaluation.every
    first = step = int(state.step)
    records, before = Records(run, first), None
    run.journal.begin_loop(first)
    with Progress(first, run.steps, run.console) as progress, Trace(run) as trace:
        while step < run.steps and not stop():
            with run.journal.spend("data"):
                delivered = next(run.stream)
            records.left_out(step + 1, delivered)
            batch = put_batch(run.program.mesh, delivered.batch)
            trace.before(step + 1)
            state, numbers = run.step(state, batch)
            # One step ahead of the device and no further: else batches pile up there, and the wait for data looks longer.
            jax.block_until_ready(before)
            before = numbers
            step += 1
            trace.after(step, numbers)
            records.add(step, batch.tokens.shape[1], numbers)
            if step % train.log_every == 0 or step == run.steps:
                progress.show(step, records.write())
            if every and step % every == 0 and step < run.steps:
                with run.journal.spend("evaluation"):
                    evaluate(run, state, step)
            if step % train.checkpoint_every == 0 and step < run.steps:
                save(run, state, step)
        if records.waiting:
            progress.show(step, records.write())
    save(run, state, step)
    with run.journal.spend("checkpoint"):
        run.checkpoints.finish(step)
    return state


def evaluate(run: Run, state: TrainState, step: int) -> None:
    loss = run.evaluate(state, step)
    if loss is not None:
        run.loss_at[step] = loss


def save(run: Run, state: TrainState, step: int) -> None:
    with run.journal.spend("checkpoint"):
        run.checkpoints.save(state, run.stream.state(), run.about, run.loss_at.get(step))


class Records:
    """The numbers of the steps since the last log line. They stay on the device until then: no step waits for the host."""

    def __init__(self, run: Run, first: int) -> None:
        self._run, self._first = run, first
        self._numbers: list[tuple[int, Numbers]] = []
        self._lengths: list[int] = []
        self._bad = 0  # examples that this host left out
        self._speaks = part_of_batch(run.program.mesh).speaks  # for those that hold the same rows
        self._devices = run.program.mesh.devices
        kind = self._devices.flat[0].device_kind
        self._peak = CHIPS[kind].flops if kind in CHIPS else None  # unknown of CPUs, which then show no MFU
        self._timed = False  # the first interval holds the compilation: it yields no rate

    @property
    def waiting(self) -> bool:
        """Whether there are steps that no log line tells of."""
        return bool(self._numbers)

    def left_out(self, step: int, delivered: Delivered) -> None:
        """Count what could not be used in the batch of a step; on one host too much of it ends the run at once."""
        run, before = self._run, self._bad
        self._bad = run.quarantine.add(delivered.bad)
        if self._bad and not before:
            run.console.print(f"step {step}: {one_line_of(delivered.bad[0])}", markup=False, soft_wrap=True)
        if delivered.bad and jax.process_count() == 1:
            run.quarantine.check(self._bad, self._seen(step))

    def add(self, step: int, length: int, numbers: Numbers) -> None:
        """Keep the numbers of a step on a batch of `length` positions."""
        self._numbers.append((step, numbers))
        self._lengths.append(length)

    def write(self) -> dict[str, float]:
        """Fetch the numbers, judge them, write a record of the latest and return it."""
        run = self._run
        fetched, lengths = jax.device_get(self._numbers), self._lengths
        self._numbers, self._lengths = [], []
        step, latest = fetched[-1]
        spent = run.journal.flush(step)
        bad = sum_over_hosts({"bad": self._bad if self._speaks else 0})["bad"]
        run.quarantine.check(int(bad), self._seen(step))
        values = {name: float(latest[name]) for name in _SHOWN}
        values["padding"] = float(np.mean([numbers["padding"] for _, numbers in fetched]))
        values |= {"lr": values["lr_factor"] * self._learning_rate(), "bad_examples": bad}
        values |= self._rates([numbers for _, numbers in fetched], lengths, spent) if self._timed else {}
        self._timed = True
        values["bad_steps"] = self._judge(fetched)
        run.metrics.write(step, values)
        return values

    def _rates(self, numbers: list[Numbers], lengths: list[int], spent: dict[str, float]) -> dict[str, float]:
        """Speed over the interval; waiting for data is part of the steps' time, evaluating and saving are not."""
        seconds = sum(spent.get(kind, 0.0) for kind in ("step", "data"))
        config, groups, rows = self._run.config, self._run.program.groups, self._run.stream.rows
        flops = sum(
            step_flops(config, groups, rows, length, squares=float(of_step["segment_squares"])).model
            for length, of_step in zip(lengths, numbers, strict=True)
        )
        per_device = flops / seconds / self._devices.size
        rates = {
            "seconds_per_step": seconds / len(numbers),
            "examples_per_second": len(numbers) * config.train.batch_size / seconds,
            "supervised_tokens_per_second": float(sum(n["supervised_tokens"] for n in numbers)) / seconds,
            "data_wait": spent.get("data", 0.0) / seconds,
            "tflops_per_device": per_device / 1e12,
        }
        return rates if self._peak is None else rates | {"mfu": per_device / self._peak}

    def _judge(self, fetched: list[tuple[int, Numbers]]) -> float:
        """Write a bundle for every step that was skipped, and count them since the run began.

        Raises:
          NotFiniteError: too many in a row.
        """
        run, limit = self._run, self._run.config.train.max_bad_steps
        if not all(numbers["good"] for _, numbers in fetched):
            run.checkpoints.settle()  # so that a bundle names the newest
        for step, numbers in fetched:
            if numbers["good"]:
                continue
            what = f"loss {float(numbers['loss'])}, gradient norm {float(numbers['grad_norm'])}"
            run.console.print(f"step {step}: {what}: skipped, nothing was updated", soft_wrap=True)
            if is_first_host():
                write_bundle(run.workdir, step, run.stream.examples(step - 1), run.checkpoints.latest, numbers)
        step, latest = fetched[-1]
        if latest["bad_in_a_row"] >= limit:
            raise NotFiniteError(
                f"the last {int(latest['bad_in_a_row'])} steps up to {step} gave no finite loss or gradient and changed "
                f"nothing (config.train.max_bad_steps={limit}); look at one with --replay={run.workdir}/replay/step-N.json, "
                f"lower the learning rate in a new --workdir; the newest checkpoint is step {run.checkpoints.latest}"
            )
        return float(latest["bad_steps"])

    def _learning_rate(self) -> float:
        """At the schedule's top, of the group that most parameters belong to."""
        program, sizes = self._run.program, dict[str, int]()
        for path, group in program.groups.items():
            if group in program.config.optimizer.groups:
                sizes[group] = sizes.get(group, 0) + program.sizes[path]
        return program.config.optimizer.groups[max(sizes, key=lambda group: sizes[group])].lr

    def _seen(self, step: int) -> int:
        """Examples that were due since this attempt began."""
        return (step - self._first) * self._run.config.train.batch_size


class Trace(contextlib.AbstractContextManager):
    """A profile of the steps that `profile.steps` names, in `workdir/profile`."""

    def __init__(self, run: Run) -> None:
        asked = run.config.profile.steps
        self._first, self._last = map(int, asked.split(":")) if asked else (0, 0)
        self._folder, self._console, self._running = run.workdir / "profile", run.console, False

    def before(self, step: int) -> None:
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, numbers: Numbers) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(numbers)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        self._console.print(
            f"profile written to {self._folder}; show it with tensorboard --logdir={self._folder}", soft_wrap=True
        )

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()


def one_line_of(bad: BadExample) -> str:
    return f"example {bad.name} cannot be used and stays blank (further ones are only counted): {bad.reason}"
