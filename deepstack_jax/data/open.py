"""The source that a configuration names: a file or folder, a mixture of several, or drawn pages."""

from functools import partial

from deepstack_jax.config import DataConfig
from deepstack_jax.data.containers import MissingError, open_files
from deepstack_jax.data.example import MetadataSource, Source, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.order.mixture import open_mixture
from deepstack_jax.data.synthetic import DocumentPages
from deepstack_jax.errors import ConfigError
from deepstack_jax.printing import plural


def open_source(data: DataConfig, split: str) -> Source:
    """The source of the "train" or "validation" split; the training split is a mixture where the config names sets and no file.

    Raises:
      ConfigError: no file is configured, or nothing is there; the message names the flag that points to it.
      SourceError: what is there cannot be read as examples.
    """
    if data.source == "pages":
        pages = data.synthetic
        return DocumentPages(pages.seed, pages.length, pages.style, pages.questions, split)
    name = data.train if split == "train" else data.validation
    if split == "train" and data.sets and not name:
        return open_mixture(data.sets, data.root, partial(open_files, limits=data.limits))
    if not name:
        raise ConfigError(f"config.data.{split} is empty: name the data file or folder with --config.data.{split}=PATH")
    try:
        return open_files(files.join(data.root, name), files.join(data.root, data.images), data.limits)
    except MissingError as error:
        flags = f"--config.data.root=DIR --config.data.{split}=PATH"
        raise ConfigError(f"{split} data: {error}; point to it with {flags}") from error


def check_images(source: Source, data: DataConfig, limit: int = 1000) -> None:
    """Stop before compilation if more images are missing than the run would tolerate; looks at the first `limit` records.

    Raises:
      SourceError: with the first missing path and the flag that points to the image root.
    """
    if not isinstance(source, MetadataSource):
        return
    missing = source.missing_images(limit)
    if len(missing) > data.max_bad_fraction * min(limit, len(source)):
        try:
            why = f"{files.size(missing[0])} bytes by now"
        except OSError as error:
            why = error.strerror or str(error)
        raise SourceError(
            f"{plural(len(missing), 'image')} missing among the first {plural(min(limit, len(source)), 'record')}, e.g. "
            f"{missing[0]} ({why}); "
            "point to the image root with --config.data.root=DIR and --config.data.images=FOLDER, "
            f"or allow more than config.data.max_bad_fraction={data.max_bad_fraction}"
        )
