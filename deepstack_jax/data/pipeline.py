"""Grain pipelines from a source to batches. The order is a pure function of (seed, epoch), and the state is one batch index.

Shuffle, repeat and batch are index arithmetic on a random-access dataset, done before any worker process: so the batch with
number n is the same for every number of workers and hosts, a run resumes at the byte where it stopped, and no example is seen
twice in an epoch.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain

from deepstack_jax.batch import Batch, check_batch, empty_batch
from deepstack_jax.config import Config
from deepstack_jax.config_checks import ConfigError
from deepstack_jax.data.conversation import get_template
from deepstack_jax.data.encode import BadExample, Encoder
from deepstack_jax.data.rows import Cursor, EncodedExample, blank_example, place_example
from deepstack_jax.data.sources import LlavaJson, SampleError, Source, SourceError
from deepstack_jax.data.synthetic import DocumentPages
from deepstack_jax.data.tokenize import Tokenizer, load_tokenizer


class Delivered(NamedTuple):
    """A batch and the examples of it that were left blank."""

    batch: Batch
    bad: tuple[BadExample, ...]


def open_source(config: Config, split: str) -> Source:
    """The source of the "train" or "validation" split.

    Raises:
      ConfigError: no file is configured, or it does not exist; the message names the flag that points to it.
      SourceError: the file exists but cannot be read as examples.
    """
    data = config.data
    if data.source == "pages":
        pages = data.synthetic
        return DocumentPages(pages.seed, pages.length, pages.style, pages.questions, split)
    name = data.train if split == "train" else data.validation
    if not name:
        raise ConfigError(f"config.data.{split} is empty: name the LLaVA JSON file with --config.data.{split}=FILE")
    path = Path(data.root).expanduser() / name
    if not path.is_file():
        raise ConfigError(
            f"{split} data {path} does not exist; point to it with --config.data.root=DIR --config.data.{split}=FILE"
        )
    return LlavaJson(path, Path(data.root).expanduser() / data.images)


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


def check_images(source: Source, config: Config, limit: int = 1000) -> None:
    """Stop before compilation if more images are missing than the run would tolerate; looks at the first `limit` rows.

    Raises:
      SourceError: with the first missing paths and the flag that points to the image root.
    """
    if not isinstance(source, LlavaJson):
        return
    missing = source.missing_images(limit)
    if len(missing) > config.data.max_bad_fraction * min(limit, len(source)):
        raise SourceError(
            f"{len(missing)} images are missing among the first {min(limit, len(source))} rows, e.g. {missing[0]}; "
            "point to the image root with --config.data.root=DIR and --config.data.images=FOLDER, "
            f"or allow more than config.data.max_bad_fraction={config.data.max_bad_fraction}"
        )


@dataclass(frozen=True)
class BatchMaker:
    """Row numbers -> one padded batch, one example per row, as long as the shortest bucket that fits. Runs in the workers."""

    source: Source
    encoder: Encoder

    def __call__(self, indices: Sequence[int]) -> Delivered:
        return collate([self.load(int(index)) for index in indices], self.encoder.config)

    def load(self, index: int) -> EncodedExample | BadExample:
        """The training form of row `index` of the source, or why it cannot be used."""
        try:
            example = self.source[index]
        except SampleError as error:
            return BadExample(index, error.name, str(error))
        return self.encoder(example)


def collate(examples: Sequence[EncodedExample | BadExample], config: Config) -> Delivered:
    """One example per row, right padded to a bucket; the place of a bad one stays blank, with its id on record."""
    longest = max((example.length for example in examples if isinstance(example, EncodedExample)), default=0)
    length = min((bucket for bucket in config.data.buckets if bucket >= longest), default=config.data.max_length)
    patches = config.patch_side**2
    batch = empty_batch(config.batch_shape(len(examples), length))
    for row, example in enumerate(examples):
        if isinstance(example, BadExample):
            blank_example(batch, row, 0, example.index)
        else:
            place_example(batch, row, example, Cursor(), patches)
    check_batch(batch, patches)
    return Delivered(batch, tuple(example for example in examples if isinstance(example, BadExample)))


class TrainingStream(Iterator[Delivered]):
    """Batches without end, in a fixed order, from any batch number on.

    Args:
      source: random access, of examples.
      config: the run.
      process, processes: this host and the number of hosts; a host reads only its slice of each global batch.

    `state()` is that of the batches handed out, not of those decoded ahead.
    """

    def __init__(self, source: Source, config: Config, *, process: int = 0, processes: int = 1) -> None:
        self.config = config
        self.processes = processes
        self.examples_per_epoch = len(source)
        self._consumed = 0
        self._iterator: Any = None
        rows = config.train.batch_size // processes
        if processes > 1 and config.data.buckets:
            raise ConfigError("config.data.buckets: hosts would disagree on the length of a batch; clear it on several hosts")
        order = grain.MapDataset.range(len(source)).seed(config.data.seed)
        order = order.shuffle() if config.data.shuffle else order
        self._order: Any = order.repeat().batch(rows, batch_fn=list)[process::processes]
        self._make_batch = BatchMaker(source, Encoder(config))

    def indices(self, number: int) -> list[int]:
        """Rows of the source in this host's part of batch `number`."""
        return [int(index) for index in self._order[number]]

    def peek(self) -> Batch:
        """The first batch of all, without moving on."""
        return self._make_batch(self.indices(0)).batch

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, and what the order was computed from; the same on every host."""
        return {"next_batch": self._consumed, "order": self._fingerprint()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
          ConfigError: the data or its order are not those of the saved run; going on would repeat and miss examples.
        """
        ours = self._fingerprint()
        if state["order"] != ours:
            changed = {key: (state["order"].get(key), ours[key]) for key in ours if state["order"].get(key) != ours[key]}
            raise ConfigError(f"the checkpoint's data order differs in {changed} (saved, now); start a new --workdir")
        self._consumed = int(state["next_batch"])
        self._iterator = None

    def _fingerprint(self) -> dict[str, Any]:
        data = self.config.data
        source = data.synthetic if data.source == "pages" else (data.train, data.images)
        digest = hashlib.sha256(json.dumps([data.source, str(source)]).encode()).hexdigest()[:16]
        return {
            "source": digest,
            "rows": self.examples_per_epoch,
            "seed": data.seed,
            "shuffle": data.shuffle,
            "batch_size": self.config.train.batch_size,
        }

    def __next__(self) -> Delivered:
        if self._iterator is None:
            self._iterator = iter(self._dataset(self._consumed))
        delivered = next(self._iterator)
        self._consumed += 1
        return delivered

    def close(self) -> None:
        """End the decoding, worker processes included; the next batch would start it again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _dataset(self, first: int) -> grain.IterDataset:
        """Decoding starts here, in threads of this process or in worker processes."""
        data = self.config.data
        batches = self._order[first:].map(self._make_batch)
        if data.workers == 0:
            return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch))
        inner = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        options = grain.MultiprocessingOptions(
            num_workers=data.workers, per_worker_buffer_size=max(1, data.prefetch // data.workers)
        )
        return inner.mp_prefetch(options, _live_and_die_with_the_run)


def _live_and_die_with_the_run(worker: int, workers: int) -> None:
    """A terminal and a job scheduler signal every process of a run: its workers go on, so that it can save and end them.

    They end by themselves when the run was killed; Grain's would wait for it forever.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow(run: multiprocessing.process.BaseProcess) -> None:
        run.join()
        os._exit(1)

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=follow, args=(parent,), daemon=True).start()
