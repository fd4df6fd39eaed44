"""How long the devices have nothing to do because the next batch is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from deepstack_jax.data.encode.batch_rows import HostBatch
from deepstack_jax.train.account.journal import Journal


class DataWait(contextlib.AbstractContextManager):
    """Takes batches, and counts as "data" the part of the wait in which no step was running.

    The loop is a step ahead of the devices: while it waits for a batch they may still be busy for all or a part of the wait.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._watch = ThreadPoolExecutor(1, thread_name_prefix="data-wait")

    def next(self, stream: Iterator[HostBatch], numbers: Any) -> HostBatch:
        """The next batch; `numbers` are those of the last step, on the device, None before the first."""
        began = self._journal.clock()
        idle = self._watch.submit(self._ready_at, numbers)
        delivered = next(stream)
        came = self._journal.clock()
        if idle.done():
            self._journal.count("data", max(0.0, came - max(began, idle.result())))
        return delivered

    def _ready_at(self, numbers: Any) -> float:
        jax.block_until_ready(numbers)
        return self._journal.clock()

    def __exit__(self, *_: object) -> None:
        self._watch.shutdown(wait=False)
