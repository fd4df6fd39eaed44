"""Writing a checkpoint folder that the official code (or transformers) loads: tensor after tensor, and whole or not at all."""

import functools
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from huggingface_hub import constants as hub
from huggingface_hub import split_state_dict_into_shards_factory

from deepstack_jax.atomic import write_json
from deepstack_jax.config import Config, differences, to_dict
from deepstack_jax.config.chat_template import TEMPLATE_FILE, chat_source, own_template
from deepstack_jax.errors import ConfigError, WeightsError
from deepstack_jax.families.base import EMBEDDINGS, HEAD, TOWER, tower_of
from deepstack_jax.families.forms import FORMATS, from_hf, may_say, to_hf
from deepstack_jax.families.llava_hf import llava_hf_name, llava_processor_to_hf, to_llava_hf
from deepstack_jax.families.official import tower_to_hf
from deepstack_jax.families.processor import preprocessor_to_hf
from deepstack_jax.weights.export_folder import TOKENIZER_FILES, has_tokenizer, whole_export
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.stored_tensor import BEYOND_FILE, copy_into

DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@runtime_checkable
class LeafLike(Protocol):
    """A parameter: an array of jax or numpy, or a `StoredLeaf`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Out(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Written(NamedTuple):
    """What an export wrote."""

    tensors: int
    parameters: int
    nbytes: int
    files: int


def save_checkpoint(
    leaves: Mapping[str, LeafLike],
    config: Config,
    folder: str | Path,
    *,
    tokenizer_folder: str = "",
    dtype: str = "float32",
    max_shard: str = "5GB",
    form: str = "official",
    passthrough: Mapping[str, Any] | None = None,
    force: bool = False,
    sources: Iterable[str | Path] = (),
    progress: Callable[[int], None] = lambda nbytes: None,
    check: Callable[[Path], None] = lambda folder: None,
) -> Written:
    """Write config.json, the weights in safetensors, the vision tower's own folder and the tokenizer.

    Everything is written beside the folder and renamed at the end, so that there is never half a checkpoint. One tensor
    is in memory at a time beyond `leaves`.

    Args:
      leaves: parameters by "/"-joined path. folder: must not exist or be empty, or with `force` be an earlier export, to which
        nobody has added a file.
      tokenizer_folder: where the tokenizer's files are copied from; "" writes none.
      dtype: float32 | bfloat16 | float16. max_shard: most bytes of a file, e.g. "5GB".
      form: official (DeepStack, LLaVA) | llava-hf (baselines only, for transformers).
      passthrough: keys of config.json that our Config does not describe, as `StoredModel.passthrough`.
      sources: files and folders that the parameters come from, which are never replaced.
      progress: called with the bytes of every tensor written.
      check: called with the whole folder, before it takes its place; it may raise.

    Raises:
      WeightsError: the folder is not empty, the model has no such form, parameters are missing or do not fit, or a value is
        beyond the dtype's range. Nothing is left of it then.
    """
    folder, size = Path(folder).expanduser(), shard_size(max_shard)
    for value, valid, flag in ((dtype, tuple(DTYPES), "dtype"), (form, FORMATS, "format")):
        if value not in valid:
            raise WeightsError(f"--{flag} got {value!r}, expected {', '.join(valid)}")
    outs = list(_tensors(leaves, config, form))
    image_token = config.decoder.vocab_size  # the row after the vocabulary
    values = to_hf(config, passthrough, dtype) if form == "official" else to_llava_hf(config, image_token, dtype)
    try:
        with whole_export(folder, [*sources, *filter(None, [tokenizer_folder])], force=force) as scratch:
            files = write_shards(outs, scratch, dtype, size, progress)
            write_json(scratch / "config.json", values)
            if form == "official":
                _write_tower(scratch / tower_of(config).folder, outs, config, passthrough, dtype)
            else:
                write_json(scratch / "preprocessor_config.json", llava_processor_to_hf(config))
            beyond = _beyond(config, values, dtype, tokenizer_folder) if form == "official" else {}
            _warn_of_other_code(config, beyond, form)
            if beyond:
                write_json(scratch / BEYOND_FILE, beyond)
            _write_tokenizer(tokenizer_folder, config.data.template, scratch)
            check(scratch)
    except OSError as error:
        raise WeightsError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    parameters = sum(out.size for out in outs)
    return Written(len(outs), parameters, parameters * DTYPES[dtype][1].itemsize, files)


def _write_tower(folder: Path, outs: list[Out], config: Config, passthrough: Mapping[str, Any] | None, dtype: str) -> None:
    """The tower's own folder, which the official loader opens first; the layers after it stay with the model."""
    folder.mkdir()
    inside = [out._replace(name=out.name.removeprefix(TOWER)) for out in outs if out.name.startswith(TOWER)]
    write_safetensors(folder / "model.safetensors", inside, dtype, lambda nbytes: None)
    write_json(folder / "config.json", tower_to_hf(config, passthrough, dtype))
    write_json(folder / "preprocessor_config.json", preprocessor_to_hf(config))


def _warn_of_other_code(config: Config, beyond: Mapping[str, Any], form: str) -> None:
    image = config.image
    said = {f"config.{key}={value!r}" for key, value in beyond.items() if not key.startswith("data.")}
    filters = {what for what in said if what.startswith("config.image.") and "_filter=" in what}
    if form == "llava-hf" and image.kind.grids == "pinpoints" and image.crop_filter != image.global_filter:
        filters = {f"config.image.crop_filter={image.crop_filter!r}"}
    tells = f"here {BEYOND_FILE} tells" if beyond else "the form cannot say it"
    for some, what in (
        (filters, "other code resizes with another filter and will see other pixels than this model was trained on"),
        (said - filters, "the official code has no such model and will compute another one"),
    ):
        if some:
            warnings.warn(f"{', '.join(sorted(some))}: {what}; {tells}", stacklevel=3)


