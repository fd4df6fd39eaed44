"""What a source of examples is: the `Example` that every source yields, how a source says what is wrong, and its outline."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from PIL import Image

from deepstack_jax.errors import UserError
from deepstack_jax.printing import MOST, label, one_line, redacted

IMAGE_MARK = "<image>"
RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")  # FineVision's, of each turn 1 to 5


class ConversationError(ValueError):
    """A conversation that cannot become a training text or a prompt; the message names the turn."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str  # "human" or "gpt"; the first of a conversation may be "system"
    text: str


@dataclass(frozen=True)
class Example:
    """One conversation with its images, as a source gives it: nothing decoded, templated or tokenised yet."""

    index: int  # record number in its source; becomes `Batch.example_id`
    name: str  # the id the user knows (a record's "id"), for messages
    # In the order of the `<image>` placeholders: absolute paths, encoded bytes, or decoded pixels (`u8[y, x, 3]` or PIL's).
    images: tuple[str | bytes | np.ndarray | Image.Image, ...]
    messages: tuple[Message, ...]
    # What a source knows beyond that: a record's other keys ("data_source"), or "kinds", one per question-answer turn.
    info: Mapping[str, Any] = field(default_factory=dict)


class RecordMetadata(NamedTuple):
    """What can be known of a record without reading its images."""

    name: str  # as of its Example
    images: tuple[str, ...]  # relative to the image root, as the record names them but without "./"; embedded ones have none
    data_source: str  # the record's "data_source", else its "source", else its first turn's; "" where none says it
    # The worst of its turns' ratings by each of `RATINGS`, None where it has none; () where it has none at all
    ratings: tuple[float | None, ...] = ()


@runtime_checkable
class Source(Protocol):
    """Random access to examples, as Grain asks of a source."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: SupportsIndex, /) -> Example: ...


@runtime_checkable
class MetadataSource(Source, Protocol):
    """A source that can be looked over quickly, and whose images may be missing."""

    def metadata(self) -> Iterator[RecordMetadata]:
        """Of every record in order, unusable ones included, so that their numbers fit; no image is read."""
        ...

    def missing_images(self, rows: int) -> list[str]:
        """Image files that the first `rows` records name and that do not exist, each once, in order."""
        ...


@runtime_checkable
class GroupedSource(Source, Protocol):
    """A source that reads many examples at once: asked in any order, each of them would cost what all of them do."""

    def group(self, index: int, /) -> int:
        """The number of the group that example `index` is read with."""
        ...


class SourceError(UserError):
    """A data file that cannot be used; nothing of it is trained on. Its message holds no credentials of a URL."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class ExampleError(SourceError):
    """One record that cannot be used, the others can; `name` is its id, for a quarantine list."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name

    def __reduce__(self):  # the default rebuilds from `args` alone and fails on the way out of a worker process
        return type(self), (str(self), self.name)


@dataclass(frozen=True)
class BadExample:
    """An example that could not be used, and why; its place in the batch stays blank."""

    index: int
    name: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", label(self.name, MOST))
        object.__setattr__(self, "reason", one_line(self.reason))
