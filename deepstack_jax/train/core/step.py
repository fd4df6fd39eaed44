"""The training step as a pure function: gradients of the token-weighted loss over the global batch, one optimizer update."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from deepstack_jax.batch import Batch
from deepstack_jax.train.core.optimizer import split, unflatten
from deepstack_jax.types import PyTree, TrainState

StepFn = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


class ModelFns(NamedTuple):
    """What the step needs of a model."""

    hidden: Callable[[PyTree, Batch], Float[Array, "B T D"]]
    logits: Callable[[PyTree, Float[Array, "B T D"]], Float[Array, "B T V"]]  # float32
    head: Callable[[PyTree], PyTree] = lambda params: params  # the parameters that the logits need, of all; `logits` takes both


class LossSums(NamedTuple):
    """Sums over tokens, so that shards, packs and micro-batches add up to the same loss."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]  # weighted count of targets than which no word has a larger logit


LogitsFn = Callable[..., Float[Array, "B T V"]]


def token_loss(
    logits_fn: Callable[[PyTree, Float[Array, "B T D"]], Float[Array, "B T V"]],
    params: PyTree,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
) -> LossSums:
    """Summed cross-entropy. Logits exist for `chunk` positions at a time, once: with the loss of a chunk comes its gradient.

    The gradient flows into `hidden` and into `params`, which `logits_fn` takes: what it closes over are constants, and so are
    `weights`.
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    pad = chunks * chunk - length

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    parts = split(hidden), split(targets), split(weights)
    used, tree = jax.tree.flatten(params)
    return _summed(lambda hidden, *used: logits_fn(tree.unflatten(used), hidden), used, *parts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(logits_fn: LogitsFn, used: list[Array], hidden: Array, targets: Array, weights: Array) -> LossSums:
    """Sums over chunks, which are the first axis of the last three; `used` is what the logits depend on beside them."""

    def one(sums: LossSums, part: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        return add_up(sums, loss_sums(logits_fn(part[0], *used), *part[1:])), None

    return jax.lax.scan(one, no_sums(), (hidden, targets, weights))[0]


def _summed_forward(
    logits_fn: LogitsFn, used: list[CustomVJPPrimal], *parts: CustomVJPPrimal
) -> tuple[LossSums, tuple[list[Array | None], Array | None]]:
    """The sums, and the gradients of the loss, made while a chunk's logits are there; None where nothing asks for them."""
    trained = [array.value for array in used if array.perturbed]
    hidden_too = parts[0].perturbed

    def one(carry: tuple[LossSums, list[Array]], part: tuple[Array, Array, Array]) -> tuple[tuple[LossSums, list[Array]], Any]:
        def loss(trained: list[Array], hidden: Array) -> tuple[Array, LossSums]:
            rest = iter(trained)
            arrays = [next(rest) if array.perturbed else array.value for array in used]
            sums = loss_sums(logits_fn(hidden, *arrays), *part[1:])
            return sums.loss, sums

        (of_trained, *of_hidden), sums = jax.grad(loss, (0, 1)[: 1 + hidden_too], has_aux=True)(trained, part[0])
        return add_up(carry, (sums, of_trained)), of_hidden

    zero = (no_sums(), jax.tree.map(jnp.zeros_like, trained))
    (sums, gradients), of_hidden = jax.lax.scan(one, zero, tuple(part.value for part in parts))
    rest = iter(gradients)
    return sums, ([next(rest) if array.perturbed else None for array in used], of_hidden[0] if hidden_too else None)


def _summed_backward(logits_fn: LogitsFn, kept: tuple[list[Array | None], Array | None], cotangent: LossSums) -> tuple:
    del logits_fn
    factor = 0.0 if isinstance(cotangent.loss, SymbolicZero) else cotangent.loss
    return *jax.tree.map(lambda gradient: (gradient * factor).astype(gradient.dtype), kept), None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def add_up(*terms: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, *terms)


def no_sums() -> LossSums:
    return LossSums(*(jnp.zeros((), jnp.float32),) * 3)


