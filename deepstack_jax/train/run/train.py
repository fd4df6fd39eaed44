"""A training run from its inputs to its scores, or from where it stopped."""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from rich.table import Table

from deepstack_jax.atomic import write_json
from deepstack_jax.config import Config, TrainConfig, to_dict, to_stored
from deepstack_jax.data.example import Source
from deepstack_jax.data.fingerprint import describe_data, describe_texts
from deepstack_jax.data.open import check_images
from deepstack_jax.data.order.lengths import check_examples
from deepstack_jax.data.order.mixture import Mixture, describe_mixture
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.data.workers import free_shared_memory
from deepstack_jax.parallel.distributed import PreemptionSync, is_first_host
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.printing import Console, plural, redacted
from deepstack_jax.stop_signals import EXIT_DONE, EXIT_PREEMPTED, StopSignals
from deepstack_jax.train.account.journal import Journal
from deepstack_jax.train.checkpoint.init_weights import first_state, with_base
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.checkpoint.reading import saved_steps
from deepstack_jax.train.core.optimizer import describe_groups, main_learning_rate
from deepstack_jax.train.core.program import Program, build_program
from deepstack_jax.train.core.state import without
from deepstack_jax.train.flops import step_flops
from deepstack_jax.train.run.loop import loop
from deepstack_jax.train.run.manifest import run_manifest
from deepstack_jax.train.run.metrics import MetricsLog, Quarantine, seconds_per_step, start_wandb
from deepstack_jax.train.run.resume import check_disk_space, check_same_data, check_same_run, new_length
from deepstack_jax.train.run.run import CompiledSteps, Run, open_inputs, open_stream
from deepstack_jax.types import PyTree, TrainState
from deepstack_jax.weights.adapters import adapter_paths
from deepstack_jax.weights.names import NameTable

_ENDINGS = {EXIT_DONE: "done", EXIT_PREEMPTED: "preempted"}  # as journal.jsonl has them


@runtime_checkable
class Evaluation(Protocol):
    """Held-out data of a run, and what is asked of the model about it: `evaluate/in_training.py` in the train verb."""

    @property
    def source(self) -> Source | None:
        """The held-out rows; None where there are none."""

    def open(self, train: Source, *, starts: bool) -> None:
        """Open and check the held-out rows before anything is compiled."""

    def begin(self, program: Program, log: MetricsLog) -> None:
        """Take what answers are made with."""

    def report(self, params: PyTree, step: int) -> float | None:
        """Say how the model does at a step; returns what tells the best checkpoint, where there is such a number."""

    def finish(self, params: PyTree, facts: dict[str, Any]) -> None:
        """Write the scores of the trained model, and `facts`, to results.json."""


def train(config: Config, workdir: Path, console: Console, evaluation: Evaluation) -> int:
    """Train to the end, or until told to stop, in an existing folder that no other run uses; returns the exit code."""
    _print_each("goes on with another", check_same_run(config, workdir), console)
    journal = Journal(workdir if is_first_host() else None)
    starts = not saved_steps(workdir)
    source = open_inputs(config, starts=starts)
    check_images(source, config.data)
    if starts and not config.data.packing.enabled:  # with packing all of them are measured
        check_examples(source, config.data_spec)
    evaluation.open(source, starts=starts)
    splits = {"train": source} | ({} if evaluation.source is None else {"validation": evaluation.source})
    data = describe_data(config.data_spec, splits)
    texts = partial(describe_texts, config.data_spec, source)
    _print_each("goes on with other examples:", check_same_data(config, workdir, data, texts), console)
    mesh = make_mesh(config.mesh)
    stream = open_stream(config, source, mesh)
    steps = steps_of(config.train, stream)
    if change := new_length(config, workdir, steps, partial(steps_of, stream=stream)):
        console.print(change, soft_wrap=True)
    for table in (describe_mixture(source) if isinstance(source, Mixture) else None, stream.describe()):
        if table is not None:
            console.print(table)
    program = build_program(config, mesh, steps)
    console.print(describe_run(program, steps))
    if program.adapted:
        console.print(describe_adapters(program))
    if warning := check_disk_space(workdir, without(program.abstract_state(), program.base), config.train, steps):
        console.print(f"warning: {warning}", soft_wrap=True)
    checkpoints = Checkpoints(workdir, config.train, best=config.evaluation.best, base=program.base)
    state = begin_state(program, stream, checkpoints, console)
    about = write_about(config, workdir, data, journal)
    log = open_log(config, workdir, int(state.step))
    evaluation.begin(program, log)
    run = Run(
        train=config.train,
        data=config.data,
        evaluate_every=config.evaluation.every,
        profile=config.profile.steps,
        workdir=workdir,
        steps=steps,
        mesh=mesh,
        stream=stream,
        step=CompiledSteps(program, journal, console),
        flops=lambda length, squares: step_flops(config, program.groups, stream.rows, length, squares=squares).model,
        learning_rate=main_learning_rate(config.optimizer, program.groups, program.sizes),
        evaluate=evaluation.report,
        checkpoints=checkpoints,
        metrics=log,
        journal=journal,
        quarantine=Quarantine(workdir, config.data.max_bad_fraction, len(source), jax.process_index()),
        console=console,
        about=about,
    )
    return run_to_end(run, state, evaluation, parameters=sum(program.sizes.values()))


