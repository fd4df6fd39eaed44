"""Train a model: `python -m deepstack_jax.train --config=configs/demo.py --workdir=runs/demo/deepstack`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from deepstack_jax import __version__, cli
from deepstack_jax.batch import Batch, empty_batch
from deepstack_jax.config import Config, differences, to_dict
from deepstack_jax.config_checks import ConfigError
from deepstack_jax.data.conversation import ConversationError, get_template
from deepstack_jax.data.image import ImageError
from deepstack_jax.data.pipeline import TrainingStream, check_images, open_source
from deepstack_jax.data.sources import SourceError
from deepstack_jax.data.tokenize import Tokenizer, load_tokenizer
from deepstack_jax.evaluation.runner import Answer, HeldOut, mean_by_kind
from deepstack_jax.inference.generate import greedy
from deepstack_jax.model.deepstack import DeepStack, build_model
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.mesh import check_batch_fits, make_mesh
from deepstack_jax.parallel.rules import param_shardings, replicated, use_mesh
from deepstack_jax.training.checkpoint import CheckpointError, Checkpoints
from deepstack_jax.training.metrics import MetricsLog, Quarantine, QuarantineError, read_metrics
from deepstack_jax.training.optimizer import assign_groups, describe_groups, flatten, make_optimizer, make_schedule, unflatten
from deepstack_jax.training.progress import Progress
from deepstack_jax.training.step import ModelFns, make_loss, make_train_step
from deepstack_jax.types import TrainState
from deepstack_jax.weights.io import load_official

USAGE = """
Train a DeepStack model; run the same command again to go on where it stopped.

  python -m deepstack_jax.train --config=configs/demo.py --workdir=runs/demo/deepstack
  python -m deepstack_jax.train --config=configs/receipts.py --config.data.root=DIR --workdir=runs/receipts
  python -m deepstack_jax.train --config=configs/demo.py:baseline --config.train.steps=100 --workdir=runs/short

  --config=FILE[:ARGUMENT]   configuration file; --config.KEY=VALUE overrides any key of it
  --workdir=DIR              checkpoints, metrics.jsonl, tensorboard/, predictions.jsonl and results.json go here

