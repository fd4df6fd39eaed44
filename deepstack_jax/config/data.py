"""The data sections of a run's configuration; `schema.py` puts them into the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deepstack_jax.batch import BatchShape
from deepstack_jax.layout.sequence import LayoutSpec

if TYPE_CHECKING:
    from deepstack_jax.config.schema import ImageConfig


@dataclass(frozen=True)
class SyntheticConfig:
    """The demo's page generator (`data/synthetic.py`)."""

    seed: int = 0
    length: int = 1_000_000  # pages; they are drawn when asked for
    style: str = "checker"  # checker (readable in high resolution only) | legible
    questions: int = 12


@dataclass(frozen=True)
class PackingConfig:
    """Several examples in a row, each attending to itself alone (`data/order/packing.py`)."""

    enabled: bool = False
    window: int = 256  # examples of the shuffled order that wait to be chosen from
    max_examples: int = 16  # G, examples that a row has room for
    # Images that a row has crop slots for, or fewer where `data.max_length` does not hold so many. An empty slot costs the
    # vision tower as much as a full one: with many text-only examples fewer are cheaper, and text fills the rest of the row.
    max_images: int = 4


@dataclass(frozen=True)
class SetConfig:
    """One set of a mixture (`data/order/mixture.py`): rows of a file, chosen by their image paths or their data_source.

    Image paths are compared as the file writes them, from their first letter on; "<text>" stands for that of a row that
    names no image file. A `keep_images` that ends with "/" is a folder, and must be there.
    """

    file: str = ""  # relative to `data.root`; several sets may share one
    images: str = ""  # image root of the file, relative to `data.root`
    rows: int = 0  # expected; 0 = unknown
    exact: bool = True  # False: `rows` is known in thousands only
    paper: int = 0  # rows that the paper prints, where they differ from what was published; shown, nothing else
    repeat: float = 1.0  # how often an epoch goes through the set; 0.5 = one half, the next epoch the other half
    keep_images: tuple[str, ...] = ()  # beginnings of image paths; empty = all rows
    drop_images: tuple[str, ...] = ()  # beginnings of image paths that are not wanted, whatever else holds
    keep_sources: tuple[str, ...] = ()  # values of the rows' "data_source"; empty = all rows
    file_from: str = ""  # how to get the file, for the message that it is missing: a command in which $ROOT is `data.root`
    images_from: str = ""  # how to get the images
    licence: str = ""  # as published


@dataclass(frozen=True)
class LimitsConfig:
    """What a data file may ask of the memory; beyond it stands a slip or a bomb. Raise what data of your own goes beyond."""

    text_bytes: int = 32 << 20  # of a row of JSON
    row_bytes: int = 256 << 20  # of a row of a table, or of a record, with its images
    group_bytes: int = 1 << 30  # of a row group of parquet, a repeated text counted once; of a compressed arrow file


LIMITS = LimitsConfig()
"""For a file that no configuration names."""


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they become rows."""

    source: str = "files"  # files (`data/open.py` lists the formats) | pages (synthetic)
    root: str = ""  # folder that relative paths below start from
    train: str = ""  # file of training rows; where it names one, `sets` are not looked at
    sets: dict[str, SetConfig] = field(default_factory=dict)  # the mixture to train on, by name
    validation: str = ""  # held-out rows; empty = none
    images: str = ""  # image root, relative to `root`
    template: str = "v1"
    tokenizer: str = ""  # bytes | words:... | folder with tokenizer.model or tokenizer.json
    max_length: int = 2048  # T of the longest bucket, visual tokens included
    buckets: tuple[int, ...] = ()  # shorter lengths that a batch may be padded to; empty = max_length only
    max_pixels: int = 120_000_000  # of an image; passes phones of 108 megapixels and A3 at 600 dpi. Decoded, one takes 4 bytes
    exif: str = "ignore"  # ignore (images as they are stored, the published recipes) | apply (turned upright as EXIF says)
    control_tokens: str = "text"  # "</s>" or "<|im_end|>" inside a turn's words: text (to read) | tokens (as upstream)
    overlong: str = "drop"  # an example longer than that: drop (and count) | cut (text at its end) | error (stop the run)
    max_images: int = 1  # images that an example may have
    shuffle: bool = True
    seed: int = 0
    workers: int = 0  # processes that decode ahead; 0 decodes in a thread of this process
    prefetch: int = 4  # batches made ahead
    max_bad_fraction: float = 0.01  # of all examples seen; the run stops above it
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass(frozen=True)
class DataSpec:
    """All of a run's configuration that its batches depend on; made once, by `Config.data_spec`."""

    data: DataConfig
    image: ImageConfig
    layout: LayoutSpec  # where every visual token of an image goes
    vocab_size: int  # of the decoder
    batch_size: int  # examples per optimizer step, over all hosts
    accumulation: int  # micro-batches per step

    @property
    def images_per_row(self) -> int:
        """Images that a training row has room for."""
        packing, most = self.data.packing, self.data.max_images
        if not packing.enabled:
            return most
        return max(most, min(packing.max_images, self.data.max_length // self.layout.max_tokens))

    def batch_shape(self, rows: int, length: int) -> BatchShape:
        """Static sizes of a training batch of `rows` rows padded to `length`."""
        packing = self.data.packing
        return self._shape(rows, length, self.images_per_row, packing.max_examples if packing.enabled else 1)

    def padded_shape(self, rows: int, length: int) -> BatchShape:
        """The same with one example per row, as in evaluation, whether or not training packs."""
        return self._shape(rows, length, self.data.max_images, 1)

    def padded_length(self, longest: int) -> int:
        """T of a batch whose longest example has so many positions: the bucket that holds it."""
        return min((bucket for bucket in self.data.buckets if bucket >= longest), default=self.data.max_length)

    def _shape(self, rows: int, length: int, images: int, examples: int) -> BatchShape:
        layout = self.layout
        crops, visual = images * layout.max_views, images * layout.max_tokens
        return BatchShape(rows, length, crops, self.image.size, visual, layout.groups, examples)