def steps_of(train: TrainConfig, stream: TrainingStream) -> int:
    """Steps of a whole run on this data."""
    return train.steps or stream.steps(train.epochs)


def run_to_end(run: Run, state: TrainState, evaluation: Evaluation, parameters: int) -> int:
    """The loop and what follows it; returns the exit code. `parameters` is the model's number of them, for results.json."""
    stop = StopSignals(leave_sigterm=jax.process_count() > 1)
    with ExitStack() as closing:
        # Last comes first, each whatever the others raise.
        for close in (free_shared_memory, run.checkpoints.close, run.metrics.close, run.stream.close):
            closing.callback(close)
        with use_mesh(run.mesh):
            sync = PreemptionSync(lambda: stop.received)
            state = loop(run, state, sync)
            code = exit_code(run, int(state.step), stop, sync)
            if code == EXIT_DONE:
                # From a file that the other hosts may not see.
                seconds = seconds_per_step(run.workdir) if is_first_host() else None
                with run.journal.spend("evaluation"):
                    evaluation.finish(state.params, {"steps": run.steps, "seconds_per_step": seconds, "parameters": parameters})
        run.journal.stop(int(state.step), _ENDINGS.get(code, "interrupted"))
    return code


def exit_code(run: Run, step: int, stop: StopSignals, sync: PreemptionSync) -> int:
    """The exit code of a loop that has saved its state; what follows is computed again by the same command."""
    sync.forward_signal()  # before SIGTERM no longer reaches the service that tells the others
    stop.end_on_sigterm()
    if step == run.steps and not sync.requested_after_last_step():
        return EXIT_DONE
    run.console.print(f"stopped at step {step}, state saved; the same command goes on from here")
    return stop.exit_code or EXIT_PREEMPTED  # another host was told to stop


def begin_state(program: Program, stream: TrainingStream, checkpoints: Checkpoints, console: Console) -> TrainState:
    """The state of the newest checkpoint, with the stream at its place in the data; else that before the first step."""
    restored = checkpoints.restore(program.abstract_state())
    if restored is None:
        return first_state(program)
    state, place = with_base(program, restored[0]), restored[1]
    stream.restore(place)
    console.print(f"resumed from step {int(state.step)} in {checkpoints.workdir}")
    return state


def write_about(config: Config, workdir: Path, data: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """Write config.json, manifest.json and the attempt's line in the journal; returns the manifest, which checkpoints hold."""
    about = redacted({"config": to_stored(config), **run_manifest(data)})
    journal.start({name: about[name] for name in ("command", "git", "devices", "hosts")})
    if is_first_host():
        write_json(workdir / "config.json", about["config"])
        write_json(workdir / "manifest.json", about)
    return about


def open_log(config: Config, workdir: Path, step: int) -> MetricsLog:
    """Where the run's numbers go; on one host only."""
    if not is_first_host():
        return MetricsLog(None, step)
    project = config.train.wandb
    shown = start_wandb(project, workdir, config.name, redacted(to_dict(config))) if project else None
    return MetricsLog(workdir, step, shown)


def describe_run(program: Program, steps: int) -> Table:
    """What trains, how, and on what."""
    config, sizes = program.config, program.sizes
    devices = ", ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    run = f"{plural(steps, 'step')} of {config.train.batch_size}"
    title = f"{config.name}: {sum(sizes.values()):,} parameters, {run}, mesh {devices}"
    table = Table("group", "optimizer", "lr", "tensors", "parameters", title=title)
    for name, kind, lr, tensors, parameters in describe_groups(config.optimizer, program.groups, sizes):
        table.add_row(name, kind, lr, str(tensors), f"{parameters:,}")
    return table


def describe_adapters(program: Program) -> Table:
    """The kernels that have adapters, and how large those are."""
    lora, kernels, table = (
        program.config.lora,
        NameTable(program.config).leaves,
        Table("adapted", "group", "kernels", "parameters"),
    )
    table.title = f"LoRA of rank {lora.rank}, scale {lora.scale:g}, over a base in {lora.base_dtype}"
    for path in program.adapted:
        a, b, _ = adapter_paths(path)
        added = program.sizes[a] + program.sizes[b]
        table.add_row(path, program.groups[a], str(len(kernels[path].pieces)), f"{added:,}")
    return table


def _print_each(what: str, differences: Iterable[str], console: Console) -> None:
    for difference in differences:
        console.print(f"{what} {difference}", soft_wrap=True)
