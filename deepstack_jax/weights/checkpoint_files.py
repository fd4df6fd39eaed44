"""Reading checkpoint folders: which files hold the tensors, and which tensors those are."""

import json
import os
import re
import stat
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deepstack_jax.errors import WeightsError
from deepstack_jax.families import open_clip
from deepstack_jax.families.values import present, section
from deepstack_jax.weights.stored_tensor import StoredTensor, open_safetensors
from deepstack_jax.weights.torch_pickle import open_bin

# The names of whole weights, in the order in which transformers looks for them; it reads the first that is there.
_WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(model|pytorch_model)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_PROCESSOR = "preprocessor_config.json"
_MAX_JSON = 2**25  # bytes; the index of a model of 10,000 tensors needs a million


def weight_files(folder: str | Path, named: str = "") -> list[Path]:
    """The files of a folder that hold its tensors, chosen as transformers chooses them; warns where it could be others.

    A whole file comes before an index, safetensors before .bin. Shards without an index are read where none is missing.

    Args:
      named: the file or index that config.json names as transformers_weights, which goes before all.

    Raises:
      WeightsError: the folder is not there, holds none, or lacks files that its index names.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise WeightsError(f"no folder {folder}; give a checkpoint folder (config.json and *.safetensors or *.bin)")
    there = [name for name in (named, *_WHOLE) if name and os.path.isfile(folder / name)]
    if named and (named not in there or not _inside(named) or not named.endswith((".safetensors", ".safetensors.index.json"))):
        raise WeightsError(
            f"config.json: transformers_weights is {named[:200]!r}, expected a *.safetensors or its index inside {folder}; "
            "remove the key or fetch the file"
        )
    if there:
        others = [name for name in there[1:] if name != there[0] and not _belongs(folder / there[0], folder / name)]
        if others:
            found = f"{folder} has weights in {there[0]} and by {', '.join(others)}"
            warnings.warn(f"{found}; {there[0]} is read, as transformers does: delete what is old", stacklevel=2)
        return _indexed(folder / there[0]) if there[0].endswith(".json") else [folder / there[0]]
    for kind in ("safetensors", "bin"):
        found = [file for file in sorted(folder.glob(f"*.{kind}")) if _SHARD.fullmatch(file.name)]
        if found and len(found) == int(_SHARD.fullmatch(found[0].name)[3]):  # type: ignore[index]
            return found
    seen = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    others = f" ({', '.join(seen)[:300]} are not chosen by themselves: rename those that are meant, or fetch the rest)"
    raise WeightsError(
        f"no {' and no '.join(_WHOLE[::2])} in {folder}, nor all shards of one{others if seen else ''}; give the folder with "
        "the weights beside their config.json"
    )


def _inside(name: str) -> bool:
    """Whether a name in a JSON file leads to a file of its own folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _belongs(chosen: Path, other: Path) -> bool:
    """Whether an index beside a chosen file names nothing but that file: then the two do not disagree."""
    try:
        return other.suffix == ".json" and {chosen} == set(_named_by(other))
    except WeightsError:  # it is damaged, and not needed
        return False


def _named_by(index: Path) -> list[Path]:
    names = read_model_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and _inside(name) for name in names.values()):
        raise WeightsError(f"{index} has no weight_map of tensors to files of its folder; download it again")
    return [index.parent / name for name in sorted(set(names.values()))]


def _indexed(index: Path) -> list[Path]:
    files = _named_by(index)
    missing = [file.name for file in files if not os.path.isfile(file)]  # unlike Path.is_file, says no to any name
    if missing or not files:
        raise WeightsError(f"{index} names {len(files)} files, {', '.join(missing)[:300] or 'none'} missing; download the rest")
    return files


def open_weight_files(files: Iterable[Path]) -> list[tuple[str, StoredTensor]]:
    """(name, tensor) of everything in the files, a name that two of them hold twice."""
    found: list[tuple[str, StoredTensor]] = []
    for file in files:
        opened = open_safetensors(file) if file.suffix == ".safetensors" else open_bin(file)
        found.extend(opened.items())
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def read_model_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, without the keys that are null (see `present`); WeightsError where there is none."""
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > _MAX_JSON:  # a pipe would never end, a device neither
            raise ValueError(f"no file of at most {_MAX_JSON} bytes")
        value = present(json.loads(file.read_bytes(), parse_constant=_no_number))
    except OSError as error:
        raise WeightsError(f"no readable {file}: {error.strerror}; give a checkpoint folder with its config.json") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON ({' '.join(str(error).split())[:200]}); download it again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{file} holds a {type(value).__name__}, expected an object; download it again")
    return value


def has_tower_json(folder: Path) -> bool:
    """Whether a folder says what tower it holds."""
    return any(os.path.isfile(folder / name) for name in ("config.json", open_clip.CONFIG))


def read_tower_json(folder: Path) -> dict[str, Any]:
    """config.json of a tower's folder, or OpenCLIP's where it is alone."""
    if not os.path.isfile(folder / "config.json") and os.path.isfile(folder / open_clip.CONFIG):
        return {"model_type": open_clip.MODEL_TYPE} | read_model_json(folder / open_clip.CONFIG)
    return read_model_json(folder / "config.json")


def tower_files(folder: Path) -> list[Path]:
    """The files of a tower's folder that hold its tensors."""
    if os.path.isfile(folder / "config.json"):
        return weight_files(folder)
    named = [folder / name for name in open_clip.WEIGHTS if os.path.isfile(folder / name)]
    return named[:1] or weight_files(folder)


def processor_of(folder: Path) -> Mapping[str, Any]:
    """The settings where transformers 5 finds them: `image_processor` of processor_config.json, else the older file's."""
    if (folder / "processor_config.json").exists():
        both = read_model_json(folder / "processor_config.json")
        if "image_processor" in both:
            return section(both, "image_processor")
    if not (folder / _PROCESSOR).exists() and (folder / open_clip.CONFIG).exists():
        return open_clip.clip_processor(read_model_json(folder / open_clip.CONFIG))
    return read_model_json(folder / _PROCESSOR) if (folder / _PROCESSOR).exists() else {}
