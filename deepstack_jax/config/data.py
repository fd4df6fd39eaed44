"""The keys of data and images; `schema.py` puts them into the whole."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from deepstack_jax.batch import BatchShape
from deepstack_jax.config.fields import MAY_CHANGE, SAME_EXAMPLES, OneOf, Range, Seed, positive
from deepstack_jax.layout.modes import MODES, ImageMode
from deepstack_jax.layout.sequence import MERGES, LayoutSpec

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Pixels = Annotated[int, positive()]
Spread = Annotated[float, positive()]
Filter = Literal["bicubic", "bilinear", "lanczos", "box", "nearest"]


@dataclass(frozen=True)
class ImageConfig:
    """How an image becomes crops (paper section 3.1; `data/encode/image.py`)."""

    # What an image becomes: crops of a grid; of a grid and its cells (DeepStack-HD); of a list of sizes (LLaVA-NeXT);
    # no crops: padded, cut square, or stretched
    mode: Annotated[str, OneOf(MODES)] = "deepstack"
    size: Annotated[int, positive(16_384)] = 336  # side of a crop in pixels, equal to the vision tower's input
    num_crops: Annotated[int, positive(1024)] = 4  # most cells of the crop grid
    # Which grid: the one that fits the image, or always a square (upstream's `2xsample`)
    grid: Literal["best", "square"] = "best"
    # How an image gets the grid's shape; letterbox (`anyres_unpad`) is for the crops only
    fit: Literal["stretch", "letterbox"] = "stretch"
    crop_filter: Filter = "bicubic"  # filter that resizes the crops
    global_filter: Filter = "bicubic"  # filter that resizes the global view
    pinpoints: tuple[tuple[Pixels, Pixels], ...] = ()  # anyres: sizes that an image may get, (width, height) in pixels
    merge: Annotated[str, OneOf(MERGES)] = "flat"  # anyres: how the crops' tokens follow the global view's
    mean: tuple[float, float, float] = CLIP_MEAN  # what is subtracted from pixels of 0 to 1: red, green, blue
    std: tuple[Spread, Spread, Spread] = CLIP_STD  # what they are then divided by

    @property
    def kind(self) -> ImageMode:
        """What the mode says of grids, views and tokens."""
        return MODES[self.mode]

    @property
    def newline(self) -> bool:
        """Whether the model has an `image_newline`."""
        return self.kind.newline(self.merge)


@dataclass(frozen=True)
class SyntheticConfig:
    """The demo's page generator (`data/synthetic.py`)."""

    seed: Seed = 0  # seed of the pages
    length: Annotated[int, positive()] = 1_000_000  # pages; they are drawn when asked for
    style: Literal["checker", "legible"] = "checker"  # how digits are drawn; checker is readable in high resolution only
    questions: Annotated[int, positive(16)] = 12  # questions about a page


Cells = Annotated[int, positive(64)]


@dataclass(frozen=True)
class CardsConfig:
    """The laboratory's card generator (`data/cards.py`)."""

    seed: Seed = 0  # seed of the cards
    length: Annotated[int, positive()] = 1_000_000  # cards; they are drawn when asked for
    questions: Annotated[int, positive(9)] = 9  # questions about a card
    # Crop grids (rows, cols), one of which each card has the shape of; one of the two numbers is even
    grids: tuple[tuple[Cells, Cells], ...] = ((2, 2),)
    unseen: tuple[tuple[Cells, Cells], ...] = ()  # further ones, which held-out cards alone have
    sharp: bool = True  # False: cards show no more than their low-res view does


@dataclass(frozen=True)
class PackingConfig:
    """Several examples in a row, each attending to itself alone (`data/order/packing.py`)."""

    enabled: bool = False  # False: one example in a row
    window: Annotated[int, positive(2**24)] = 256  # examples of the shuffled order that wait to be chosen from
    max_examples: Annotated[int, positive(2**16)] = 16  # G, examples that a row has room for
    # Images that a row has crop slots for, or fewer where `data.max_length` does not hold so many. An empty slot costs the
    # vision tower as much as a full one: with many text-only examples fewer are cheaper, and text fills the rest of the row.
    max_images: Annotated[int, positive(4096)] = 4


_RATING = Range(0, "0 (any) or the least rating, 1 to 5", 5)


