"""A step that gave no finite number, kept so that it can be done again: what was in it, and where to start from."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepstack_jax.atomic import write_json
from deepstack_jax.batch import Batch
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.errors import UserError
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.printing import Console
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.core.optimizer import FROZEN, flatten, unflatten
from deepstack_jax.train.core.program import Program, first_state
from deepstack_jax.train.core.step import token_loss
from deepstack_jax.types import PyTree, TrainState

log = logging.getLogger(__name__)

# Each bundle keeps a checkpoint from being deleted; a run that has gone bad would keep them all.
MOST_BUNDLES = 8
_SHOWN = 8  # names in a line


class ReplayError(UserError):
    """A bundle that cannot be replayed."""


class Bundle(NamedTuple):
    """What is known of a bad step."""

    step: int  # the first step of a run is 1
    examples: list[int]  # rows of the source, of all hosts
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
        raise ReplayError(f"--replay={file} is no replay bundle ({error}); bundles in {file.parent}: {there}") from error


class Findings(NamedTuple):
    """What is not finite in a step.

    Attributes:
      losses: mean loss of every row of the batch; a row is one example, or a pack of several.
      gradients: names of the trainable parameters whose gradient is not finite.
      parameters: names of the parameters that are not finite themselves.
      trainable: number of trainable parameters.
    """

    losses: list[float]
    gradients: list[str]
    parameters: list[str]
    trainable: int


def examine(program: Program, state: TrainState, batch: Batch) -> Findings:
    """Look into one step: which rows and which parameters carry the trouble."""
    losses = jax.device_get(jax.jit(_row_losses(program))(state.params, batch))
    bad = jax.device_get(jax.jit(_bad_gradients(program))(state.params, batch))
    unfit = jax.device_get(jax.jit(lambda params: jax.tree.map(_any_bad, flatten(params)))(state.params))
    gradients, parameters = ([name for name in names if names[name]] for names in (bad, unfit))
    return Findings(losses.tolist(), gradients, parameters, len(bad))


def _any_bad(array: Array) -> Array:
    return ~jnp.isfinite(array).all()


def _row_losses(program: Program) -> Callable[[PyTree, Batch], Float[Array, " B"]]:
    functions, chunk = program.functions, program.config.train.loss_chunk

    def losses(params: PyTree, batch: Batch) -> Array:
        def one(hidden: Array, targets: Array, weights: Array) -> Array:
            logits = partial(functions.logits, params)
            sums = token_loss(logits, hidden[None], targets[None], weights[None], chunk)
            return sums.loss / jnp.maximum(sums.weight, 1.0)

        return jax.vmap(one)(functions.hidden(params, batch), batch.targets, batch.loss_weights)

    return losses


def _bad_gradients(program: Program) -> Callable[[PyTree, Batch], dict[str, Array]]:
    def bad(params: PyTree, batch: Batch) -> dict[str, Array]:
        flat = flatten(params)
        frozen = {path: leaf for path, leaf in flat.items() if program.groups[path] == FROZEN}
        trainable = {path: leaf for path, leaf in flat.items() if program.groups[path] != FROZEN}

        def loss(trainable: PyTree) -> Array:
            return program.loss(unflatten({**frozen, **trainable}), batch).loss

        return jax.tree.map(_any_bad, jax.grad(loss)(trainable))

    return bad


def replay(file: Path, program: Program, stream: TrainingStream, checkpoints: Checkpoints, console: Console) -> Findings:
    """Walk from the checkpoint that a bundle names to its step, and look into that step; writes nothing.

    Args:
      program, stream: of the run, with its own configuration.

    Raises:
      ReplayError: there is no such bundle, or it names a checkpoint from which its step cannot be reached.
      CheckpointError: its checkpoint cannot be read.
    """
    bundle = read_bundle(file)
    if bundle.checkpoint:
        state, place = _found(checkpoints.restore(program.abstract_state(), bundle.checkpoint))
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
    console.print(describe(bundle, findings, delivered.batch, numbers), soft_wrap=True)
    return findings


def describe(bundle: Bundle, findings: Findings, batch: Batch, numbers: Mapping[str, Any]) -> str:
    """The findings as lines of text."""
    again = f"step {bundle.step}: loss {float(numbers['loss'])}, gradient norm {float(numbers['grad_norm'])}"
    lines = [f"{again}; recorded {bundle.loss}, {bundle.grad_norm}"]
    for row, loss in enumerate(findings.losses):
        if not math.isfinite(loss):
            members = [int(index) for index in batch.example_id[row] if index >= 0]
            lines.append(f"row {row}: loss {loss}; rows of the source: {', '.join(map(str, members))}")
    gradients = f"gradients that are not finite, of {findings.trainable}"
    for what, names in ((gradients, findings.gradients), ("parameters that are not finite", findings.parameters)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{what}: {', '.join(names[:_SHOWN])}{more}")
    if len(lines) == 1:
        lines.append("all of it is finite here: the numbers depend on the machine or its software")
    return "\n".join(lines)


def _found(restored: tuple[TrainState, dict[str, Any]] | None) -> tuple[TrainState, dict[str, Any]]:
    if restored is None:
        raise ReplayError("the checkpoint that the bundle starts from is gone; the run cannot be walked to that step")
    return restored
