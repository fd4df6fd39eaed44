"""The loop: a batch in, a step, numbers out, until the run is done or told to stop."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.encode.encoder import REMARKS, BadExample
from deepstack_jax.data.example import SourceError
from deepstack_jax.data.pipeline import HostBatch, TrainingStream
from deepstack_jax.errors import UserError
from deepstack_jax.parallel.chips import CHIPS
from deepstack_jax.parallel.distributed import is_first_host, process_slice, put_batch, sum_over_hosts
from deepstack_jax.printing import Console, label
from deepstack_jax.train.account.journal import Journal
from deepstack_jax.train.account.waits import DataWait
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.core.program import Program
from deepstack_jax.train.flops import step_flops
from deepstack_jax.train.run.metrics import MetricsLog, Quarantine, QuarantineError
from deepstack_jax.train.run.progress import Progress, padding_hint
from deepstack_jax.train.run.replay import write_bundle
from deepstack_jax.types import TrainState

Numbers = dict[str, jax.Array]
_SHOWN = ("loss", "token_accuracy", "grad_norm", "lr_factor", "supervised_tokens")


class NotFiniteError(UserError):
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
    """Step until done or told to stop, then save; returns the last state. What ends the run early finds the state saved too.

    Args:
      stop: asked before every step whether to end; on several hosts all must be told before the same step.

    Raises:
      NotFiniteError: `train.max_bad_steps` steps in a row changed nothing.
      QuarantineError: too many examples cannot be used.
      SourceError: the data cannot be read.
      CheckpointError: the last state could not be saved.
    """
    train, every = run.config.train, run.config.evaluation.every
    first = step = int(state.step)
    records, numbers, unused = Records(run, first), None, 0
    run.journal.begin_loop(first)
    with Progress(first, run.steps, run.console) as progress, Trace(run) as trace, DataWait(run.journal) as wait:
        try:
            while step < run.steps and not stop():
                delivered = wait.next(run.stream, numbers)
                unused = 1
                records.left_out(step + 1, delivered)
                batch = put_batch(run.program.mesh, delivered.batch)
                trace.before(step + 1)
                before = numbers
                state, numbers = run.step(state, batch)
                unused = 0
                # One step ahead of the device and no further: else batches pile up there.
                jax.block_until_ready(before)
                step += 1
                trace.after(step, numbers)
                records.add(step, batch.tokens.shape[1], numbers)
                if step % train.log_every == 0 or step == run.steps:
                    progress.show(step, records.write())
                if every and step % every == 0 and step < run.steps:
                    evaluate(run, records, state, step)
                if step % train.checkpoint_every == 0 and step < run.steps:
                    save(run, records, state, step)
            if records.waiting:
                progress.show(step, records.write())
        except (NotFiniteError, QuarantineError, SourceError) as error:
            # All hosts meet the first two alike. What a single one of several meets cannot be saved: that takes them all.
            if step > first and (jax.process_count() == 1 or not isinstance(error, SourceError)):
                save_before_leaving(run, records, state, step, unused)
            raise
    records.say_remarks()
    save(run, records, state, step)
    with run.journal.spend("checkpoint"):
        run.checkpoints.finish(step)
    return state


def evaluate(run: Run, records: Records, state: TrainState, step: int) -> None:
    records.wait()
    with run.journal.spend("evaluation"):
        loss = run.evaluate(state, step)
    if loss is not None:
        run.loss_at[step] = loss


def save(run: Run, records: Records, state: TrainState, step: int, unused: int = 0) -> None:
    """Save; `unused` batches were handed out and not trained on: they come again.

    What is known of the steps until now is judged first: a checkpoint that their replay needs is not to be deleted.
    """
    records.judge()
    with run.journal.spend("checkpoint"):
        run.checkpoints.save(state, run.stream.state(unused), run.about, run.loss_at.get(step))


def save_before_leaving(run: Run, records: Records, state: TrainState, step: int, unused: int) -> None:
    """Save for an error that ends the run: it is about the data or the steps, and the state is good."""
    with contextlib.suppress(NotFiniteError):
        records.judge()
    save(run, records, state, step, unused)
    with run.journal.spend("checkpoint"):
        run.checkpoints.settle()
    if run.checkpoints.latest == step:
        run.console.print(f"state of step {step} saved")


class Records:
    """The numbers of the steps since the last log line. They stay on the device until then: no step waits for the host."""

    def __init__(self, run: Run, first: int) -> None:
        self._run, self._first = run, first
        self._numbers: list[tuple[int, Numbers]] = []  # on the device
        self._fetched: list[tuple[int, Any]] = []
        self._judged = first  # the last step that was
        self._lengths: list[int] = []
        self._bad = 0  # examples that this host left out
        self._remarks: dict[int, tuple[str, ...]] = {}  # by row, in this attempt
        self._remarked: set[str] = set()
        self._is_leader = process_slice(run.program.mesh).is_leader  # for those that hold the same rows
        self._devices = run.program.mesh.devices
        kind = self._devices.flat[0].device_kind
        self._peak = CHIPS[kind].flops if kind in CHIPS else None  # unknown of CPUs, which then show no MFU
        self._timed = False  # the first interval holds the compilation: it yields no rate

    @property
    def waiting(self) -> bool:
        """Whether there are steps that no log line tells of."""
        return bool(self._numbers or self._fetched)

    def wait(self) -> None:
        """Until the devices are through with all steps, so that what comes next is not taken to last longer than it does."""
        jax.block_until_ready(self._numbers)

    def left_out(self, step: int, delivered: HostBatch) -> None:
        """Count what could not be used in the batch of a step; on one host too much of it ends the run at once."""
        run, before = self._run, self._bad
        self._bad = run.quarantine.add(delivered.bad)
        if self._bad and not before:
            run.console.print(f"step {step}: {one_line_of(delivered.bad[0])}", soft_wrap=True)
        if delivered.bad and jax.process_count() == 1:
            run.quarantine.check(self._bad, self._seen(step))
        for row, remarks in delivered.remarks:
            for remark in sorted({*remarks} - self._remarked):
                run.console.print(f"{remark}: row {row} is the first; their number comes at the end", soft_wrap=True)
            self._remarked.update(remarks)
            self._remarks[row] = remarks

    def say_remarks(self) -> None:
        """Say how many images and texts of this attempt were read in a way that not everybody expects. All hosts call it."""
        counts = Counter(chain.from_iterable(self._remarks.values()) if self._is_leader else ())
        for remark, count in sum_over_hosts({remark: counts[remark] for remark in REMARKS}).items():
            if count:
                self._run.console.print(f"{remark}: {count:.0f}", soft_wrap=True)

    def add(self, step: int, length: int, numbers: Numbers) -> None:
        """Keep the numbers of a step on a batch of `length` positions."""
        self._numbers.append((step, numbers))
        self._lengths.append(length)

    def write(self) -> dict[str, float]:
        """Fetch the numbers, judge them, write a record of the latest and return it."""
        run = self._run
        self._fetch()
        step, latest = self._fetched[-1]
        spent = run.journal.flush(step)
        bad = sum_over_hosts({"bad": self._bad if self._is_leader else 0})["bad"]
        run.quarantine.check(int(bad), self._seen(step))
        self.judge()
        numbers, lengths = [numbers for _, numbers in self._fetched], self._lengths
        self._fetched, self._lengths = [], []
        values = {name: float(latest[name]) for name in (*_SHOWN, "bad_steps")}
        values["padding"] = float(np.mean([of_step["padding"] for of_step in numbers]))
        values |= {"lr": values["lr_factor"] * self._learning_rate(), "bad_examples": bad}
        if not (self._first or self._timed) and (
            hint := padding_hint(values["padding"], float(np.mean(lengths)), run.config.data)
        ):
            run.console.print(hint, soft_wrap=True)
        values |= self._rates(numbers, lengths, spent) if self._timed else {}
        self._timed = True
        run.metrics.write(step, values)
        return values

    def judge(self) -> None:
        """Write a bundle for every step since the last time that was skipped.

        Raises:
          NotFiniteError: too many in a row.
        """
        run, limit = self._run, self._run.config.train.max_bad_steps
        self._fetch()
        new = [(step, numbers) for step, numbers in self._fetched if step > self._judged]
        if not new:
            return
        self._judged, latest = new[-1]
        bad = [(step, numbers) for step, numbers in new if not numbers["good"]]
        if bad:
            with run.journal.spend("checkpoint"):
                run.checkpoints.settle()  # so that a bundle names the newest
        for step, numbers in bad:
            what = f"loss {float(numbers['loss'])}, gradient norm {float(numbers['grad_norm'])}"
            run.console.print(f"step {step}: {what}: skipped, nothing was updated", soft_wrap=True)
            if is_first_host():
                start = run.checkpoints.newest_before(step)
                write_bundle(run.workdir, step, run.stream.examples(step - 1), start, numbers)
        if latest["bad_in_a_row"] >= limit:
            raise NotFiniteError(
                f"the last {int(latest['bad_in_a_row'])} steps up to {self._judged} gave no finite loss or gradient and "
                f"changed nothing (config.train.max_bad_steps={limit}); look at one with "
                f"--replay={run.workdir}/replay/step-N.json, lower the learning rate in a new --workdir"
            )

    def _fetch(self) -> None:
        """From the devices, once they are through with all steps."""
        self._fetched += jax.device_get(self._numbers)
        self._numbers = []

    def _rates(self, numbers: list[dict[str, Any]], lengths: list[int], spent: dict[str, float]) -> dict[str, float]:
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
    return f"example {label(bad.name)} cannot be used and stays blank (further ones are only counted): {bad.reason}"
