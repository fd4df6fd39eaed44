"""Records of a container and the folder of their images as a source of examples."""

import operator
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import SupportsIndex

from deepstack_jax.data.example import ConversationError, Example, ExampleError, RecordMetadata, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.json_records import JsonRecords
from deepstack_jax.data.formats.styles import RecordError, record_name, to_example, to_metadata
from deepstack_jax.data.formats.tables import ArrowRecords, ParquetRecords
from deepstack_jax.data.formats.tars import TarRecords
from deepstack_jax.printing import quote

Records = JsonRecords | ParquetRecords | ArrowRecords | TarRecords  # by random access, cheap to pickle


class FileSource:
    """Examples of a container, by random access.

    An image that a record names is a path in `Example.images`, not opened; under a root that is a URL it is fetched and comes
    as its encoded bytes, since what decodes images knows no network.

    Args:
      image_root: absolute folder or URL that image paths start from, else a SourceError; "" = every image is embedded.
    """

    def __init__(self, rows: Records, image_root: str) -> None:
        self.rows, self.image_root = rows, image_root
        try:
            # A web server need not list its folders: there, missing images show when they are looked for.
            known = not image_root or image_root.startswith(("http://", "https://")) or files.is_folder(image_root)
        except OSError as error:
            message = f"cannot reach image root {image_root}: {error.strerror}; check the URL and your access"
            raise SourceError(message) from error
        if not known:
            raise SourceError(f"image root {image_root} is not a folder; give the folder that the image paths start from")

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:  # Grain compares this text when it restores an iterator: no address, no machine's folder
        return f"{type(self.rows).__name__}({self.rows.path.rstrip('/').split('/')[-1]!r}, records={len(self)})"

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Record `index`.

        Raises:
          ExampleError: it is not a usable conversation. SourceError: the container changed or vanished since it was opened.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} is outside 0..{len(self) - 1} of {self.rows.path}")
        row: object = None
        try:
            row = self.rows.read(index)
            example = to_example(row, index, self.image_root)
            return replace(example, images=tuple(map(_fetched, example.images))) if files.is_url(self.image_root) else example
        except (RecordError, ConversationError) as error:
            name = record_name(row, index)
            raise ExampleError(f"{self.rows.place(index)} (id {quote(name)}): {error}", name) from error.__cause__

    def group(self, index: int) -> int:
        """The row group of a record of parquet, which is decoded as a whole; 0 of all others."""
        return self.rows.group(index) if isinstance(self.rows, ParquetRecords) else 0

    def metadata(self) -> Iterator[RecordMetadata]:
        """Name, image paths and data_source of every record, in one pass; SourceError where the container is lost."""
        try:
            for index, row in enumerate(self.rows.scan()):
                yield to_metadata(row, index)
        except OSError as error:
            message = f"cannot read {self.rows.path} any more: {error.strerror}; put it back and start again"
            raise SourceError(message) from error

    def missing_images(self, rows: int) -> list[str]:
        """Image files named by the first `rows` records that do not exist, each once, in order; none is opened."""
        wanted: dict[str, None] = {}
        for outline in islice(self.metadata(), rows):
            wanted.update((files.under(self.image_root, name), None) for name in outline.images if self.image_root)
        return files.missing(wanted)


def _fetched(image: object) -> object:
    if not isinstance(image, str):
        return image
    try:
        return files.read_bytes(image)
    except OSError as error:
        raise RecordError(f"cannot read image {image}: {error.strerror}; put it there or remove the record") from error
