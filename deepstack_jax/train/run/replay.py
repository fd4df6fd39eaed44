"""A step that gave no finite number, kept so that it can be done again: what was in it, and where to start from."""

import json
import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepstack_jax.atomic import write_json
from deepstack_jax.batch import Batch
from deepstack_jax.config import Config, from_stored
from deepstack_jax.data.fingerprint import describe_data, describe_texts
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.errors import UserError
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.printing import REDACTED, Console, some
from deepstack_jax.train.checkpoint.init_weights import first_state, with_base
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.checkpoint.reading import CheckpointError, UnreadableError, read_workdir_json
from deepstack_jax.train.core.optimizer import flatten, split, unflatten
from deepstack_jax.train.core.program import Program, build_program
from deepstack_jax.train.core.step import token_loss
from deepstack_jax.train.run.resume import check_same_run, data_changes
from deepstack_jax.train.run.run import open_inputs, open_stream
from deepstack_jax.types import PyTree, TrainState

log = logging.getLogger(__name__)

# Each bundle keeps a checkpoint from being deleted; a run that has gone bad would keep them all.
MOST_BUNDLES = 8


class ReplayError(UserError):
    """A bundle that cannot be replayed."""


class Bundle(NamedTuple):
    """What is known of a bad step."""

    step: int  # the first step of a run is 1
    examples: list[int]  # records of the source, of all hosts
    checkpoint: int  # the newest before it; 0 = the run's beginning
    loss: float
    grad_norm: float


def write_bundle(workdir: Path, step: int, examples: list[int], checkpoint: int, numbers: Mapping[str, Any]) -> None:
    """Write `workdir/replay/step-<step>.json`, unless there are enough of them; where that fails, a warning says so."""
    folder = workdir / "replay"
    file = folder / f"step-{step}.json"
    bundle = Bundle(step, examples, checkpoint, float(numbers["loss"]), float(numbers["grad_norm"]))
    try:
        folder.mkdir(exist_ok=True)
        if not file.exists() and len(list(folder.glob("*.json"))) < MOST_BUNDLES:
            write_json(file, bundle._asdict())
    except OSError as error:  # a full disk must not end a run that can still save
        log.warning("cannot write to %s: %s; this step cannot be replayed", file, error.strerror)


def read_bundle(file: Path) -> Bundle:
    """The bundle in a file.

    Raises:
      ReplayError: there is none.
    """
    try:
        bundle = Bundle(**json.loads(file.read_text()))
        numbers = (bundle.step, bundle.checkpoint, *bundle.examples)
        if not all(isinstance(number, int) for number in numbers) or not bundle.checkpoint >= 0 or bundle.step < 1:
            raise ValueError("step, checkpoint and examples are whole numbers")
        return bundle._replace(loss=float(bundle.loss), grad_norm=float(bundle.grad_norm))
    except (OSError, TypeError, ValueError) as error:
        there = ", ".join(path.name for path in sorted(file.parent.glob("step-*.json"))) or "none"
        raise ReplayError(f"--replay={file} is not a replay bundle ({error}); bundles in {file.parent}: {there}") from error


class Findings(NamedTuple):
    """What is not finite in a step."""

    losses: list[float]  # mean loss of every row of the batch; a row is one example, or a pack of several
    gradients: list[str]  # names of the trainable parameters whose gradient is not finite
    parameters: list[str]  # names of the parameters that are not finite themselves
    trainable: int  # number of trainable parameters


def examine(program: Program, state: TrainState, batch: Batch) -> Findings:
    """Look into one step: which rows and which parameters carry the trouble."""
    trainable, frozen = split(state.params, program.groups)

    def gradients(trainable: PyTree, frozen: PyTree, batch: Batch) -> PyTree:
        return jax.grad(lambda trainable: program.loss(unflatten({**frozen, **trainable}), batch).loss)(trainable)

    losses = jax.device_get(jax.jit(partial(_row_losses, program))(state.params, batch))
    bad = _bad_names(jax.jit(lambda *parts: _any_bad(gradients(*parts)))(trainable, frozen, batch))
    return Findings(losses.tolist(), bad, _bad_names(jax.jit(_any_bad)(flatten(state.params))), len(trainable))


def _row_losses(program: Program, params: PyTree, batch: Batch) -> Float[Array, " B"]:
    def one(hidden: Array, targets: Array, weights: Array) -> Array:
        rows = hidden[None], targets[None], weights[None]
        sums = token_loss(program.functions.logits, program.functions.head(params), *rows, program.config.train.loss_chunk)
        return sums.loss / jnp.maximum(sums.weight, 1.0)

    return jax.vmap(one)(program.functions.hidden(params, batch), batch.targets, batch.loss_weights)


