"""Train a model: `python -m deepstack_jax.train --config=configs/demo.py --workdir=runs/demo/deepstack`."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from rich.table import Table

from deepstack_jax import cli
from deepstack_jax.atomic import write_json
from deepstack_jax.config import Config, build_config, to_dict
from deepstack_jax.data.encode.tokenizer import Tokenizer
from deepstack_jax.data.example import Source
from deepstack_jax.data.fingerprint import describe_data, describe_texts
from deepstack_jax.data.open import check_images, open_source
from deepstack_jax.data.order.mixture import Mixture, describe_mixture
from deepstack_jax.data.pipeline import TrainingStream, open_tokenizer
from deepstack_jax.errors import ConfigError, try_all
from deepstack_jax.evaluate.held_out import HeldOut
from deepstack_jax.evaluate.report import check_held_out, finish, first_sizes, report_held_out, seconds_per_step
from deepstack_jax.parallel.distributed import PreemptionSync, is_first_host, process_slice
from deepstack_jax.parallel.mesh import check_batch_fits, make_mesh
from deepstack_jax.parallel.processes import join_processes
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.printing import REDACTED, Console, plural, redacted
from deepstack_jax.train.account.journal import Journal
from deepstack_jax.train.account.report import report
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.checkpoint.reading import CheckpointError, UnreadableError, read_json, saved_steps
from deepstack_jax.train.core.optimizer import describe_groups
from deepstack_jax.train.core.program import Program, build_program, first_state
from deepstack_jax.train.core.state import find_weights
from deepstack_jax.train.run.compiled import CompiledSteps, compile_first
from deepstack_jax.train.run.lock import alone_in
from deepstack_jax.train.run.loop import Run, loop
from deepstack_jax.train.run.manifest import run_manifest
from deepstack_jax.train.run.metrics import MetricsLog, Quarantine, start_wandb
from deepstack_jax.train.run.replay import ReplayError, read_bundle, replay
from deepstack_jax.train.run.resume import check_room, check_same_data, check_same_run, data_changes
from deepstack_jax.types import TrainState

USAGE = """
Train a DeepStack model; run the same command again to go on where it stopped.

  python -m deepstack_jax.train --config=configs/demo.py --workdir=runs/demo/deepstack
  python -m deepstack_jax.train --config=configs/receipts.py --config.data.root=DIR --workdir=runs/receipts
  python -m deepstack_jax.train --config=configs/demo.py:baseline --config.train.steps=100 --workdir=runs/short
  python -m deepstack_jax.train --report=runs/receipts
  python -m deepstack_jax.train --replay=runs/receipts/replay/step-123.json

  --config=FILE[:ARGUMENT]   configuration file; --config.KEY=VALUE overrides any key of it
  --workdir=DIR              checkpoints, metrics.jsonl, tensorboard/, predictions.jsonl and results.json go here
  --report=WORKDIR           where the time of a run went, and curves as PNG; trains nothing
  --replay=FILE              do a skipped step again, from the checkpoint before it, and say what in it is not finite
  --coordinator_address=HOST:PORT --process_count=N --process_id=I
                             several processes that are not on a TPU pod or under SLURM or Open MPI 4, which need none;
                             under Open MPI 5 and MPICH the address alone

