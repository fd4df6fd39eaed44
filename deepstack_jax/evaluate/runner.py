"""Asks a model the held-out questions and counts the right answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.data.encode.encoder import BadExample, Encoder, try_row
from deepstack_jax.data.encode.templates import get_template
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.data.example import Example, Source
from deepstack_jax.data.pipeline import HostBatch, collate
from deepstack_jax.evaluate.questions import prompts, uninterrupted
from deepstack_jax.evaluate.scorers import exact_match
from deepstack_jax.generate.decoding import NO_TOKEN
from deepstack_jax.generate.text import AnswerText, end_of_turn
from deepstack_jax.parallel.distributed import (
    ProcessSlice,
    allgather_str,
    local_rows,
    max_over_hosts,
    process_slice,
    put_batch,
)
from deepstack_jax.parallel.rules import batch_sharding, replicated
from deepstack_jax.types import PyTree

# Fills the last batch up to its static size.
_NOBODY = BadExample(-1, "", "")


@dataclass(frozen=True)
class Answer:
    """One question, what the model said, and what was expected."""

    id: str  # of the row
    index: int  # row of the source
    turn: int  # which question of the example, from 0
    kind: str
    question: str
    reference: str
    prediction: str
    score: float

    def as_dict(self) -> dict:
        return asdict(self)


def ask(
    source: Source, config: Config, decode: Callable[[Batch], np.ndarray], examples: int, mesh: Mesh
) -> tuple[list[Answer], list[BadExample]]:
    """Ask every answered turn of the first `examples` examples, the true answers of earlier turns given.

    Every host asks the questions of its own share of the examples, all of them at the same time.

    Args:
      source: held-out examples.
      config: the run; questions are decoded `evaluation.batch_size` at a time, over all hosts.
      decode: this host's rows of a batch of prompts -> i32[B, Y] tokens of those rows, NO_TOKEN behind the end.
      examples: how many examples at the most.
      mesh: of the run.

    Returns:
      One Answer per question, in the order of the source, and the examples that could not be asked; the same on all hosts.
    """
    part, size = process_slice(mesh), _rows_per_host(config, mesh)
    tokenizer = load_tokenizer(config.data.tokenizer)
    stops = end_of_turn(get_template(config.data.template), tokenizer)[1]
    questions, bad = _questions(source, config, range(part.index, min(examples, len(source)), part.count))
    answers: list[Answer] = []
    for first in range(0, max_over_hosts(len(questions)), size):
        asked = questions[first : first + size]
        batch = _collate([prompt for prompt, _ in asked], size, config).batch
        for (_, answer), ids in zip(asked, decode(batch), strict=False):
            said = AnswerText(tokenizer, stops)
            said.feed(ids[ids != NO_TOKEN].tolist())
            said.close()
            answers.append(Answer(**answer, prediction=said.text, score=exact_match(said.text, answer["reference"])))
    return _of_all_hosts(answers, bad, part)


def _of_all_hosts(answers: list[Answer], bad: list[BadExample], part: ProcessSlice) -> tuple[list[Answer], list[BadExample]]:
    """What all hosts have found, in the order of the source."""
    if part.count == 1:
        return answers, bad
    mine = [[answer.as_dict() for answer in answers], [asdict(example) for example in bad]]
    said = [json.loads(text) for text in allgather_str(json.dumps(mine if part.is_leader else [[], []]))]
    answers = [Answer(**answer) for answers, _ in said for answer in answers]
    bad = [BadExample(**example) for _, bad in said for example in bad]
    return sorted(answers, key=lambda answer: (answer.index, answer.turn)), sorted(bad, key=lambda example: example.index)


def _rows_per_host(config: Config, mesh: Mesh) -> int:
    """Rows of a host's part of a batch, `evaluation.batch_size` rounded up to what splits over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-config.evaluation.batch_size // shards) * shards // process_slice(mesh).count


def _collate(examples: Sequence[EncodedExample | BadExample], rows: int, config: Config) -> HostBatch:
    """A host's part of a batch, filled up with blank rows; all hosts take the same length."""
    longest = max((example.length for example in examples if isinstance(example, EncodedExample)), default=0)
    delivered = collate([*examples, *[_NOBODY] * (rows - len(examples))], config, max_over_hosts(longest))
    return delivered._replace(bad=tuple(example for example in delivered.bad if example is not _NOBODY))


