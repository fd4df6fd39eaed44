"""Train a model: `python -m deepstack_jax.train --config=configs/demo.py --workdir=runs/demo/deepstack`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from deepstack_jax import cli
from deepstack_jax.batch import Batch
from deepstack_jax.config import Config, to_dict
from deepstack_jax.config_checks import ConfigError
from deepstack_jax.data.conversation import ConversationError, get_template
from deepstack_jax.data.encode import BadExample
from deepstack_jax.data.image import ImageError
from deepstack_jax.data.mixture import Mixture, describe_mixture
from deepstack_jax.data.open import check_images, open_source
from deepstack_jax.data.pipeline import TrainingStream, open_tokenizer
from deepstack_jax.data.sources import Source, SourceError
from deepstack_jax.data.tokenize import Tokenizer
from deepstack_jax.evaluation.runner import Answer, HeldOut, mean_by_kind
from deepstack_jax.inference.generate import greedy
from deepstack_jax.inference.text import end_of_turn
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.mesh import check_batch_fits, make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.training.checkpoint import CheckpointError, Checkpoints, check_same_run
from deepstack_jax.training.metrics import MetricsLog, Quarantine, QuarantineError, read_metrics, versions, write_json
from deepstack_jax.training.optimizer import describe_groups
from deepstack_jax.training.program import Program, build_program, first_state
from deepstack_jax.training.progress import Progress
from deepstack_jax.training.state import find_weights
from deepstack_jax.training.step import StepFn
from deepstack_jax.types import TrainState

USAGE = """
Train a DeepStack model; run the same command again to go on where it stopped.

  python -m deepstack_jax.train --config=configs/demo.py --workdir=runs/demo/deepstack
  python -m deepstack_jax.train --config=configs/receipts.py --config.data.root=DIR --workdir=runs/receipts
  python -m deepstack_jax.train --config=configs/demo.py:baseline --config.train.steps=100 --workdir=runs/short

  --config=FILE[:ARGUMENT]   configuration file; --config.KEY=VALUE overrides any key of it
  --workdir=DIR              checkpoints, metrics.jsonl, tensorboard/, predictions.jsonl and results.json go here

