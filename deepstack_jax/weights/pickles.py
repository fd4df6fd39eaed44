"""PyTorch's .bin files, read without PyTorch and without running anything that they contain.

Such a file is a zip archive: a pickle that describes tensors, and one member per storage. The unpickler here
knows tensors, storages and dictionaries, and refuses every other name; so no code in it runs.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from deepstack_jax.weights.files import StoredTensor, WeightsError, map_bytes

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class _StorageType:
    """Stands for torch.FloatStorage and its like."""

    dtype: np.dtype


@dataclass(frozen=True)
class _Storage:
    file: Path
    offset: int  # in bytes
    dtype: np.dtype
    size: int  # in elements


def open_bin(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a .bin file, by name.

    Raises:
      WeightsError: the file is of the older, unzipped kind, damaged, holds more than named tensors, or asks for code to run.
    """
    if not zipfile.is_zipfile(file):
        raise WeightsError(
            f"{file} is no zip archive (torch.save before version 1.6, or cut off) and is not read; where torch is installed: "
            f"python -c \"import torch; torch.save(torch.load('{file}', weights_only=True), '{file}')\""
        )
    try:
        with zipfile.ZipFile(file) as archive:
            described = _Unpickler(file, archive).load()
    except WeightsError:
        raise
    except Exception as error:  # a hostile or damaged pickle fails in its own ways; none of them ran foreign code
        raise WeightsError(
            f"{file} is no readable file of tensors ({type(error).__name__}: {error}); download it again"
        ) from error
    if not isinstance(described, dict) or not all(isinstance(tensor, StoredTensor) for tensor in described.values()):
        raise WeightsError(f"{file} holds more than named tensors; save model.state_dict() alone, or convert it to safetensors")
    return {str(name): tensor for name, tensor in described.items()}


class _Unpickler(pickle.Unpickler):
    """Tensors and dictionaries only. `find_class` is the one way in which a pickle can reach code."""

    def __init__(self, file: Path, archive: zipfile.ZipFile) -> None:
        names = archive.namelist()
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightsError(f"{file} is a zip archive without one data.pkl, not a file of torch.save; download it again")
        self._root = pickles[0].removesuffix("data.pkl")
        if self._root + "byteorder" in names and archive.read(self._root + "byteorder") != b"little":
            raise WeightsError(f"{file} was saved on a big-endian machine; convert it to safetensors there")
        super().__init__(archive.open(pickles[0]))
        self._file, self._archive = file, archive

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        raise WeightsError(
            f"{self._file} asks for {module}.{name}, expected tensors only; nothing of it was run: use safetensors, or save "
            "model.state_dict() alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, size = pid
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or not isinstance(size, int):
            raise ValueError(f"unknown storage {pid!r}")
        entry = self._archive.getinfo(f"{self._root}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < size * kind.dtype.itemsize:
            raise ValueError(f"storage {key} is compressed or cut off")
        with self._file.open("rb") as opened:  # the name and extra field in front of the data may differ from the directory's
            opened.seek(entry.header_offset + 26)
            name, extra = (int.from_bytes(opened.read(2), "little") for _ in range(2))
        return _Storage(self._file, entry.header_offset + 30 + name + extra, kind.dtype, size)


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> StoredTensor:
    """A view of a storage; checked here, since numpy would read beyond it."""
    numbers = (offset, *size, *stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not isinstance(storage, _Storage) or min(numbers) < 0 or (math.prod(size) and last >= storage.size):
        raise ValueError(f"a tensor of shape {size} reaches beyond its storage")

    def read() -> np.ndarray:
        if not math.prod(size):
            return np.empty(size, storage.dtype)
        flat = map_bytes(storage.file, storage.offset + offset * storage.dtype.itemsize, storage.dtype, last - offset + 1)
        return np.lib.stride_tricks.as_strided(flat, size, [n * flat.itemsize for n in stride], writeable=False)

    return StoredTensor(storage.file, storage.dtype, tuple(size), read)