def _questions(
    source: Source, config: Config, indices: Iterable[int]
) -> tuple[list[tuple[EncodedExample, dict]], list[BadExample]]:
    encoder = Encoder(config)

    def encode(example: Example) -> list[tuple[EncodedExample, dict] | BadExample]:
        encoder.check_images(example)
        pixels, layouts, _ = encoder.images(example)
        found: list[tuple[EncodedExample, dict] | BadExample] = []
        for one in prompts(example, config, [layout.tokens.size for layout in layouts]):
            if isinstance(one, BadExample):
                found.append(one)
                continue
            asked, ids = one
            seen = (pixels[: asked.images], layouts[: asked.images])
            answer = {"id": example.name, "index": example.index, "turn": asked.turn, "kind": _kind(example, asked.turn)}
            answer |= {"question": asked.words, "reference": asked.reference}
            found.append((EncodedExample(example.index, ids, np.zeros(ids.size, bool), *seen), answer))
        return found

    rows = [try_row(source, index, encode) for index in indices]
    found = [one for row in rows for one in ([row] if isinstance(row, BadExample) else row)]
    return [one for one in found if not isinstance(one, BadExample)], [one for one in found if isinstance(one, BadExample)]


def _kind(example: Example, turn: int) -> str:
    """What the source calls this question; "all" where it has no name, as a stranger's row may hold anything."""
    kinds = example.info.get("kinds")
    kind = kinds[turn] if isinstance(kinds, list | tuple) and turn < len(kinds) else None
    return kind if isinstance(kind, str) else "all"


def mean_by_kind(answers: Sequence[Answer]) -> dict[str, float]:
    """{"fine_exact_match": share, ...}, and "exact_match" over all answers."""
    scores: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        scores["exact_match"].append(answer.score)
        if answer.kind != "all":
            scores[f"{answer.kind}_exact_match"].append(answer.score)
    return {name: float(np.mean(values)) for name, values in sorted(scores.items())}


class HeldOut:
    """Loss and answers on held-out examples, with functions that are compiled once; the same on all hosts.

    Args:
      source: held-out examples.
      config: the run.
      loss: (params, batch) -> LossSums.
      decode: (params, batch of prompts) -> i32[B, Y].
      mesh: of the run.

    Attributes:
      named: rows that were left out and are known to be: each is said once.
    """

    def __init__(self, source: Source, config: Config, loss: Callable, decode: Callable, mesh: Mesh) -> None:
        self.source, self._config, self._mesh = source, config, mesh
        self.named: set[int] = set()
        self._loss = jax.jit(loss, out_shardings=replicated(mesh))
        self._decode = jax.jit(decode, out_shardings=batch_sharding(mesh))

    @property
    def rows(self) -> int:
        """How many rows the loss is over, those that cannot be used included."""
        return min(self._config.evaluation.examples, len(self.source))

    def loss(self, params: PyTree) -> tuple[dict[str, float], list[BadExample]]:
        """Token-weighted loss and accuracy over the first `evaluation.examples` examples, the answers given.

        Returns:
          {"validation_loss": ..., ...}, empty where nothing is supervised: no loss is not a loss of 0; and the examples that
          could not be used.
        """
        sums, bad = np.zeros(3), list[BadExample]()
        for delivered in self._batches():
            sums += np.array(jax.device_get(self._loss(params, put_batch(self._mesh, delivered.batch))))
            bad += delivered.bad
        _, bad = _of_all_hosts([], bad, process_slice(self._mesh))
        if not sums[1]:
            return {}, bad
        return {"validation_loss": sums[0] / sums[1], "validation_token_accuracy": sums[2] / sums[1]}, bad

    def answers(self, params: PyTree, examples: int) -> tuple[list[Answer], list[BadExample]]:
        """Greedy answers to the questions of the first `examples` examples."""

        def decode(batch: Batch) -> np.ndarray:
            return local_rows(self._decode(params, put_batch(self._mesh, batch)))

        return ask(self.source, self._config, decode, examples, self._mesh)

    def _batches(self) -> Iterator[HostBatch]:
        """This host's parts of the batches."""
        encoder = Encoder(uninterrupted(self._config))
        part, rows = process_slice(self._mesh), _rows_per_host(self._config, self._mesh)
        for first in range(0, self.rows, rows * part.count):
            begin = first + part.index * rows
            examples = [try_row(self.source, index, encoder) for index in range(begin, min(self.rows, begin + rows))]
            yield _collate(examples, rows, self._config)
