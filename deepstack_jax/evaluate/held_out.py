"""Loss and answers of a run on its held-out data: on its mesh, in the shapes of its batches, the same on all hosts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.encode.batch_rows import EncodedExample, HostBatch, collate
from deepstack_jax.data.encode.encoder import Encoder, try_record
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.data.example import BadExample, Source
from deepstack_jax.evaluate.ask import Result, ask, of_all_hosts
from deepstack_jax.evaluate.on_mesh import MeshAnswerer, make_decode, make_likelihood, share_of
from deepstack_jax.evaluate.questions import encode_for_row, uninterrupted
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.generate.decoding import greedy
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.prompts import CutImage, Turn
from deepstack_jax.generate.text import ends_beside
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.parallel import distributed
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.rules import replicated
from deepstack_jax.printing import plural
from deepstack_jax.types import PyTree

_BLANK = BadExample(-1, "", "")  # fills the last batch up to its static size


@dataclass(frozen=True)
class RunAnswerer(MeshAnswerer):
    """The model of a run on its mesh: batches have the shapes of training, and a prompt must fit into a row."""

    def cut_images(self, images: Sequence[Any], options: Options) -> list[CutImage]:
        """As every answerer's; RequestError where a row has no room for so many, before any is decoded."""
        if len(images) > (room := self.config.data.max_images):
            raise RequestError(f"{plural(len(images), 'image')}, a row has room for {room}; raise config.data.max_images")
        return super().cut_images(images, options)

    def encode(self, turns: Sequence[Turn], options: Options, *, placed: bool = False, answer: str = "") -> EncodedExample:
        """As every answerer's, checked against the room of a row."""
        assert self.tokenizer is not None, "a run has one"
        return encode_for_row(turns, self.config, self.tokenizer, placed=placed, answer=answer)

    def fill(self, prompts: Sequence[EncodedExample], rows: int) -> Batch:
        """As every answerer's, in a shape of training."""
        return fill_batch(prompts, rows, self.config).batch


def run_options(config: Config) -> Options:
    """How a run asks."""
    return Options(max_new_tokens=config.evaluation.max_new_tokens, exif=config.data.exif)


def fill_batch(examples: Sequence[EncodedExample | BadExample], rows: int, config: Config) -> HostBatch:
    """A host's rows of a batch, filled up with blank ones; all hosts take the same length."""
    longest = max((example.length for example in examples if isinstance(example, EncodedExample)), default=0)
    filled = collate([*examples, *[_BLANK] * (rows - len(examples))], config.data_spec, distributed.max_over_hosts(longest))
    return filled._replace(bad=tuple(example for example in filled.bad if example is not _BLANK))


class HeldOut:
    """Loss and answers of a run's model on held-out examples, with functions compiled once; the same on all hosts.

    Args:
      loss: (params, batch) -> LossSums.
      decode: as `decoding.greedy`.
    """

    def __init__(
        self, source: Source, config: Config, loss: Callable, model: DeepStack, mesh: Mesh, decode: Callable = greedy
    ) -> None:
        self.task, self.options = Task(source), run_options(config)
        self._config, self._mesh, self._model, self._slice = config, mesh, model, distributed.process_slice(mesh)
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        self._ends = ends_beside(self._tokenizer)
        self._loss = jax.jit(loss, out_shardings=replicated(mesh))
        self._how = {"decode": make_decode(model, mesh, decode), "likelihood": make_likelihood(model, mesh)}

    @property
    def rows(self) -> int:
        """How many rows the loss is over, those that cannot be used included."""
        return min(self._config.evaluation.examples, len(self.task.source))

    def loss(self, params: PyTree) -> tuple[dict[str, float], list[BadExample]]:
        """Token-weighted loss and accuracy over the first `evaluation.examples` examples, the answers given.

        Returns:
          {"validation_loss": ..., ...}, empty where nothing is supervised: no loss is not a loss of 0; and the examples that
          could not be used.
        """
        sums, bad = np.zeros(3), list[BadExample]()
        for made in self._batches():
            sums += np.array(jax.device_get(self._loss(params, put_batch(self._mesh, made.batch))))
            bad += made.bad
        bad = sorted(_bad_of(of_all_hosts(bad, self._slice)), key=lambda one: one.index)
        if not sums[1]:
            return {}, bad
        return {"validation_loss": sums[0] / sums[1], "validation_token_accuracy": sums[2] / sums[1]}, bad

    def predictions(self, params: PyTree, examples: int) -> tuple[list[Prediction], list[BadExample]]:
        """Greedy answers to every answered turn of the first `examples` examples, in the order of the source.

        Every host asks the questions of its own share of the examples, all of them at the same time.
        """
        about = (self._config, self._tokenizer, self._config.data.template, self._ends)
        answerer = RunAnswerer(self._model, params, *about, **self._how)
        rows = range(self._slice.index, min(examples, len(self.task.source)), self._slice.count)
        batches = ask(self.task, answerer, self.options, self._rows_per_host(), rows)
        found = of_all_hosts([one for batch in batches for one in batch], self._slice)
        answered = sorted((one for one in found if isinstance(one, Prediction)), key=lambda one: (one.row, one.turn))
        return answered, sorted(_bad_of(found), key=lambda one: one.index)

    def _rows_per_host(self) -> int:
        return share_of(self._mesh, self._config.evaluation.batch_size)

    def _batches(self) -> Iterator[HostBatch]:
        """This host's rows of the batches that the loss is over."""
        encoder, rows = Encoder(uninterrupted(self._config).data_spec), self._rows_per_host()
        for first in range(0, self.rows, rows * self._slice.count):
            begin = first + self._slice.index * rows
            places = range(begin, min(self.rows, begin + rows))
            examples = [try_record(self.task.source, index, encoder.encode, lost=True) for index in places]
            yield fill_batch(examples, rows, self._config)


def _bad_of(results: Iterable[Result]) -> list[BadExample]:
    return [one for one in results if isinstance(one, BadExample)]
