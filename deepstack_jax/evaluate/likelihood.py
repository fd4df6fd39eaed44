"""Multiple choice by likelihood: which of the letters a model finds likeliest as the answer, without making any token."""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from deepstack_jax.batch import Batch
from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.evaluate.questions import Question
from deepstack_jax.generate.answers import Answerer
from deepstack_jax.generate.options import Options
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.types import HostOrDevice, PyTree

# (params, this process' rows of a batch, most supervised tokens of a row) -> f32[B]; all processes take part
LikelihoodFn = Callable[[PyTree, Batch, int], np.ndarray]


def likelihoods(model: DeepStack, params: PyTree, batch: Batch, *, most: int) -> Float[Array, " B"]:
    """Summed log-likelihood of every row's supervised tokens, of which it has `most` at most."""
    variables = {"params": params}
    hidden = model.apply(variables, batch).hidden
    places = jnp.argsort(-jnp.asarray(batch.loss_weights), axis=1, stable=True)[:, :most]

    def at(array: HostOrDevice) -> Array:
        return jnp.take_along_axis(jnp.asarray(array), places, axis=1)

    logits = model.apply(variables, jnp.take_along_axis(hidden, places[..., None], axis=1), method="logits")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), at(batch.targets))
    return -jnp.sum(losses * at(batch.loss_weights), axis=1)


def letter_prompts(question: Question, answerer: Answerer, options: Options) -> list[EncodedExample]:
    """A question with each of its letters as the answer; the letter's tokens are supervised, the end of turn is left out."""
    short = replace(options, max_new_tokens=1)
    return [answerer.encode(question.turns, short, placed=True, answer=letter) for letter in question.letters]