Exit codes: 0 done; 1 a mistake in the input, said in one line; 75 stopped by SIGTERM and 130 by Ctrl-C, state saved.
"""

# Keys that may change between the parts of one run: they decide what is shown and kept, not what is computed.
HARMLESS = ("train.log_every", "train.checkpoint_every", "train.keep", "evaluation.", "data.workers", "data.prefetch", "mesh.")

flags.DEFINE_string("workdir", None, "Folder for everything that the run writes.")
cli.define_config_flag()


def main() -> int:
    config = cli.parse_config()
    if not flags.FLAGS["workdir"].value:
        raise ConfigError("--workdir is missing; e.g. --workdir=runs/demo")
    workdir = cli.writable_folder(flags.FLAGS["workdir"].value, "workdir")
    check_same_run(config, workdir)
    console = Console(highlight=False)

    tokenizer = open_tokenizer(config)
    source = open_source(config, "train")
    check_images(source, config)
    held_out_source = open_source(config, "validation") if config.data.source == "pages" or config.data.validation else None
    mesh = make_mesh(config.mesh)
    check_batch_fits(config, mesh, jax.process_count())
    stream = TrainingStream(source, config, process=jax.process_index(), processes=jax.process_count())
    quarantine = Quarantine(workdir, config.data.max_bad_fraction, len(source))
    steps = config.train.steps or max(1, round(config.train.epochs * len(source) / config.train.batch_size))
    schedule = make_schedule(config.optimizer.schedule, steps)

    model = build_model(config)
    sample = empty_batch(config.batch_shape(1, config.data.max_length))
    boxed = jax.eval_shape(model.init, jax.random.key(config.seed), sample)["params"]
    shapes = nn.unbox(boxed)
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flatten(shapes).items()}
    groups = assign_groups(list(sizes), config.optimizer.table)
    optimizer = make_optimizer(config.optimizer, groups, schedule)
    console.print(describe_run(config, groups, sizes, steps, mesh))

    shardings = state_shardings(mesh, param_shardings(mesh, boxed), shapes, groups, optimizer)
    checkpoints = Checkpoints(workdir, config.train.keep)
    abstract = jax.eval_shape(lambda params: new_state(params, groups, optimizer), shapes)
    restored = checkpoints.restore(jax.tree.map(with_sharding, abstract, shardings))
    if restored is None:
        state = first_state(config, model, sample, shapes, groups, optimizer, shardings)
    else:
        state, place = restored
        stream.restore(place)
        console.print(f"resumed from step {int(state.step)} in {workdir}")
    write_json(workdir / "config.json", to_dict(config))
    write_json(workdir / "versions.json", versions())

    functions = ModelFns(
        hidden=lambda params, batch: model.apply({"params": params}, batch).hidden,
        logits=lambda params, hidden: model.apply({"params": params}, hidden, method="logits"),
    )
    step_fn = make_train_step(
        functions, optimizer, groups, schedule, accumulation=config.train.accumulation, chunk=config.train.loss_chunk
    )
    train_step = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    held_out = None
    if held_out_source is not None:
        loss = jax.jit(make_loss(functions, config.train.loss_chunk))
        decode = make_decode(model, config, tokenizer)
        held_out = HeldOut(held_out_source, config, loss, decode, lambda batch: put_batch(mesh, batch))
    metrics = MetricsLog(workdir, int(state.step))
    with use_mesh(mesh):
        state, code = loop(config, mesh, state, stream, train_step, checkpoints, metrics, quarantine, held_out, steps, console)
        if code == cli.EXIT_DONE:
            finish(config, workdir, state, held_out, metrics, stream, sizes, console)
    metrics.close()
    checkpoints.close()
    return code


def loop(config, mesh, state, stream, train_step, checkpoints, metrics, quarantine, held_out, steps, console):
    """Step until done or told to stop; returns the last state and the exit code."""
    stop = StopSignals()
    train, every = config.train, config.evaluation.every
    step = int(state.step)
    with Progress(step, steps, console) as progress:
        while step < steps and not stop.received:
            with progress.waiting():
                delivered = next(stream)
            bad = quarantine.add(delivered.bad, (step + 1) * train.batch_size)
            state, numbers = train_step(state, put_batch(mesh, delivered.batch))
            step += 1
            if step % train.log_every == 0 or step == steps:
                values = {name: float(value) for name, value in jax.device_get(numbers).items()}
                values |= progress.rates(step, train.batch_size) | {"bad_examples": bad}
                metrics.write(step, values)
                progress.show(step, values)
            if held_out is not None and every and step % every == 0 and step < steps:
                report_held_out(config, state, held_out, metrics, step, console)
                progress.forget()
            if step % train.checkpoint_every == 0 and step < steps:
                checkpoints.save(state, stream.state(), to_dict(config))
    checkpoints.save(state, stream.state(), to_dict(config))
    checkpoints.wait()
    if stop.received:
        console.print(f"stopped at step {step}, state saved; the same command goes on from here")
    return state, stop.exit_code


def report_held_out(config, state, held_out, metrics, step, console) -> dict[str, float]:
    """Held-out loss and a few answers, to the console and the logs."""
    numbers = held_out.loss(state.params)
    answers, _ = held_out.answers(state.params, 1)
    metrics.write(step, numbers)
    shown = answers[: config.evaluation.samples]
    metrics.text(step, "samples", "\n\n".join(f"**{a.question}** {a.prediction} (expected: {a.reference})" for a in shown))
    console.print(f"step {step}: validation loss {numbers['validation_loss']:.4f}")
    for answer in shown:
        console.print(f"  {one_line(answer)}", markup=False)
    return numbers


def finish(config, workdir: Path, state, held_out, metrics, stream, sizes, console) -> None:
    """Evaluate the trained model; write predictions.jsonl and results.json; print the scores."""
    timed = [record["seconds_per_step"] for record in read_metrics(workdir) if "seconds_per_step" in record]
    first = stream.peek()
    results: dict[str, Any] = {
        "name": config.name,
        "steps": int(state.step),
        "seconds_per_step": float(np.median(timed)) if timed else None,
        "parameters": sum(sizes.values()),
        "context_length": int(first.tokens.shape[1]),
        "visual_tokens": visual_tokens_used(first),
    }
    if held_out is not None:
        results |= held_out.loss(state.params)
        answers, bad = held_out.answers(state.params, config.evaluation.examples)
        results |= mean_by_kind(answers) | {"questions": len(answers), "bad_examples": len(bad)}
        scratch = workdir / "predictions.tmp"
        scratch.write_text("".join(json.dumps(answer.as_dict()) + "\n" for answer in answers))
        os.replace(scratch, workdir / "predictions.jsonl")
        metrics.write(results["steps"], {name: value for name, value in results.items() if isinstance(value, float)})
        for answer in answers[: config.evaluation.samples]:
            console.print(f"  {one_line(answer)}", markup=False)
    write_json(workdir / "results.json", results)
    table = Table(title=f"{config.name}: {workdir}/results.json", show_header=False)
    for name, value in results.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


class StopSignals:
    """Remembers Ctrl-C or SIGTERM until the step is done; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.exit_code = cli.EXIT_DONE
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    @property
    def received(self) -> bool:
        return self.exit_code != cli.EXIT_DONE

    def _handle(self, number: int, _: Any) -> None:
        self.exit_code = cli.EXIT_INTERRUPTED if number == signal.SIGINT else cli.EXIT_PREEMPTED
        signal.signal(signal.SIGINT, signal.default_int_handler)