def _write_tokenizer(files: str, template: str, folder: Path) -> None:
    """The tokenizer's files, and the chat template of a run where they do not hold it already, as they were found."""
    _copy_tokenizer(files, folder)
    source = chat_source(template)
    if source is not None and (not _has_template(folder) or chat_source(own_template(folder)) != (source.text, "")):
        (folder / TEMPLATE_FILE).write_text(source.text, "utf-8")


def _has_template(folder: str | Path) -> bool:
    """Whether a folder holds a chat template, be it one that cannot be used."""
    try:
        return bool(own_template(folder))
    except ConfigError:
        return True


def _beyond(config: Config, values: Mapping[str, Any], dtype: str, tokenizer_folder: str) -> dict[str, Any]:
    """What of the configuration an official folder cannot say, by dotted key; the importer here reads it back."""
    told = from_hf(values, tower_to_hf(config, dtype=dtype), preprocessor_to_hf(config))
    ours = {key: pair[0] for key, pair in differences(config, to_dict(told)).items()}
    if config.data.tokenizer.startswith("words:@"):  # a path of this machine says nothing elsewhere
        words = Path(config.data.tokenizer.removeprefix("words:@")).read_text("utf-8")
        ours["data.tokenizer"] = "words:" + " ".join(words.split())
    if chat_source(config.data.template):  # which stands in a file of its own
        ours.pop("data.template", None)
    elif tokenizer_folder and _has_template(tokenizer_folder):  # or an importer would take that
        ours["data.template"] = config.data.template
    return {key: value for key, value in ours.items() if may_say(key, value)}


def shard_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or a plain number; WeightsError where it is none."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", str(text).strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise WeightsError(f"--max_shard got {text!r}, expected a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[(match[2] or "").upper()]


def _tensors(leaves: Mapping[str, LeafLike], config: Config, form: str) -> Iterator[Out]:
    """Every tensor of the export, in the order of the model, made when it is written."""
    table = NameTable(config)
    wrong = [
        f"{path}: {'missing' if path not in leaves else f'shape {tuple(leaves[path].shape)}, expected {leaf.shape}'}"
        for path, leaf in table.leaves.items()
        if path not in leaves or tuple(leaves[path].shape) != leaf.shape
    ]
    wrong += [f"{path}: unknown" for path in leaves if path not in table.leaves]
    if wrong:
        raise WeightsError(
            f"{len(wrong)} parameters do not fit the configuration: {'; '.join(wrong)}; use the run's own config"
        )

    for name, (shape, _) in table.tensors.items():
        make = functools.partial(table.theirs, name, leaves)
        if form == "official":
            yield Out(name, shape, make)
        elif name in (EMBEDDINGS, HEAD):
            yield Out(llava_hf_name(name), (shape[0] + 1, shape[1]), lambda make=make: with_image_row(make()))
        else:
            yield Out(llava_hf_name(name), shape, make)


def with_image_row(table: np.ndarray) -> np.ndarray:
    """A table of words with one more, for `<image>`: their mean, whose logit is never the largest."""
    return np.concatenate([table, table.mean(axis=0, keepdims=True, dtype=np.float64).astype(table.dtype)])


def write_shards(outs: list[Out], folder: Path, dtype: str, size: int, progress: Callable[[int], None]) -> int:
    """Write tensors into one file, or into several of at most `size` bytes with an index; returns how many."""
    named = {out.name: out for out in outs}
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda out: out.size * DTYPES[dtype][1].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=size,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, [named[name] for name in names], dtype, progress)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return len(split.filename_to_tensors)


def write_safetensors(file: Path, outs: list[Out], dtype: str, progress: Callable[[int], None]) -> None:
    """One file, one tensor in memory at a time; the library's own writer wants all of them at once."""
    code, kind = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for out in outs:
        start, end = end, end + out.size * kind.itemsize
        header[out.name] = {"dtype": code, "shape": list(out.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for out in outs:
            array = out.make()
            cast = np.empty(out.shape, kind)
            with np.errstate(over="ignore"):
                copy_into(cast, array)
            if dtype == "float16" and not np.isfinite(cast).all() and np.isfinite(array).all():
                raise WeightsError(f"{out.name} has values beyond float16's 65504; use --dtype=bfloat16 or float32")
            opened.write(cast.reshape(-1).view(np.uint8).data)
            progress(cast.nbytes)
            del array, cast  # or they would still be there beside the next one


def _copy_tokenizer(source: str, folder: Path) -> None:
    if not source:
        return
    if not has_tokenizer(Path(source).expanduser()):
        raise WeightsError(f"no tokenizer.model and no tokenizer.json in {source}; give the tokenizer's folder, or none")
    at = Path(source).expanduser().resolve()
    allowed = (at, at.parent.parent / "blobs", Path(hub.HF_HUB_CACHE).resolve())  # where the hub's links lead
    for file in (at / name for name in TOKENIZER_FILES if (at / name).is_file()):
        if not any(file.resolve().is_relative_to(place) for place in allowed):
            raise WeightsError(
                f"{file} is a link out of its folder, and what it leads to is not copied; put the file itself there"
            )
        shutil.copyfile(file, folder / file.name)
