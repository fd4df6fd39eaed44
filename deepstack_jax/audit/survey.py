"""Numbers over many examples: lengths, grids, supervised tokens, and how full rows would be. No image is decoded for them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
from rich.progress import track

from deepstack_jax.audit.inputs import use_row
from deepstack_jax.config import Config
from deepstack_jax.data.encode.batch_rows import ExampleSize
from deepstack_jax.data.encode.encoder import REMARKS, Encoder
from deepstack_jax.data.encode.sizes import fit_text
from deepstack_jax.data.example import BadExample, Example, Source
from deepstack_jax.data.formats.image_files import read_header
from deepstack_jax.data.order.mixture import epoch_order
from deepstack_jax.data.order.packing import RowCapacity, pack
from deepstack_jax.layout.grid import Grid
from deepstack_jax.printing import Console


@dataclass(frozen=True)
class Measured:
    """What an example takes of a row, and what of it is learnt."""

    size: ExampleSize
    supervised: int  # tokens that the loss asks for
    grids: tuple[Grid | None, ...]  # per image
    remarks: tuple[str, ...]  # `encoder.REMARKS` that hold, one for each image or text
    origin: str  # see `origin_of`


@dataclass(frozen=True)
class Survey:
    """Many examples, measured in the order of training."""

    rows: tuple[int, ...]  # records of the source that were looked at, in order
    usable: tuple[Measured, ...]  # sizes and shares of those that a run can use
    bad: tuple[BadExample, ...]  # the others

    @property
    def sizes(self) -> np.ndarray:
        """i32[n, 3] of the usable examples (see `ExampleSize`)."""
        return np.array([one.size for one in self.usable], np.int32).reshape(-1, 3)

    @property
    def supervised_share(self) -> float:
        """Supervised tokens among all sequence positions of the usable examples, 0..1; 0 if there is none."""
        tokens = int(self.sizes[:, 0].sum())
        return sum(one.supervised for one in self.usable) / tokens if tokens else 0.0

    def grids(self) -> Counter[str]:
        """Images by the grid of their crops, "rows×cols"."""
        return Counter(grid_name(grid) for one in self.usable for grid in one.grids)

    def remarks(self) -> list[tuple[str, int]]:
        """(what was done to images or words, how many), of what was done at all."""
        counts = Counter(chain.from_iterable(one.remarks for one in self.usable))
        return [(remark, counts[remark]) for remark in REMARKS if counts[remark]]


def grid_name(grid: Grid | None) -> str:
    """ "2×3" for two rows of three crops."""
    return "no crops" if grid is None else f"{grid[0]}×{grid[1]}"


def origin_of(example: Example) -> str:
    """Its set in a mixture, else its "data_source"; "" where it has neither."""
    return str(example.info.get("set") or example.info.get("data_source") or "")


def choose_rows(source: Source, config: Config, count: int, seed: int | None) -> list[int]:
    """The first `count` rows of the training order, or with a seed, rows drawn at random from an epoch."""
    order = epoch_order(source, config.data.seed, config.data.shuffle)
    count = min(count, len(order))
    places = np.arange(count) if seed is None else np.random.default_rng(seed).choice(len(order), count, replace=False)
    return order(0, places).tolist()


def survey(source: Source, config: Config, rows: Sequence[int], console: Console) -> Survey:
    """Measure records of a source; one that cannot be used is put down with its reason and never stops the survey.

    Raises:
      SourceError: the source as a whole cannot be read.
    """
    encoder = Encoder(config.data_spec)
    shown = track(rows, "measuring examples", console=console, transient=True, disable=not console.is_terminal)
    found = [use_row(source, row, partial(measure_sample, encoder=encoder)) for row in shown]
    usable = tuple(one for one in found if isinstance(one, Measured))
    return Survey(tuple(rows), usable, tuple(one for one in found if isinstance(one, BadExample)))


def measure_sample(example: Example, encoder: Encoder) -> Measured:
    """Sizes and supervised tokens of an example, its images known by their headers; raises ValueError if it cannot be used."""
    whole = encoder.text(example)
    looks = [read_header(source, encoder.spec.data) for source in example.images]
    text, grids, size = fit_text(example, encoder, whole, [look.size_wh for look in looks])
    remarks = (*chain.from_iterable(look.remarks for look in looks), *text.remarks)
    return Measured(size, int(text.supervised[1:].sum()), tuple(grids), remarks, origin_of(example))


def padded_efficiency(sizes: np.ndarray, config: Config) -> float:
    """Share of token slots that are not padding, 0..1, with one example per row and batches padded to their bucket."""
    batch, slots = config.train.batch_size, 0
    for start in range(0, len(sizes), batch):
        part = sizes[start : start + batch, 0]
        slots += len(part) * config.data_spec.padded_length(part.max())
    return float(sizes[:, 0].sum() / slots) if slots else 0.0


def packed_efficiency(sizes: np.ndarray, config: Config) -> tuple[float, float]:
    """Share of useful token slots, 0..1, and examples per row, if packing were on and these examples were an epoch."""
    packing = replace(config.data.packing, enabled=True)
    limits = RowCapacity.of(replace(config, data=replace(config.data, packing=packing)).data_spec)
    packs = pack(np.arange(len(sizes)), sizes, limits, packing.window)
    if not len(packs):
        return 0.0, 0.0
    return float(packs.fill(sizes)[0] / (len(packs) * limits.tokens)), len(sizes) / len(packs)


def by_origin(usable: Iterable[Measured]) -> list[tuple[str, int, float, float]]:
    """(set, examples, mean tokens, supervised share) of every set, the largest first; empty where no example names one."""
    groups: dict[str, list[Measured]] = {}
    for one in usable:
        groups.setdefault(one.origin, []).append(one)
    rows = []
    for name, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        tokens, supervised = sum(one.size.tokens for one in members), sum(one.supervised for one in members)
        rows.append((name or "(none named)", len(members), tokens / len(members), supervised / tokens))
    return rows if set(groups) - {""} else []