def _any_bad(arrays: PyTree) -> PyTree:
    return jax.tree.map(lambda array: ~jnp.isfinite(array).all(), arrays)


def _bad_names(bad: dict[str, Array]) -> list[str]:
    return [name for name, is_bad in jax.device_get(bad).items() if is_bad]


def replay_file(file: Path, given: Config | None, console: Console) -> None:
    """Build the run that a bundle lies in, by the configuration there or the same one given again, and do its step again.

    Raises:
      ReplayError: no run, or no bundle of it, is there.
      CheckpointError: the checkpoint that the bundle names cannot be read, or `given` is of another run.
    """
    workdir = file.absolute().parents[1]
    try:
        config = from_stored(read_workdir_json(workdir / "config.json"))
    except UnreadableError:
        raise
    except CheckpointError as error:
        raise ReplayError(f"{workdir} holds no run: {error}; name a file WORKDIR/replay/step-N.json") from error
    if given is not None:
        check_same_run(given, workdir)
        config = given
    elif REDACTED in str(config):
        raise ReplayError(f"{workdir}/config.json holds no credentials; give --config as the run was given it, URLs and all")
    source = open_inputs(config, starts=not read_bundle(file).checkpoint)
    mesh = make_mesh(config.mesh)
    stream = open_stream(config, source, mesh)
    program = build_program(config, mesh, config.train.steps or stream.steps(config.train.epochs))
    data = describe_data(config.data_spec, {"train": source})
    for difference in data_changes(config, workdir, data, partial(describe_texts, config.data_spec, source)):
        console.print(f"warning: the step may be another one: {difference}", soft_wrap=True)
    with use_mesh(mesh):
        replay(file, program, stream, Checkpoints(workdir, config.train, base=program.base, read_only=True), console)
    stream.close()


def replay(file: Path, program: Program, stream: TrainingStream, checkpoints: Checkpoints, console: Console) -> Findings:
    """Walk from the checkpoint that a bundle names to its step, and look into that step; writes nothing.

    Raises:
      ReplayError: there is no such bundle, or it names a checkpoint from which its step cannot be reached.
      CheckpointError: its checkpoint cannot be read.
    """
    bundle = read_bundle(file)
    if bundle.checkpoint:
        restored = checkpoints.restore(program.abstract_state(), bundle.checkpoint)
        if restored is None:
            raise ReplayError("the checkpoint that the bundle starts from is gone; the run cannot be walked to that step")
        state, place = with_base(program, restored[0]), restored[1]
        stream.restore(place)
    else:
        state = first_state(program)
    if int(state.step) >= bundle.step:
        raise ReplayError(
            f"{file} names the checkpoint of step {int(state.step)}, which is not before step {bundle.step}: from there that "
            'step cannot be walked to; write an earlier one of WORKDIR/checkpoints into "checkpoint", or 0 for the beginning'
        )
    console.print(f"step {bundle.step} of {file}, walked to from step {int(state.step)}", soft_wrap=True)
    step = program.jit_step()
    for number in range(int(state.step) + 1, bundle.step):
        state, numbers = step(state, put_batch(program.mesh, next(stream).batch))
        console.print(f"step {number}: loss {float(numbers['loss']):.6f}")
    delivered = next(stream)
    batch = put_batch(program.mesh, delivered.batch)
    findings = examine(program, state, batch)
    _, numbers = step(state, batch)
    console.print(describe_findings(bundle, findings, delivered.batch, numbers), soft_wrap=True)
    return findings


def describe_findings(bundle: Bundle, findings: Findings, batch: Batch, numbers: Mapping[str, Any]) -> str:
    """The findings as lines of text."""
    again = f"step {bundle.step}: loss {float(numbers['loss'])}, gradient norm {float(numbers['grad_norm'])}"
    lines = [f"{again}; recorded {bundle.loss}, {bundle.grad_norm}"]
    for row, loss in enumerate(findings.losses):
        if not math.isfinite(loss):
            members = [int(index) for index in batch.example_id[row] if index >= 0]
            lines.append(f"row {row}: loss {loss}; records of the source: {', '.join(map(str, members))}")
    gradients = f"gradients that are not finite, of {findings.trainable}"
    for what, names in ((gradients, findings.gradients), ("parameters that are not finite", findings.parameters)):
        if names:
            lines.append(f"{what}: {some(names)}")
    if len(lines) == 1:
        lines.append("all of it is finite here: the numbers depend on the machine or its software")
    return "\n".join(lines)