Exit codes: 0 done; 1 a mistake in the input, said in one line; 75 stopped by SIGTERM and 130 by Ctrl-C, state saved.
"""

NEEDS_LESS_MEMORY = (
    "raise config.train.accumulation, set config.decoder.remat=block or config.train.frozen_dtype=bfloat16, lower "
    "config.data.max_length, or cut the model over more devices with config.mesh.fsdp, all but the last in a new --workdir; "
    "python -m deepstack_jax.plan tells what a configuration needs"
)

flags.DEFINE_string("workdir", None, "Folder for everything that the run writes.")
flags.DEFINE_string("report", None, "Print where the time of the run in this workdir went, and draw its curves.")
flags.DEFINE_string("replay", None, "A file of WORKDIR/replay/: do that step again.")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where the processes of a run cannot find each other.")
flags.DEFINE_integer("process_count", None, "How many processes there are; 1 = this one alone.")
flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
cli.define_config_flag()


def main() -> int:
    asked = {name: flags.FLAGS[name].value for name in ("workdir", "report", "replay")}
    if asked["report"]:
        report(Path(asked["report"]), Console())
        return cli.EXIT_DONE
    join_processes(*(flags.FLAGS[name].value for name in ("coordinator_address", "process_count", "process_id")))
    console = Console(quiet=not is_first_host())
    if asked["replay"]:
        given = None if flags.FLAGS["config"].value is None else cli.parse_config()
        return replay_step(Path(asked["replay"]), given, console)
    config = cli.parse_config()
    if not asked["workdir"]:
        raise ConfigError("--workdir is missing; e.g. --workdir=runs/demo")
    workdir = cli.writable_folder(asked["workdir"], "workdir")
    with alone_in(workdir):
        return train(config, workdir, console)


def train(config: Config, workdir: Path, console: Console) -> int:
    """A run from its inputs to its scores, or on from where it stopped; returns the exit code."""
    for difference in check_same_run(config, workdir):
        console.print(f"goes on with another {difference}", soft_wrap=True)
    journal = Journal(workdir if is_first_host() else None)

    starts = not saved_steps(workdir)
    _, source = open_inputs(config, starts=starts)
    check_images(source, config)
    held_out_source = open_source(config, "validation") if config.data.source == "pages" or config.data.validation else None
    left_out = set() if held_out_source is None else check_held_out(held_out_source, source, config, console, starts=starts)
    data = describe_data(config, {"train": source} | ({} if held_out_source is None else {"validation": held_out_source}))
    for difference in check_same_data(config, workdir, data, partial(describe_texts, config, source)):
        console.print(f"goes on with other examples: {difference}", soft_wrap=True)
    mesh = make_mesh(config.mesh)
    stream = open_stream(config, source, mesh)
    steps = config.train.steps or stream.steps(config.train.epochs)
    for table in (describe_mixture(source) if isinstance(source, Mixture) else None, stream.describe()):
        if table is not None:
            console.print(table)

    program = build_program(config, mesh, steps)
    console.print(describe_run(program, steps))
    if warning := check_room(workdir, program.abstract_state(), config.train, steps):
        console.print(f"warning: {warning}", soft_wrap=True)

    checkpoints = Checkpoints(workdir, config.train)
    restored = checkpoints.restore(program.abstract_state())
    if restored is None:
        state = first_state(program)
    else:
        state, place = restored
        stream.restore(place)
        console.print(f"resumed from step {int(state.step)} in {workdir}")
    about = redacted({"config": to_dict(config), **run_manifest(data)})
    journal.start({name: about[name] for name in ("command", "git", "devices", "hosts")})
    if is_first_host():
        write_json(workdir / "config.json", about["config"])
        write_json(workdir / "manifest.json", about)

    held_out = None
    if held_out_source is not None:
        held_out = HeldOut(held_out_source, config, program.loss, program.model, mesh)
        held_out.named |= left_out
    log = open_log(config, workdir, int(state.step))

    def evaluate(state: TrainState, step: int) -> float | None:
        return None if held_out is None else report_held_out(held_out, config, state.params, step, log, console)

    run = Run(
        config=config,
        workdir=workdir,
        steps=steps,
        program=program,
        stream=stream,
        step=compile_first(CompiledSteps(program), journal, console),
        evaluate=evaluate,
        checkpoints=checkpoints,
        metrics=log,
        journal=journal,
        quarantine=Quarantine(workdir, config.data.max_bad_fraction, len(source), jax.process_index()),
        console=console,
        about=about,
    )
    stop = cli.StopSignals(leave_sigterm=jax.process_count() > 1)
    try:
        with use_mesh(mesh):
            told = PreemptionSync(lambda: stop.received)
            state = loop(run, state, told)
            code = end(run, int(state.step), stop, told)
            if code == cli.EXIT_DONE:
                with journal.spend("evaluation"):
                    finish(held_out, config, state.params, facts(run, source), workdir, log, console)
        journal.stop(int(state.step), {cli.EXIT_DONE: "done", cli.EXIT_PREEMPTED: "preempted"}.get(code, "interrupted"))
    finally:
        # Last comes first, each whatever the others raise. jax lets go of host arrays that it was lent when Python collects
        # garbage: the last batch, in memory shared with the workers, would outlive the run.
        with ExitStack() as closing:
            for close in (gc.collect, checkpoints.close, log.close, stream.close):
                closing.callback(close)
    return code


def open_inputs(config: Config, *, starts: bool) -> tuple[Tokenizer, Source]:
    """The tokenizer and the training data; all that is missing is said at once, weights too where the run starts from them."""
    weights = [partial(find_weights, config)] if starts and config.train.weights else []
    tokenizer, source, *_ = try_all(partial(open_tokenizer, config), partial(open_source, config, "train"), *weights)
    return tokenizer, source


def open_stream(config: Config, source: Source, mesh: Mesh) -> TrainingStream:
    """This host's part of every batch."""
    check_batch_fits(config, mesh)
    part, shards = process_slice(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    return TrainingStream(source, config, process=part.index, processes=part.count, devices=shards)


def open_log(config: Config, workdir: Path, step: int) -> MetricsLog:
    """Where the run's numbers go; on one host only."""
    if not is_first_host():
        return MetricsLog(None, step)
    project = config.train.wandb
    shown = start_wandb(project, workdir, config.name, redacted(to_dict(config))) if project else None
    return MetricsLog(workdir, step, shown)


def end(run: Run, step: int, stop: cli.StopSignals, told: PreemptionSync) -> int:
    """The exit code of a loop that has saved its state; what follows is computed again by the same command."""
    told.hand_on()  # before SIGTERM no longer reaches the service that tells the others
    stop.end_on_sigterm()
    if step == run.steps and not told.after_all():
        return cli.EXIT_DONE
    run.console.print(f"stopped at step {step}, state saved; the same command goes on from here")
    return stop.exit_code or cli.EXIT_PREEMPTED  # another host was told to stop


def facts(run: Run, source: Source) -> dict[str, Any]:
    """What results.json says besides scores."""
    return {
        "steps": run.steps,
        "seconds_per_step": seconds_per_step(run.workdir)
        if is_first_host()
        else None,  # from a file that the others may not see
        "parameters": sum(run.program.sizes.values()),
        **first_sizes(source, run.config),
    }


def replay_step(file: Path, given: Config | None, console: Console) -> int:
    """Build the run that a bundle lies in, by the configuration there or the same one given again, and do its step again."""
    workdir = file.absolute().parents[1]
    try:
        config = build_config(read_json(workdir / "config.json"))
    except UnreadableError:
        raise
    except CheckpointError as error:
        raise ReplayError(f"{workdir} holds no run: {error}; name a file WORKDIR/replay/step-N.json") from error
    if given is not None:
        check_same_run(given, workdir)
        config = given
    elif REDACTED in str(config):
        raise ReplayError(f"{workdir}/config.json holds no credentials; give --config as the run was given it, URLs and all")
    _, source = open_inputs(config, starts=not read_bundle(file).checkpoint)
    mesh = make_mesh(config.mesh)
    stream = open_stream(config, source, mesh)
    program = build_program(config, mesh, config.train.steps or stream.steps(config.train.epochs))
    data = describe_data(config, {"train": source})
    for difference in data_changes(config, workdir, data, partial(describe_texts, config, source)):
        console.print(f"warning: the step may be another one: {difference}", soft_wrap=True)
    with use_mesh(mesh):
        replay(file, program, stream, Checkpoints(workdir, config.train, read_only=True), console)
    stream.close()
    return cli.EXIT_DONE


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


if __name__ == "__main__":
    cli.run(main, USAGE, NEEDS_LESS_MEMORY)
