"""The loop: a batch in, a step, numbers out, until the run is done or told to stop."""

import contextlib
from collections.abc import Callable, Mapping

import jax

from deepstack_jax.data.example import SourceError
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.progress import Progress
from deepstack_jax.train.account.journal import DataWait
from deepstack_jax.train.run.metrics import QuarantineError
from deepstack_jax.train.run.run import Run
from deepstack_jax.train.run.step_log import NotFiniteError, Numbers, StepLog, log_line
from deepstack_jax.types import TrainState


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
    train, every = run.train, run.evaluate_every
    first = step = int(state.step)
    log, numbers, unused = StepLog(run, first), None, 0
    run.journal.begin_loop(first)
    progress = Progress("step", run.steps, run.console, first=first, text="compiling")
    with progress, Trace(run) as trace, DataWait(run.journal) as wait:
        try:
            while step < run.steps and not stop():
                delivered = wait.next(run.stream, numbers)
                unused = 1
                log.left_out(step + 1, delivered)
                batch = put_batch(run.mesh, delivered.batch)
                trace.before(step + 1)
                before = numbers
                state, numbers = run.step(state, batch)
                unused = 0
                # One step ahead of the device and no further: else batches pile up there.
                jax.block_until_ready(before)
                step += 1
                trace.after(step, numbers)
                log.add(step, batch.tokens.shape[1], numbers)
                if step % train.log_every == 0 or step == run.steps:
                    show_progress(progress, step, log.write())
                if every and step % every == 0 and step < run.steps:
                    evaluate(run, log, state, step)
                if step % train.checkpoint_every == 0 and step < run.steps:
                    save(run, log, state, step)
            if log.waiting:
                show_progress(progress, step, log.write())
        except (NotFiniteError, QuarantineError, SourceError) as error:
            # All hosts meet the first two alike. What a single one of several meets cannot be saved: that takes them all.
            if step > first and (jax.process_count() == 1 or not isinstance(error, SourceError)):
                save_before_leaving(run, log, state, step, unused)
            raise
    log.say_remarks()
    save(run, log, state, step)
    with run.journal.spend("checkpoint"):
        run.checkpoints.finish(step)
    return state


def show_progress(progress: Progress, step: int, values: Mapping[str, float]) -> None:
    progress.show(step, log_line(values), values.get("seconds_per_step"))


def evaluate(run: Run, log: StepLog, state: TrainState, step: int) -> None:
    log.wait()
    with run.journal.spend("evaluation"):
        number = run.evaluate(state.params, step)
    if number is not None:
        run.judged[step] = number


def save(run: Run, log: StepLog, state: TrainState, step: int, unused: int = 0) -> None:
    """Save; `unused` batches were handed out and not trained on: they come again.

    What is known of the steps until now is judged first: a checkpoint that their replay needs is not to be deleted.
    """
    log.judge()
    with run.journal.spend("checkpoint"):
        run.checkpoints.save(state, run.stream.state(unused), run.about, run.judged.get(step))


def save_before_leaving(run: Run, log: StepLog, state: TrainState, step: int, unused: int) -> None:
    """Save for an error that ends the run: it is about the data or the steps, and the state is good."""
    with contextlib.suppress(NotFiniteError):
        log.judge()
    save(run, log, state, step, unused)
    with run.journal.spend("checkpoint"):
        run.checkpoints.settle()
    if run.checkpoints.latest == step:
        run.console.print(f"state of step {step} saved")


class Trace(contextlib.AbstractContextManager):
    """A profile of the steps that `profile.steps` names, in `workdir/profile`."""

    def __init__(self, run: Run) -> None:
        self._first, self._last = map(int, run.profile.split(":")) if run.profile else (0, 0)
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
