"""Which examples share a row: a plan made from lengths before anything is decoded, a pure function of order, room and window.

Attention keeps the examples of a row apart by their segments, and positions restart at each, so that an example gives the same
loss wherever it is (unlike plain concatenation, where it sees its neighbour).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rich.table import Table

from deepstack_jax.config import DataSpec


class RowCapacity(NamedTuple):
    """What a row has room for."""

    tokens: int  # T
    crops: int  # C
    visual: int  # M
    examples: int  # G

    @classmethod
    def of(cls, spec: DataSpec) -> RowCapacity:
        """The room of a training row under a configuration."""
        shape = spec.batch_shape(1, spec.data.max_length)
        return cls(shape.length, shape.crops, shape.visual, shape.examples)


@dataclass(frozen=True)
class Packs:
    """The packs of an epoch by random access: pack p holds the members from starts[p] to starts[p + 1]."""

    members: np.ndarray  # i64[n], every example of the epoch once
    starts: np.ndarray  # i64[packs + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, pack: int) -> list[int]:
        return self.members[self.starts[pack] : self.starts[pack + 1]].tolist()

    def reordered(self, order: np.ndarray) -> Packs:
        """The same packs, pack order[p] in place p."""
        counts = np.diff(self.starts)[order]
        starts = np.concatenate([[0], np.cumsum(counts)])
        moved = np.repeat(self.starts[:-1][order] - starts[:-1], counts) + np.arange(len(self.members))
        return Packs(self.members[moved], starts)

    def fill(self, sizes: np.ndarray) -> np.ndarray:
        """What the packs take in all, i64[3], of sizes i32[rows, 3] (see `ExampleSize`)."""
        return sizes[self.members].sum(axis=0, dtype=np.int64)


def pack(examples: np.ndarray, sizes: np.ndarray, limits: RowCapacity, window: int) -> Packs:
    """Put examples into packs: every one into exactly one, none beyond a pack's room.

    Up to `window` examples wait. A pack begins with the one that waits longest, so that none is put off for ever. What is left
    of it goes to the longest that fits, or to two that together fill it better: examples with images have much the same
    length, and the longest first, as in first-fit decreasing, would leave gaps that nothing fits (86% of the slots useful on
    lengths like LLaVA's 665k, where pairs reach 97%). Text fills what is left where crop slots have run out.

    Args:
      examples: i64[n], records in the order of the epoch; one may come several times.
      sizes: i32[records, 3] (see `ExampleSize`). One of size 0, which cannot be used, takes a place among a pack's examples.

    Raises:
      ValueError: an example that is larger than a pack; leaving it out would go unnoticed.
    """
    wanted = sizes[examples]
    room = np.array([limits.tokens, limits.crops, limits.visual])
    if np.any(too_large := (wanted > room).any(axis=1)):
        row = int(examples[too_large.argmax()])
        raise ValueError(
            f"record {row} of the source takes {sizes[row].tolist()} tokens, crop slots and visual tokens, a pack has "
            f"{room.tolist()}; measure with the configuration that packs"
        )
    waiting = _Waiting(wanted, limits.tokens)
    members: list[int] = []
    starts = [0]
    while waiting.admit(window):
        inside = [waiting.take_oldest()]
        free = _left(room.tolist(), waiting.sizes[inside[0]])
        while len(inside) < limits.examples and (more := waiting.take_best(*free, limits.examples - len(inside))):
            for place in more:
                free = _left(free, waiting.sizes[place])
            inside += more
        members += inside
        starts.append(len(members))
    return Packs(examples[np.array(members, np.int64)], np.array(starts, np.int64))


def _left(free: list[int], taken: list[int]) -> list[int]:
    return [have - need for have, need in zip(free, taken, strict=True)]


_Kind = tuple[int, int]  # (crops, tokens) of examples that may stand for each other


class _Waiting:
    """The examples that a pack may be filled from, by their place in the epoch.

    Which lengths there are is one whole number per number of crops, with a bit for every length: so the pair of examples that
    fills a gap to the last token is one shift and one `and`.
    """

    def __init__(self, sizes: np.ndarray, longest: int) -> None:
        self.sizes: list[list[int]] = sizes.tolist()
        self._longest = longest
        self._places: dict[_Kind, deque[int]] = {}
        self._lengths: dict[int, int] = {}  # crops -> bit t is set where examples of t tokens wait
        self._mirrored: dict[int, int] = {}  # the same with bit longest - t
        self._taken = bytearray(len(sizes))
        self._next = self._oldest = self._count = 0

    def admit(self, window: int) -> bool:
        """Let in what comes next until `window` wait; whether any do."""
        while self._count < window and self._next < len(self.sizes):
            tokens, crops, _ = self.sizes[self._next]
            self._places.setdefault((crops, tokens), deque()).append(self._next)
            self._lengths[crops] = self._lengths.get(crops, 0) | 1 << tokens
            self._mirrored[crops] = self._mirrored.get(crops, 0) | 1 << (self._longest - tokens)
            self._next += 1
            self._count += 1
        return self._count > 0

    def take_oldest(self) -> int:
        while self._taken[self._oldest]:
            self._oldest += 1
        tokens, crops, _ = self.sizes[self._oldest]
        return self._take((crops, tokens))

    def take_best(self, tokens: int, crops: int, visual: int, places: int) -> list[int]:
        """What fills this room best: the longest example that fits, or two that together come closer; [] if none fits."""
        single = self._single(tokens, crops, visual)
        if single is None:
            return []
        pair = self._pair(tokens, crops, visual, single[1]) if places > 1 else None
        return [self._take(kind) for kind in pair or [single]]

    def _single(self, tokens: int, crops: int, visual: int) -> _Kind | None:
        best = None
        for need, lengths in self._lengths.items():
            fitting = lengths & ((2 << tokens) - 1) if need <= crops else 0
            while fitting:
                kind = (need, fitting.bit_length() - 1)
                if self._visual(kind) <= visual:
                    best = kind if best is None or kind[1] > best[1] else best
                    break
                fitting ^= 1 << kind[1]
        return best

    def _pair(self, tokens: int, crops: int, visual: int, above: int) -> tuple[_Kind, _Kind] | None:
        """Two examples that take most of the room, and more than `above` tokens of it."""
        least = {need: (lengths & -lengths).bit_length() - 1 for need, lengths in self._lengths.items() if lengths}
        both_fit = [(a, b) for a in least for b in least if a <= b and a + b <= crops and least[a] + least[b] <= tokens]
        for total in range(tokens, above, -1):
            for a, b in both_fit:
                if not (both := self._lengths[a] & (self._mirrored[b] >> (self._longest - total))):
                    continue
                first = both.bit_length() - 1
                one, other = (a, first), (b, total - first)
                if one == other and len(self._places[one]) < 2:
                    continue
                if self._visual(one) + self._visual(other, 1 if one == other else 0) <= visual:
                    return one, other
        return None

    def _visual(self, kind: _Kind, later: int = 0) -> int:
        """Visual tokens of the example of this kind that is taken next, or of a later one: they may differ."""
        return self.sizes[self._places[kind][later]][2]

    def _take(self, kind: _Kind) -> int:
        place = self._places[kind].popleft()
        if not self._places[kind]:
            crops, tokens = kind
            self._lengths[crops] ^= 1 << tokens
            self._mirrored[crops] ^= 1 << (self._longest - tokens)
            del self._places[kind]
        self._taken[place] = 1
        self._count -= 1
        return place


def describe_packs(packs: Packs, sizes: np.ndarray, limits: RowCapacity, rows: int, filled: float) -> Table:
    """How well an epoch's packs use what a step of `rows` rows computes, of which `filled` hold a pack on average."""
    tokens, crops, visual = packs.fill(sizes).tolist()
    examples, useful = np.diff(packs.starts), tokens / (len(packs) * limits.tokens)
    unknown = int((sizes[packs.members, 0] == 0).sum())
    shown = {
        "examples": f"{len(packs.members):,}" + (f", {unknown:,} of them unusable" if unknown else ""),
        "packs": f"{len(packs):,}",
        "examples per pack": f"{examples.mean():.2f} (1 to {examples.max()} of {limits.examples})",
        "useful token slots": f"{useful:.1%} of {limits.tokens}",
        "used crop slots": f"{crops / (len(packs) * limits.crops):.1%} of {limits.crops}",
        "used visual slots": f"{visual / (len(packs) * limits.visual):.1%} of {limits.visual}",
        "without packing": f"{tokens / (len(packs.members) * limits.tokens):.1%} useful token slots",
        "rows per step": f"{rows}, {filled:.2f} of them filled: {useful * filled / rows:.1%} useful token slots",
        "examples per step": f"{filled * examples.mean():.1f}",
    }
    table = Table(title="Packing, first epoch", title_justify="left", show_header=False)
    for name, value in shown.items():
        table.add_row(name, value)
    return table