Exit codes: 0 done; 1 a mistake in the input, said in one line; 75 stopped by SIGTERM and 130 by Ctrl-C, state saved.
"""

flags.DEFINE_string("workdir", None, "Folder for everything that the run writes.")
cli.define_config_flag()


@dataclass(frozen=True)
class Run:
    """What the loop needs, put together by `main`."""

    config: Config
    workdir: Path
    steps: int
    program: Program
    stream: TrainingStream
    train_step: StepFn
    held_out: HeldOut | None
    checkpoints: Checkpoints
    metrics: MetricsLog
    quarantine: Quarantine
    console: Console


def main() -> int:
    config = cli.parse_config()
    if not flags.FLAGS["workdir"].value:
        raise ConfigError("--workdir is missing; e.g. --workdir=runs/demo")
    workdir = cli.writable_folder(flags.FLAGS["workdir"].value, "workdir")
    check_same_run(config, workdir)
    console = Console(highlight=False)

    tokenizer, source = open_inputs(config)
    check_images(source, config)
    held_out_source = open_source(config, "validation") if config.data.source == "pages" or config.data.validation else None
    mesh = make_mesh(config.mesh)
    check_batch_fits(config, mesh, jax.process_count())
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    stream = TrainingStream(source, config, process=jax.process_index(), processes=jax.process_count(), devices=shards)
    steps = config.train.steps or stream.steps(config.train.epochs)
    for table in (describe_mixture(source) if isinstance(source, Mixture) else None, stream.describe()):
        if table is not None:
            console.print(table)

    program = build_program(config, mesh, steps)
    console.print(describe_run(program, steps))

    checkpoints = Checkpoints(workdir, config.train.keep)
    restored = checkpoints.restore(program.abstract_state())
    if restored is None:
        state = first_state(program)
    else:
        state, place = restored
        stream.restore(place)
        console.print(f"resumed from step {int(state.step)} in {workdir}")
    write_json(workdir / "config.json", to_dict(config))
    write_json(workdir / "versions.json", versions())

    held_out = None
    if held_out_source is not None:
        decode = make_decode(program.model, config, tokenizer)
        held_out = HeldOut(held_out_source, config, jax.jit(program.loss), decode, partial(put_batch, mesh))
    run = Run(
        config=config,
        workdir=workdir,
        steps=steps,
        program=program,
        stream=stream,
        train_step=program.jit_step(),
        held_out=held_out,
        checkpoints=checkpoints,
        metrics=MetricsLog(workdir, int(state.step)),
        quarantine=Quarantine(workdir, config.data.max_bad_fraction, len(source)),
        console=console,
    )
    with use_mesh(mesh):
        state, code = loop(run, state)
        if code == cli.EXIT_DONE:
            finish(run, state)
    stream.close()
    run.metrics.close()
    checkpoints.close()
    return code


def open_inputs(config: Config) -> tuple[Tokenizer, Source]:
    """The tokenizer and the training data; all that is missing, weights too, is said at once."""
    opened, problems = [], []
    wanted = [partial(open_tokenizer, config), partial(open_source, config, "train")]
    for opener in wanted + ([partial(find_weights, config)] if config.train.weights else []):
        try:
            opened.append(opener())
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return opened[0], opened[1]


def loop(run: Run, state: TrainState) -> tuple[TrainState, int]:
    """Step until done or told to stop; returns the last state and the exit code."""
    stop = cli.StopSignals()
    train, every = run.config.train, run.config.evaluation.every
    first = step = int(state.step)
    before, bad = None, 0
    with Progress(step, run.steps, run.console) as progress:
        while step < run.steps and not stop.received:
            with progress.waiting():
                delivered = next(run.stream)
            before_bad, bad = bad, run.quarantine.add(delivered.bad, (step + 1 - first) * train.batch_size)
            if bad and not before_bad:
                run.console.print(f"step {step + 1}: {one_line_of(delivered.bad[0])}", markup=False, soft_wrap=True)
            state, numbers = run.train_step(state, put_batch(run.program.mesh, delivered.batch))
            # One step ahead of the device and no further: else batches pile up there, and the wait for data looks longer.
            jax.block_until_ready(before)
            before = numbers
            step += 1
            if step % train.log_every == 0 or step == run.steps:
                values = {name: float(value) for name, value in jax.device_get(numbers).items()}
                values |= progress.rates(step, train.batch_size) | {"bad_examples": bad}
                run.metrics.write(step, values)
                progress.show(step, values)
            if every and step % every == 0 and step < run.steps:
                report_held_out(run, state, step)
                progress.forget()
            if step % train.checkpoint_every == 0 and step < run.steps:
                run.checkpoints.save(state, run.stream.state(), to_dict(run.config))
    run.checkpoints.save(state, run.stream.state(), to_dict(run.config))
    run.checkpoints.wait()
    stop.release()
    if bad:
        run.console.print(f"{bad} examples were left out, with reasons in {run.workdir}/quarantine.jsonl", soft_wrap=True)
    if stop.received:
        run.console.print(f"stopped at step {step}, state saved; the same command goes on from here")
    return state, stop.exit_code


def report_held_out(run: Run, state: TrainState, step: int) -> None:
    """Held-out loss and a few answers, to the console and the logs."""
    if run.held_out is None:
        return
    numbers = run.held_out.loss(state.params)
    answers, _ = run.held_out.answers(state.params, 1)
    shown = answers[: run.config.evaluation.samples]
    run.metrics.write(step, numbers)
    run.metrics.text(step, "samples", "\n\n".join(one_line(answer) for answer in shown))
    run.console.print(f"step {step}: validation loss {numbers['validation_loss']:.4f}")
    for answer in shown:
        run.console.print(f"  {one_line(answer)}", markup=False, soft_wrap=True)


def finish(run: Run, state: TrainState) -> None:
    """Evaluate the trained model, unless that is done; write predictions.jsonl and results.json; print the scores."""
    stored = run.workdir / "results.json"
    protocol = asdict(run.config.evaluation)
    known = json.loads(stored.read_text()) if stored.exists() else None
    if known is not None and (known.get("steps"), known.get("evaluation")) == (run.steps, protocol):
        show_results(run, known)
        return
    timed = [record["seconds_per_step"] for record in read_metrics(run.workdir) if "seconds_per_step" in record]
    first = run.stream.peek()
    results: dict[str, Any] = {
        "name": run.config.name,
        "steps": int(state.step),
        "seconds_per_step": float(np.median(timed)) if timed else None,
        "evaluation": protocol,
        "parameters": sum(run.program.sizes.values()),
        "context_length": int(first.tokens.shape[1]),
        "visual_tokens": visual_tokens_used(first),
    }
    if run.held_out is not None:
        results |= run.held_out.loss(state.params)
        answers, bad = run.held_out.answers(state.params, run.config.evaluation.examples)
        results |= mean_by_kind(answers) | {"questions": len(answers), "bad_examples": len(bad)}
        scratch = run.workdir / "predictions.tmp"
        scratch.write_text("".join(json.dumps(answer.as_dict()) + "\n" for answer in answers))
        os.replace(scratch, run.workdir / "predictions.jsonl")
        run.metrics.write(run.steps, {name: value for name, value in results.items() if isinstance(value, float)})
        for answer in answers[: run.config.evaluation.samples]:
            run.console.print(f"  {one_line(answer)}", markup=False, soft_wrap=True)
    write_json(stored, results)
    show_results(run, results)


def show_results(run: Run, results: dict[str, Any]) -> None:
    """The scores as a table."""
    table = Table(title=f"{run.config.name}: {run.workdir}/results.json", show_header=False)
    for name, value in results.items():
        if isinstance(value, dict):
            continue
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    run.console.print(table)


def make_decode(model: DeepStack, config: Config, tokenizer: Tokenizer) -> Any:
    ends = tuple(end_of_turn(get_template(config.data.template), tokenizer)[0])

    def decode(params: Any, batch: Batch) -> jax.Array:
        return greedy(model, params, batch, max_new_tokens=config.evaluation.max_new_tokens, stop_ids=ends)

    return decode


def describe_run(program: Program, steps: int) -> Table:
    """What trains, how, and on what."""
    config, sizes = program.config, program.sizes
    devices = ", ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    title = f"{config.name}: {sum(sizes.values()):,} parameters, {steps} steps of {config.train.batch_size}, mesh {devices}"
    table = Table("group", "optimizer", "lr", "tensors", "parameters", title=title)
    for name, kind, lr, tensors, parameters in describe_groups(config.optimizer, program.groups, sizes):
        table.add_row(name, kind, lr, str(tensors), f"{parameters:,}")
    return table


def visual_tokens_used(batch: Batch) -> int:
    """Most distinct encoded tokens that any row of the batch sees, in the sequence or injected."""
    rows = zip(batch.token_source, batch.stack_source, strict=True)
    return max(np.unique(source[source >= 0]).size for source in (np.concatenate([t, s.ravel()]) for t, s in rows))


def one_line_of(bad: BadExample) -> str:
    return f"an example cannot be used and stays blank (further ones are only counted): {bad.reason}"


def one_line(answer: Answer) -> str:
    mark = "right" if answer.score else "wrong"
    return f"{mark}: {answer.question!r} -> {answer.prediction!r} (expected {answer.reference!r})"


if __name__ == "__main__":
    errors = (SourceError, ImageError, ConversationError, CheckpointError, QuarantineError)
    cli.run(main, errors, USAGE)
