"""Loss and answers of a run on its held-out data: on its mesh, in the shapes of its batches, the same on all hosts."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
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
from deepstack_jax.evaluate.ask import ask
from deepstack_jax.evaluate.questions import encode_for_row, uninterrupted
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.generate.answers import Answer, Answerer
from deepstack_jax.generate.decoding import NO_TOKEN, greedy
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.prompts import CutImage, Turn, find_template
from deepstack_jax.generate.text import end_of_turn
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.parallel import distributed
from deepstack_jax.parallel.distributed import ProcessSlice, put_batch
from deepstack_jax.parallel.rules import batch_sharding, replicated
from deepstack_jax.printing import plural
from deepstack_jax.types import PyTree

_BLANK = BadExample(-1, "", "")  # fills the last batch up to its static size


@dataclass(frozen=True)
class RunAnswerer(Answerer):
    """The model of a run on its mesh: batches have the shapes of training, and a prompt must fit into a row."""

    # (params, this host's rows of a batch of prompts) -> i32[B, Y] tokens of those rows, NO_TOKEN after the end
    decode: Callable[[PyTree, Batch], np.ndarray] = field(kw_only=True)

    def cut_images(self, images: Sequence[Any], options: Options) -> list[CutImage]:
        """As every answerer's; RequestError where a row has no room for so many, before any is decoded."""
        if len(images) > (room := self.config.data.max_images):
            raise RequestError(f"{plural(len(images), 'image')}, a row has room for {room}; raise config.data.max_images")
        return super().cut_images(images, options)

    def encode(self, turns: Sequence[Turn], options: Options, *, placed: bool = False) -> EncodedExample:
        """As every answerer's, checked against the room of a row."""
        assert self.tokenizer is not None, "a run has one"
        return encode_for_row(turns, self.config, self.tokenizer, placed=placed)

    def answer_encoded(self, prompts: Sequence[EncodedExample], options: Options, batch_size: int) -> list[Answer]:
        """As every answerer's, for one batch; all hosts take part, also those without a prompt."""
        ids = self.decode(self.params, fill_batch(prompts, batch_size, self.config).batch)
        texts = [self.new_text(options) for _ in prompts]
        for text, made in zip(texts, ids, strict=False):
            text.feed(made[made != NO_TOKEN].tolist())
            text.close()
        return [Answer(text.text, text.tokens) for text in texts]


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
        stops = tuple(end_of_turn(find_template(config.data.template), self._tokenizer)[0])
        made = partial(decode, model, max_new_tokens=self.options.max_new_tokens, stop_ids=stops)
        self._loss = jax.jit(loss, out_shardings=replicated(mesh))
        self._greedy = jax.jit(made, out_shardings=batch_sharding(mesh))

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
        _, bad = _of_all_hosts([], bad, self._slice)
        if not sums[1]:
            return {}, bad
        return {"validation_loss": sums[0] / sums[1], "validation_token_accuracy": sums[2] / sums[1]}, bad

    def predictions(self, params: PyTree, examples: int) -> tuple[list[Prediction], list[BadExample]]:
        """Greedy answers to every answered turn of the first `examples` examples, in the order of the source.

        Every host asks the questions of its own share of the examples, all of them at the same time.
        """
        answerer = RunAnswerer(
            self._model, params, self._config, self._tokenizer, self._config.data.template, decode=self._decode
        )
        rows = range(self._slice.index, min(examples, len(self.task.source)), self._slice.count)
        batches = ask(self.task, answerer, self.options, self._rows_per_host(), rows)
        found = [one for batch in batches for one in batch]
        answered = [one for one in found if isinstance(one, Prediction)]
        return _of_all_hosts(answered, [one for one in found if isinstance(one, BadExample)], self._slice)

    def _decode(self, params: PyTree, batch: Batch) -> np.ndarray:
        return distributed.local_rows(self._greedy(params, put_batch(self._mesh, batch)))

    def _rows_per_host(self) -> int:
        """Rows of a host's part of a batch, `evaluation.batch_size` rounded up to what splits over the mesh."""
        shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        return -(-self._config.evaluation.batch_size // shards) * shards // self._slice.count

    def _batches(self) -> Iterator[HostBatch]:
        """This host's rows of the batches that the loss is over."""
        encoder, rows = Encoder(uninterrupted(self._config).data_spec), self._rows_per_host()
        for first in range(0, self.rows, rows * self._slice.count):
            begin = first + self._slice.index * rows
            places = range(begin, min(self.rows, begin + rows))
            examples = [try_record(self.task.source, index, encoder.encode, lost=True) for index in places]
            yield fill_batch(examples, rows, self._config)


def _of_all_hosts(
    predictions: list[Prediction], bad: list[BadExample], part: ProcessSlice
) -> tuple[list[Prediction], list[BadExample]]:
    """What all hosts have found, in the order of the source."""
    if part.count == 1:
        return predictions, bad
    plain = [(one.index, one.name, one.reason) for one in bad]
    mine = [[asdict(one) for one in predictions], plain] if part.is_leader else [[], []]
    hosts = [json.loads(text) for text in distributed.allgather_str(json.dumps(mine))]
    predictions = [Prediction(**one) for found, _ in hosts for one in found]
    bad = [BadExample(*one) for _, found in hosts for one in found]
    return sorted(predictions, key=lambda one: (one.row, one.turn)), sorted(bad, key=lambda one: one.index)
