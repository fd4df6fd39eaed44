"""Reading checkpoint folders: which files hold the tensors, and which tensors those are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deepstack_jax.weights.files import StoredTensor, WeightsError, open_safetensors
from deepstack_jax.weights.pickles import open_bin

# What trainers leave beside a model.
_OTHER_FILES = re.compile(r"(mm_projector|training_args|optimizer|scheduler|adapter_model|non_lora_trainables)\b.*\.bin")


def weight_files(folder: str | Path) -> list[Path]:
    """The files of a folder that hold its tensors: safetensors if there are any, else .bin; those of an index if there is one.

    Raises:
      WeightsError: the folder is not there, holds none, or lacks files that its index names.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise WeightsError(f"no folder {folder}; give a checkpoint folder (config.json and *.safetensors or *.bin)")
    for index, single, pattern in (
        ("model.safetensors.index.json", "model.safetensors", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", "*.bin"),
    ):
        if (folder / index).exists():
            return _indexed(folder / index)
        if (folder / single).exists():
            return [folder / single]
        found = [file for file in sorted(folder.glob(pattern)) if not _OTHER_FILES.fullmatch(file.name)]
        if found:
            return found
    raise WeightsError(
        f"no *.safetensors and no pytorch_model*.bin in {folder}; give the folder with the weights beside their config.json"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} has no readable weight_map; download it again") from error
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise WeightsError(f"{index} names {len(files)} files, {', '.join(missing) or 'none'} missing; download the rest")
    return files


def open_files(files: Iterable[Path]) -> list[tuple[str, StoredTensor]]:
    """(name, tensor) of everything in the files, a name that two of them hold twice.

    Raises:
      WeightsError: a file cannot be read.
    """
    found: list[tuple[str, StoredTensor]] = []
    for file in files:
        opened = open_safetensors(file) if file.suffix == ".safetensors" else open_bin(file)
        found.extend(opened.items())
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      WeightsError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(file.read_text())
    except OSError as error:
        raise WeightsError(f"no readable {file}: {error.strerror}; give a checkpoint folder with its config.json") from error
    except ValueError as error:
        raise WeightsError(f"{file} is no JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{file} holds a {type(value).__name__}, expected an object; download it again")
    return value
