"""A model over all devices of all processes, which answers a batch at a time: its rows are split, parameters copied or cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from deepstack_jax.batch import Batch, empty_batch
from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.evaluate.likelihood import LikelihoodFn, letter_prompts, likelihoods
from deepstack_jax.evaluate.questions import Question
from deepstack_jax.families.build import build_model
from deepstack_jax.generate.answers import Answerer
from deepstack_jax.generate.decoding import NO_TOKEN, Greedy, greedy
from deepstack_jax.generate.options import Options
from deepstack_jax.generate.prompts import PromptShape, pad_prompts
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.parallel.distributed import local_rows, max_over_hosts, process_slice, put_batch
from deepstack_jax.parallel.kernels import attentions, kernels_for
from deepstack_jax.parallel.mesh import check_model_fits
from deepstack_jax.parallel.rules import batch_sharding, crop_shards, param_shardings, replicated, use_mesh
from deepstack_jax.train.core.optimizer import flatten, unflatten
from deepstack_jax.types import PyTree

STEP = 32  # tokens between two lengths of short batches; long ones are apart by an eighth


class Measured(NamedTuple):
    """An answer, and how sure it was."""

    text: str
    tokens: int  # made for it, end of turn not counted
    margin: float | None = None  # by how much the closest choice of a token was won, in logits; None where nobody looked


class Decode(Protocol):
    """Greedy answers to this process' rows of a batch, as numpy arrays; all processes take part."""

    def __call__(self, params: PyTree, batch: Batch, *, max_new_tokens: int, stop_ids: tuple[int, ...]) -> Greedy: ...


def make_decode(model: DeepStack, mesh: Mesh, decode: Callable[..., Greedy] = greedy) -> Decode:
    """`greedy`, or what takes the same, on a mesh; it compiles once for every shape of a batch and length of an answer."""
    static = ("max_new_tokens", "stop_ids")
    run = jax.jit(partial(decode, model), static_argnames=static, out_shardings=batch_sharding(mesh))

    def on_rows(params: PyTree, batch: Batch, *, max_new_tokens: int, stop_ids: tuple[int, ...]) -> Greedy:
        with use_mesh(mesh):
            made = run(params, put_batch(mesh, batch), max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        return Greedy(*map(local_rows, made))

    return on_rows


def make_likelihood(model: DeepStack, mesh: Mesh) -> LikelihoodFn:
    """Log-likelihood of the supervised tokens of this process' rows of a batch."""
    run = jax.jit(partial(likelihoods, model), static_argnames="most", out_shardings=batch_sharding(mesh))

    def on_rows(params: PyTree, batch: Batch, most: int) -> np.ndarray:
        with use_mesh(mesh):
            return local_rows(run(params, put_batch(mesh, batch), most=most))

    return on_rows


def share_of(mesh: Mesh, batch_size: int) -> int:
    """Rows of a process' part of a batch: `batch_size` of all of them, rounded up to what splits over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch_size // shards) * shards // process_slice(mesh).count


def near_length(length: int) -> int:
    """The length that a batch is padded to: a multiple of 32, from 512 on of an eighth of the power of 2 below."""
    step = max(STEP, (1 << max(length - 1, 1).bit_length()) // 16)
    return max(1, -(-length // step)) * step


@dataclass(frozen=True)
class MeshAnswerer(Answerer):
    """As every answerer, but batches are those of all devices; all processes ask at the same time, each its own rows."""

    decode: Decode = field(kw_only=True)
    likelihood: LikelihoodFn = field(kw_only=True)

    def answer_batch(self, prompts: Sequence[EncodedExample], options: Options, batch_size: int) -> list[Measured]:
        """One answer per prompt, at most `batch_size`; all processes take part, also those without a prompt."""
        stops = tuple(self.ends_of(options)[0])
        batch = self.fill(prompts, batch_size)
        made = self.decode(self.params, batch, max_new_tokens=options.max_new_tokens, stop_ids=stops)
        texts = [self.new_text(options) for _ in prompts]
        for text, ids in zip(texts, made.tokens, strict=False):
            text.feed(ids[ids != NO_TOKEN].tolist())
            text.close()
        margins = [float(margin) for margin in made.margin[: len(prompts)]]
        return [Measured(text.text, text.tokens, margin) for text, margin in zip(texts, margins, strict=True)]

    def choose(self, questions: Sequence[Question], options: Options, batch_size: int) -> list[Measured]:
        """Of each question with options the likeliest letter, by the sum of the log-likelihoods of its tokens as the answer.

        Its margin is by how much it leads; all processes take part, also those without a question.
        """
        rows = [row for question in questions for row in letter_prompts(question, self, options)]
        most = max_over_hosts(max((int(row.supervised.sum()) for row in rows), default=1))
        found = list[float]()
        for first in range(0, max_over_hosts(len(rows)), batch_size):
            part = rows[first : first + batch_size]
            found += self.likelihood(self.params, self.fill(part, batch_size), most)[: len(part)].tolist()
        answers, start = list[Measured](), 0
        for question in questions:
            letters = question.letters
            scores = found[start : start + len(letters)]
            start += len(letters)
            best = int(np.argmax(scores))
            answers.append(Measured(letters[best], 1, scores[best] - max(scores[:best] + scores[best + 1 :], default=-np.inf)))
        return answers

    def fill(self, prompts: Sequence[EncodedExample], rows: int) -> Batch:
        """This process' rows of a batch, filled up with blank ones; all processes take the same shape."""
        longest = max_over_hosts(max((one.length for one in prompts), default=1))
        images = max_over_hosts(max((len(one.layouts) for one in prompts), default=0))
        return pad_prompts(prompts, self.config, rows=rows, shape=PromptShape(near_length(longest), images))


def over_mesh(answerer: Answerer, mesh: Mesh) -> MeshAnswerer:
    """An answerer whose parameters are whole on one device, or on each process' first, over a mesh.

    Raises:
      ConfigError: sizes of the model that do not divide over the mesh.
    """
    config = answerer.config
    check_model_fits(config.decoder, config.vision, mesh)
    kernels = kernels_for(mesh.devices.flat[0].platform, config)
    model = build_model(config, *attentions(kernels, mesh), crop_shards=crop_shards(mesh))
    sample = empty_batch(config.data_spec.padded_shape(1, STEP))
    shapes = jax.eval_shape(model.init, jax.random.key(0), sample)["params"]
    places = flatten(param_shardings(mesh, shapes))

    def place(path: str, leaf: jax.Array) -> jax.Array:
        at = places.get(path, replicated(mesh))  # adapters are small
        if jax.process_count() == 1:
            return jax.device_put(leaf, at)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, at, lambda part: whole[part])

    params = unflatten({path: place(path, leaf) for path, leaf in flatten(answerer.params).items()})
    return MeshAnswerer(
        model,
        params,
        config,
        answerer.tokenizer,
        answerer.template,
        answerer.ends,
        decode=make_decode(model, mesh),
        likelihood=make_likelihood(model, mesh),
    )
