"""Which records of the source make up which global batch, padded or packed: pure functions of the batch's number.

A batch is the same for every number of hosts and workers: they only divide it. Epochs follow each other without a seam, and
within one no place of the order is taken twice or left out.
"""

import hashlib
import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from deepstack_jax.data.order.mixture import EpochOrder
from deepstack_jax.data.order.packing import Packs, RowCapacity, describe_packs, pack
from deepstack_jax.errors import ConfigError

TOLERANCE = Fraction(2, 100)  # how far examples per step may be from the recipe's batch size
_KEPT_EPOCHS = 2


class BatchPlan(NamedTuple):
    """What a global batch is made of."""

    rows: list[list[int]]  # per row of the batch, records of the source; [] = a blank row
    longest: int | None  # sequence positions of the longest, where that is known beforehand


class PaddedBatches:
    """One example per row.

    `sizes` i32[records of the source, 3] (see `ExampleSize`) where hosts must agree on the length of a batch, else None.
    """

    def __init__(self, order: EpochOrder, batch_size: int, sizes: np.ndarray | None = None) -> None:
        self.rows, self._order, self._sizes = batch_size, order, sizes

    def step(self, number: int) -> BatchPlan:
        """Batch `number`, of an order that has no end."""
        epochs, places = np.divmod(np.arange(number * self.rows, (number + 1) * self.rows), len(self._order))
        chosen = np.concatenate([self._order(int(epoch), places[epochs == epoch]) for epoch in np.unique(epochs)])
        longest = None if self._sizes is None else int(self._sizes[chosen, 0].max())
        return BatchPlan([[int(row)] for row in chosen], longest)

    def steps(self, epochs: float) -> int:
        """Batches that go through the data so often, at least 1."""
        return max(1, round(epochs * len(self._order) / self.rows))

    def place(self, number: int) -> dict[str, int]:
        """Where batch `number` begins, for a checkpoint."""
        return {"next_batch": number}

    def resume(self, place: dict[str, int]) -> int:
        """The number of the batch that begins at a place; what comes before the place is not given out again."""
        return int(place["next_batch"])

    def order(self) -> dict[str, Any]:
        """What the order depends on beyond the source and the shuffle."""
        return {"batch_size": self.rows}


def packed_rows(wanted: Fraction, divisor: int) -> tuple[int, Fraction]:
    """(rows of a step, how many of them are filled on average) for a recipe that makes `wanted` packs a step.

    The nearest multiple of `divisor` where it is near enough to the recipe, else the next larger one, some rows blank.
    """
    nearest = max(1, round(wanted / divisor)) * divisor
    if abs(nearest - wanted) <= TOLERANCE * wanted:
        return nearest, Fraction(nearest)
    return math.ceil(wanted / divisor) * divisor, wanted


class PackedBatches:
    """Several examples per row, as many rows per step as make the recipe's number of examples.

    Batch n holds the packs from floor(n * filled) on, of all epochs' packs counted through; see `packed_rows`. ConfigError
    where a single pack holds more examples than a step should have.

    Args:
      sizes: i32[records of the source, 3] (see `ExampleSize`). limits, window: see `pack`.
      batch_size: examples per step, on average.
      divisor: rows of a step are a multiple of it, so that devices, hosts and micro-batches divide them.
    """

    def __init__(
        self, order: EpochOrder, sizes: np.ndarray, limits: RowCapacity, window: int, batch_size: int, divisor: int = 1
    ) -> None:
        self._order, self._sizes, self._limits, self._window = order, sizes, limits, window
        self._kept: dict[int, Packs] = {}
        self._counts: dict[int, int] = {}  # packs of the epochs planned so far
        self._first = 0  # packs before it were given out before the run was resumed
        wanted = Fraction(batch_size * len(self.epoch(0)), len(order))
        if wanted < 1:
            raise ConfigError(
                f"config.train.batch_size {batch_size} is less than the {float(batch_size / wanted):.1f} examples of a packed "
                f"row; raise it to {math.ceil(batch_size / wanted)} or more, or set config.data.packing.enabled=False"
            )
        self.rows, self.filled = packed_rows(wanted, divisor)

    def epoch(self, number: int) -> Packs:
        """The packs of an epoch in the order of training; kept for the newest epochs."""
        packs = self._kept.get(number)
        if packs is None:
            packs = pack(self._order(number, np.arange(len(self._order))), self._sizes, self._limits, self._window)
            if self._order.shuffle:  # else the last packs, which had little to choose from, would come together
                keys = np.random.PCG64((self._order.seed, number)).random_raw(len(packs))
                packs = packs.reordered(np.argsort(keys, kind="stable"))
            near = {known: kept for known, kept in self._kept.items() if abs(known - number) < _KEPT_EPOCHS}
            self._kept = near | {number: packs}  # replaced whole: a batch may be asked for while a thread decodes others
            self._counts[number] = len(packs)
        return packs

    def step(self, number: int) -> BatchPlan:
        start, end = (math.floor(at * self.filled) for at in (number, number + 1))
        if start < self._first < end:  # a run that goes on with another number of rows per step
            start = self._first
        rows = [self._pack(place) for place in range(start, end)]
        return BatchPlan(rows + [[]] * (self.rows - len(rows)), self._limits.tokens)

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * len(self.epoch(0)) / self.filled))

    def place(self, number: int) -> dict[str, int]:
        return {"next_pack": max(math.floor(number * self.filled), self._first)}

    def resume(self, place: dict[str, int]) -> int:
        self._first = int(place["next_pack"])
        return math.ceil((self._first + 1) / self.filled) - 1

    def order(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._sizes.tobytes()).hexdigest()[:16]
        return {"packing": {"sizes": digest, "limits": list(self._limits), "window": self._window}}

    def describe(self) -> Table:
        """How well rows and steps are used."""
        return describe_packs(self.epoch(0), self._sizes, self._limits, self.rows, float(self.filled))

    def _pack(self, place: int) -> list[int]:
        """The pack at a place of all epochs' packs counted through."""
        epoch = 0
        while place >= (count := self._counts.get(epoch) or len(self.epoch(epoch))):
            epoch, place = epoch + 1, place - count
        return self.epoch(epoch)[place]