def loss_sums(logits: Float[Array, "B T V"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]) -> LossSums:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    # The loss has looked for the largest logit already; argmax would be a pass of its own, the slowest of all on a CPU.
    hits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] >= logits.max(axis=-1)
    return LossSums((losses * weights).sum(), weights.sum(), (hits * weights).sum())


def make_loss(model: ModelFns, chunk: int) -> Callable[[PyTree, Batch], LossSums]:
    """The loss sums of a batch under given parameters; also the held-out loss."""

    def loss(params: PyTree, batch: Batch) -> LossSums:
        hidden = model.hidden(params, batch)
        return token_loss(model.logits, model.head(params), hidden, batch.targets, batch.loss_weights, chunk)

    return loss


def make_train_step(
    model: ModelFns,
    optimizer: optax.GradientTransformation,
    groups: dict[str, str],
    schedule: optax.Schedule,
    *,
    accumulation: int,
    chunk: int,
) -> StepFn:
    """`train_step(state, batch) -> (state, metrics)`.

    The loss is sum(losses * weights) / sum(weights) over the *whole* batch: gradients of sums are added over micro-batches and
    divided once at the end, so that the number of micro-batches does not change the result. Frozen parameters are constants
    of the differentiated function: they have no gradient buffer and no optimizer state. A step whose loss or gradient norm is
    not finite changes neither parameters nor optimizer, and is counted in the state; the batch is consumed all the same.
    """
    loss_fn = make_loss(model, chunk)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        trainable, frozen = split(state.params, groups)

        def loss_sum(trainable: PyTree, batch: Batch) -> tuple[Array, LossSums]:
            sums = loss_fn(unflatten({**frozen, **trainable}), batch)
            return sums.loss, sums

        gradients, sums = _accumulate(jax.grad(loss_sum, has_aux=True), trainable, batch, accumulation)
        total = jnp.maximum(sums.weight, 1.0)
        share = 1 / total  # a product is fused into what reads it, where a quotient would be written down first
        gradients = jax.tree.map(lambda g: g * share, gradients)
        loss, norm = sums.loss / total, optax.tree.norm(gradients)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        factor = schedule(state.step - state.bad_steps)  # the optimizer counts its updates, not the batches
        updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
        updated: Any = optax.apply_updates(trainable, updates)
        updated, opt_state = _choose(good, (updated, opt_state), (trainable, state.opt_state))
        bad = (~good).astype(jnp.int32)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=unflatten({**frozen, **updated}),
            opt_state=opt_state,
            bad_steps=state.bad_steps + bad,
            bad_in_a_row=(state.bad_in_a_row + bad) * bad,
        )
        metrics = {
            "loss": loss,
            "token_accuracy": sums.correct / total,
            "grad_norm": norm,
            "lr_factor": factor,
            "supervised_tokens": sums.weight,
            **_fill(batch),
            "good": good,
            "bad_steps": state.bad_steps,
            "bad_in_a_row": state.bad_in_a_row,
        }
        return state, metrics

    return train_step


def _choose(good: Array, new: PyTree, old: PyTree) -> PyTree:
    """A choice per element, which XLA fuses into the update: a branch would hold both states."""
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)


def _fill(batch: Batch) -> dict[str, Float[Array, ""]]:
    """Share of padding, and the sum of the squared lengths of all segments: twice the pairs that causal attention looks at."""
    padding = jnp.mean(batch.segment_ids == 0)
    segments = jax.nn.one_hot(batch.segment_ids, batch.example_id.shape[1] + 1, dtype=jnp.float32)
    return {"padding": padding, "segment_squares": jnp.square(segments.sum(axis=1)[:, 1:]).sum()}


def _accumulate(grad_fn: Callable, trainable: PyTree, batch: Batch, parts: int) -> tuple[PyTree, LossSums]:
    """Gradients and sums added over `parts` micro-batches, row r going to micro-batch r % parts: hosts then stay balanced."""
    if parts == 1:
        return grad_fn(trainable, batch)
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def add(total: PyTree, part: Batch) -> tuple[PyTree, None]:
        return add_up(total, grad_fn(trainable, part)), None

    zero = (jax.tree.map(jnp.zeros_like, trainable), no_sums())
    return jax.lax.scan(add, zero, micro)[0]