def check_same_run(config: Config, workdir: Path) -> None:
    """Refuse to go on in a workdir of another configuration.

    Raises:
      CheckpointError: listing every key that differs and would change what is computed.
    """
    stored = workdir / "config.json"
    if not stored.exists():
        return
    changed = differences(config, json.loads(stored.read_text()))
    fatal = {key: values for key, values in changed.items() if not key.startswith(HARMLESS)}
    if fatal:
        listed = ", ".join(f"{key}: {theirs!r} there, {ours!r} now" for key, (ours, theirs) in fatal.items())
        raise CheckpointError(f"{workdir} holds a run of another configuration ({listed}); choose a new --workdir")


def open_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer, checked against template and decoder before anything is compiled."""
    if not config.data.tokenizer:
        raise ConfigError("config.data.tokenizer is empty: give a folder with tokenizer.model with --config.data.tokenizer=DIR")
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
        get_template(config.data.template)
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.data: {error}") from error
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, config.decoder.vocab_size is {config.decoder.vocab_size}; raise it"
        )
    return tokenizer


def new_state(params: Any, groups: dict[str, str], optimizer: Any) -> TrainState:
    """The state before the first step; only trainable parameters have optimizer state."""
    trainable = {path: leaf for path, leaf in flatten(params).items() if groups[path] != "frozen"}
    return TrainState(step=jax.numpy.zeros((), jax.numpy.int32), params=params, opt_state=optimizer.init(trainable))


def first_state(config: Config, model: DeepStack, sample: Batch, shapes, groups, optimizer, shardings) -> TrainState:
    """Parameters drawn from the seed, or read from `train.weights`, and a fresh optimizer."""
    if not config.train.weights:
        draw = lambda key: new_state(nn.unbox(model.init(key, sample))["params"], groups, optimizer)  # noqa: E731
        return jax.jit(draw, out_shardings=shardings)(jax.random.key(config.seed))
    loaded = load_official(config.train.weights, {path: leaf.shape for path, leaf in flatten(shapes).items()})
    params = jax.device_put(unflatten(loaded), shardings.params)
    return jax.jit(lambda params: new_state(params, groups, optimizer), out_shardings=shardings)(params)


def state_shardings(mesh, params, shapes, groups, optimizer) -> TrainState:
    """Sharding of every leaf of the state; moments lie like their parameters."""
    trainable = {path: sharding for path, sharding in flatten(params).items() if groups[path] != "frozen"}
    sizes = {path: leaf for path, leaf in flatten(shapes).items() if path in trainable}
    whole: Any = replicated(mesh)  # a tree of shardings has the shape of a state, whose leaves are arrays

    def place(path: tuple, leaf: Any) -> Any:
        names = [str(getattr(key, "key", "")) for key in path]
        owner = next((name for name in reversed(names) if name in trainable), None)
        return trainable[owner] if owner and leaf.shape == sizes[owner].shape else whole

    opt_state = jax.eval_shape(optimizer.init, sizes)
    return TrainState(step=whole, params=params, opt_state=jax.tree_util.tree_map_with_path(place, opt_state))


def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def make_decode(model: DeepStack, config: Config, tokenizer: Tokenizer) -> Any:
    def decode(params: Any, batch: Batch) -> jax.Array:
        return greedy(model, params, batch, max_new_tokens=config.evaluation.max_new_tokens, stop_id=tokenizer.eos_id)

    return decode


def describe_run(config: Config, groups: dict[str, str], sizes: dict[str, int], steps: int, mesh: Any) -> Table:
    """What trains, how, and on what."""
    devices = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    title = f"{config.name}: {sum(sizes.values()):,} parameters, {steps} steps of {config.train.batch_size}, mesh {devices}"
    table = Table("group", "optimizer", "lr", "tensors", "parameters", title=title)
    for name, kind, lr, tensors, parameters in describe_groups(config.optimizer, groups, sizes):
        table.add_row(name, kind, lr, str(tensors), f"{parameters:,}")
    return table


def visual_tokens_used(batch: Batch) -> int:
    """Most distinct encoded tokens that any row of the batch sees, in the sequence or injected."""
    rows = zip(batch.token_source, batch.stack_source, strict=True)
    return max(np.unique(source[source >= 0]).size for source in (np.concatenate([t, s.ravel()]) for t, s in rows))


def one_line(answer: Answer) -> str:
    mark = "right" if answer.score else "wrong"
    return f"{mark}: {answer.question!r} -> {answer.prediction!r} (expected {answer.reference!r})"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    return {"deepstack_jax": __version__, **{name: version(name) for name in names}, "devices": str(jax.devices())}


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(scratch, path)


if __name__ == "__main__":
    errors = (SourceError, ImageError, ConversationError, CheckpointError, QuarantineError)
    cli.run(main, errors, USAGE)
