"""From a configuration or a path to a source of examples: the container is told by the path, never guessed."""

import errno
import os
import posixpath
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial

from deepstack_jax.config import LIMITS, DataConfig, LimitsConfig
from deepstack_jax.data.cards import Cards
from deepstack_jax.data.example import MetadataSource, Source, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.file_source import FileSource, Records
from deepstack_jax.data.formats.json_records import LINE_SUFFIXES, JsonRecords
from deepstack_jax.data.formats.styles import Columns
from deepstack_jax.data.formats.tables import ArrowRecords, ParquetRecords
from deepstack_jax.data.formats.tars import TarRecords
from deepstack_jax.data.order.mixture import open_mixture
from deepstack_jax.data.shards import reader as shards
from deepstack_jax.data.synthetic import DocumentPages
from deepstack_jax.errors import ConfigError
from deepstack_jax.printing import plural

_CONTAINERS = (
    "a .json, .jsonl, .parquet, .arrow or .tar file, a pattern such as train-*.parquet, or a folder of parquet files, of "
    "datasets.save_to_disk or of `prepare`"
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(-[0-9a-f]+)?\.parquet")
_SPLIT_WORD = re.compile(r"(?:^|[-_.])(train|training|validation|valid|val|dev|test|testing|eval|evaluation)(?=[-_.])")


class MissingError(SourceError):
    """Nothing is at the path."""


def open_source(data: DataConfig, split: str) -> Source:
    """The source of the "train" or "validation" split; the training split is a mixture where the config names sets and no file.

    Raises:
      ConfigError: no file is configured, or nothing is there. SourceError: what is there cannot be read as examples.
    """
    if data.generated is not None:
        drawn = {"pages": DocumentPages, "cards": Cards}[data.source]
        return drawn(**vars(data.generated), split=split)
    name = data.file_of(split)
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
    """Stop (SourceError) before compilation if more images are missing of the first `limit` records than the run tolerates."""
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


def open_files(path: str, images: str, limits: LimitsConfig = LIMITS) -> MetadataSource:
    """The examples of a data file or folder, by random access, cheap to pickle.

    Args:
      path: local path or URL (gs://, s3://, ...) of one of
          - a LLaVA JSON array (.json) or JSON lines (.jsonl, .ndjson);
          - a .parquet, .arrow or .tar file (WebDataset), or a pattern of several (`data/train-*.parquet`);
          - a folder of parquet files, or with them in `data/`; FOLDER/SPLIT where file names tell splits apart;
          - a folder written by `datasets.save_to_disk`; FOLDER/SPLIT of a DatasetDict;
          - a folder of ArrayRecord shards with manifest.json, as `prepare` writes it.
      images: local folder or URL that image paths in the records start from; "" where all images are embedded.

    Raises:
      MissingError: nothing is there.
      SourceError: the container is damaged or incomplete, or the path fits several containers or splits; to read another
          file than was meant would not show in the loss.
    """
    path = files.absolute(path)
    try:
        opened = _open(path, limits)
    except OSError as error:
        raise SourceError(f"cannot read {error.filename or path}: {error.strerror}; check the path") from error
    if isinstance(opened, shards.ShardSource):
        return opened
    return FileSource(opened, files.absolute(images) if images else "")


def open_parquet(pattern: str, wanted: Columns, limits: LimitsConfig = LIMITS) -> ParquetRecords | None:
    """Rows of the parquet files that match a pattern, whatever they are rows of; None where none does.

    Raises:
      SourceError: as `open_files`.
    """
    parts = [part for part in files.glob(pattern) if files.is_file(part)]
    if not parts:
        return None
    _check_shards(pattern, parts)
    return ParquetRecords(pattern, parts, limits, wanted)


def _open(path: str, limits: LimitsConfig) -> Records | shards.ShardSource:
    if files.is_file(path):
        return _open_parts(path, [path], limits)
    if files.is_folder(path):
        return _open_folder(path, "", limits)
    if any(mark in path for mark in "*?["):
        if not (parts := [part for part in files.glob(path) if files.is_file(part)]):
            raise MissingError(f"no file matches {path}; check the pattern and the folder before it")
        return _open_parts(path, parts, limits)
    folder, _, split = path.rpartition("/")
    splits = _splits(folder) if folder and files.is_folder(folder) else {}
    if split in splits:
        return _open_folder(folder, split, limits)
    held, absence = f"{folder} holds the splits {', '.join(splits)}" if any(splits) else f"give {_CONTAINERS}", "does not exist"
    try:
        files.size(path)
    except (FileNotFoundError, NotADirectoryError) as error:  # may name what is there, composed otherwise
        absence = str(error.strerror).replace(os.strerror(errno.ENOENT), absence)
    raise MissingError(f"{path} {absence}; {held}")


def _open_parts(path: str, parts: Sequence[str], limits: LimitsConfig) -> Records:
    suffixes = {posixpath.splitext(part)[1].lower() for part in parts}
    if suffixes == {".parquet"}:
        _check_shards(path, parts)
        return ParquetRecords(path, parts, limits)
    if suffixes == {".arrow"}:
        return ArrowRecords(path, parts, limits)
    if suffixes == {".tar"}:
        return TarRecords(path, parts, limits)
    if len(parts) == 1 and suffixes <= {".json", *LINE_SUFFIXES}:
        return JsonRecords(path, limits)
    if len(parts) > 1:
        raise SourceError(
            f"{path} matches {len(parts)} files that are not all .parquet, all .arrow or all .tar; name one kind, or one file"
        )
    raise SourceError(f"{path} ends in {suffixes.pop()!r}, which names no format; give {_CONTAINERS}")


def _open_folder(folder: str, split: str, limits: LimitsConfig) -> Records | shards.ShardSource:
    """The one container that a folder is; `split` chooses among the splits of a folder of parquet files."""
    held = files.names(folder)
    kinds = {
        "ArrayRecord shards": shards.MANIFEST in held or any(name.endswith(shards.SUFFIX) for name in held),
        "a DatasetDict": "dataset_dict.json" in held,
        "a saved dataset": "state.json" in held,
        "parquet files": bool(_parquet_files(folder)),
    }
    found = [kind for kind, there in kinds.items() if there]
    if len(found) != 1:
        what = f"is {' and '.join(found)} at once" if found else f"holds {', '.join(held[:8]) or 'nothing'}"
        raise SourceError(f"folder {folder} {what}; give {_CONTAINERS}")
    if found == ["ArrayRecord shards"]:
        return shards.ShardSource(folder, limits)
    if found == ["a saved dataset"]:
        return _open_saved(folder, limits)
    if not (by_split := _splits(folder)):
        raise SourceError(f"{folder} lists no splits in dataset_dict.json, expected their names; write or copy it again")
    if not split and len(by_split) > 1:
        raise SourceError(
            f"{folder} holds the splits {', '.join(by_split)}; name one of them, as in {folder}/{next(iter(by_split))}"
        )
    parts = by_split[split] if split else next(iter(by_split.values()))
    return _open_folder(parts[0], "", limits) if found == ["a DatasetDict"] else _open_parts(folder, parts, limits)


def _splits(folder: str) -> dict[str, list[str]]:
    """Split -> its parquet files, or its folder in a DatasetDict; files whose names tell no split are split ""."""
    if files.is_file(files.under(folder, "dataset_dict.json")):
        names = _read_list(files.under(folder, "dataset_dict.json"), "splits")
        return {name: [files.held(folder, name)] for name in map(str, names)}
    splits: dict[str, list[str]] = {}
    for part in _parquet_files(folder):
        name = posixpath.basename(part)
        shard, word = _SHARD.fullmatch(name), _SPLIT_WORD.search(name)
        splits.setdefault(shard[1] if shard else word[1] if word else "", []).append(part)
    return splits


def _parquet_files(folder: str) -> list[str]:
    """Parquet files of a folder, else of the `data` folder in it, where the Hugging Face hub has them."""
    for place in (folder, files.under(folder, "data")):
        held = files.names(place) if place == folder or files.is_folder(place) else []
        if found := [files.under(place, name) for name in held if name.endswith(".parquet")]:
            return found
    return []


def _check_shards(path: str, parts: Sequence[str]) -> None:
    """Of files that number themselves ("-00003-of-00012"), all that `path` means must be there: a download that broke off
    would train on less.
    """
    sets: dict[tuple[str, str], set[int]] = {}
    for part in parts:
        shard = _SHARD.fullmatch(posixpath.basename(part))
        if shard and part != path:
            sets.setdefault((f"{posixpath.dirname(part)}/{shard[1]}", shard[3]), set()).add(int(shard[2]))
    is_pattern = not files.is_folder(path)
    for (stem, total), numbers in sets.items():
        lost = [f"{stem}-{number:05d}-of-{total}.parquet" for number in sorted(set(range(int(total))) - numbers)]
        if lost := [name for name in lost if not is_pattern or fnmatch(name, path)]:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise SourceError(f"{', '.join(lost[:3])}{more} missing; fetch them, or name by a pattern which files to use")


def _open_saved(folder: str, limits: LimitsConfig) -> Records:
    """The arrow files that state.json of `datasets.save_to_disk` lists, in its order."""
    state = files.under(folder, "state.json")
    entries = _read_list(state, "_data_files")
    if _read_list(state, "_indices_data_files"):
        raise SourceError(f"{folder} selects records by an index; save it again after dataset.flatten_indices()")
    names = [str(entry["filename"]) if isinstance(entry, dict) and "filename" in entry else "?" for entry in entries]
    parts = [files.held(folder, name) for name in names]
    lost = files.missing(parts)
    if lost or not names:
        raise SourceError(f"{state} lists {len(names)} files, missing: {', '.join(lost[:3]) or 'all'}; copy the folder again")
    return ArrowRecords(folder, parts, limits)


def _read_list(path: str, key: str) -> list[object]:
    """A list out of a JSON object that `datasets` wrote; empty where the key is absent or null."""
    try:
        value = files.read_json(path).get(key)
    except (ValueError, AttributeError) as error:
        raise SourceError(f"{path} is damaged ({error}); write or copy the folder again") from error
    if value is not None and not isinstance(value, list):
        raise SourceError(f"{path} has {key} {value!r:.80}, expected a list; write or copy the folder again")
    return value or []