@dataclass(frozen=True)
class SetConfig:
    """One set of a mixture (`data/order/mixture.py`): rows of a file, chosen by their image paths, data_source or ratings.

    Image paths are compared as the file writes them, from their first letter on; "<text>" stands for that of a row that
    names no image file. A `keep_images` that ends with "/" is a folder, and must be there.
    """

    file: str = ""  # relative to `data.root`; several sets may share one
    images: str = ""  # image root of the file, relative to `data.root`
    rows: Annotated[int, Range(0, "0 (unknown) or the number of rows")] = 0  # number expected; a warning says where it differs
    exact: bool = True  # False: `rows` is known in thousands only
    # Number that the paper prints; shown, nothing else
    paper: Annotated[int, Range(0, "0 (unknown) or the number of rows")] = 0
    # How often an epoch goes through the set; 0.5 = one half, the next epoch the other half
    repeat: Annotated[float, Range(0, "a number above 0; to leave the set out, remove it", above=True)] = 1.0
    keep_images: tuple[str, ...] = ()  # beginnings of image paths; empty = all rows
    drop_images: tuple[str, ...] = ()  # beginnings of image paths that are not wanted, whatever else holds
    keep_sources: tuple[str, ...] = ()  # values of the rows' "data_source", else "source", else their first turn's; empty = all
    min_relevance: Annotated[int, _RATING] = 0  # least "relevance" that the worst of a row's turns may have; 0 = any
    min_image_correspondence: Annotated[int, _RATING] = 0  # the same of FineVision's "image_correspondence"
    min_visual_dependency: Annotated[int, _RATING] = 0  # of its "visual_dependency"
    min_formatting: Annotated[int, _RATING] = 0  # of its "formatting"
    file_from: str = ""  # how to get the file, for the message that it is missing: a command in which $ROOT is `data.root`
    images_from: str = ""  # how to get the images
    licence: str = ""  # licence as published


@dataclass(frozen=True)
class LimitsConfig:
    """What a data file may ask of the memory, in bytes; more is a mistake or a bomb. Raise what data of your own exceeds."""

    text_bytes: Annotated[int, positive()] = 32 << 20  # most of a row of JSON, and of the text of a sample in a tar
    row_bytes: Annotated[int, positive()] = 256 << 20  # most of a row of a table, or of a record, with its images
    group_bytes: Annotated[int, positive()] = 1 << 30  # most of a row group of parquet, repeated text once; of packed arrow


LIMITS = LimitsConfig()
"""For a file that no configuration names."""


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they become rows."""

    # files (`data/open.py` lists the formats), or generated: the demo's pages, the laboratory's cards
    source: Literal["files", "pages", "cards"] = "files"
    root: Annotated[str, SAME_EXAMPLES] = ""  # folder that relative paths below start from
    train: str = ""  # file of training rows; where it names one, `sets` are not looked at
    sets: dict[str, SetConfig] = field(default_factory=dict)  # the mixture to train on, by name
    validation: str = ""  # held-out rows; empty = none
    images: str = ""  # image root, relative to `root`
    # Conversation template: a name, or `model`, the chat template in the tokenizer's folder; a run holds its text
    template: str = "v1"
    tokenizer: Annotated[str, SAME_EXAMPLES] = ""  # bytes | words:... | folder with tokenizer.model or tokenizer.json
    max_length: Annotated[int, positive(2**24)] = 2048  # T of the longest bucket in tokens, visual ones included
    buckets: tuple[Annotated[int, positive()], ...] = ()  # shorter lengths that a batch may be padded to, besides max_length
    # Largest image, in pixels of 4 bytes once it is decoded; the default passes phones of 108 megapixels and A3 at 600 dpi
    max_pixels: Annotated[int, Range(1, "1 to 178956970 pixels, the most that Pillow decodes", 178_956_970)] = 120_000_000
    # Images as they are stored (the published recipes), or turned upright as EXIF says
    exif: Literal["ignore", "apply"] = "ignore"
    control_tokens: Literal["text", "tokens"] = "text"  # "</s>" or "<|im_end|>" in a turn's words: text to read, or as upstream
    # What to do with a longer example: drop and count, cut text at its end, stop the run
    overlong: Literal["drop", "cut", "error"] = "drop"
    max_images: Annotated[int, positive(4096)] = 1  # images that an example may have
    shuffle: bool = True  # False: in the order of the files, as they are mixed
    seed: Seed = 0  # seed of the order
    # Processes that decode ahead
    workers: Annotated[int, Range(0, "0 (a thread of this process) or a number of processes", 4096), MAY_CHANGE] = 0
    prefetch: Annotated[int, positive(4096), MAY_CHANGE] = 4  # batches made ahead
    # Share of the examples seen that may be unusable; above it the run stops
    max_bad_fraction: Annotated[float, Range(0, "a share of the examples, 0 to 1, as 0.01", 1), MAY_CHANGE] = 0.01
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    cards: CardsConfig = field(default_factory=CardsConfig)

    @property
    def generated(self) -> SyntheticConfig | CardsConfig | None:
        """The section of a source that draws its examples; None where they come from files."""
        return {"files": None, "pages": self.synthetic, "cards": self.cards}[self.source]

    def file_of(self, split: str) -> str:
        """The file of "train" or "validation"; "" where none is named."""
        return self.train if split == "train" else self.validation


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

    @property
    def crop_slots(self) -> int:
        """C, crops that a training row has room for, global views included."""
        return self.images_per_row * self.layout.max_views

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
