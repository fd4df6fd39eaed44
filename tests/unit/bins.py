"""Writes .bin files as torch.save does, without torch: a zip with a pickle that names torch's classes, and the raw storages."""

from __future__ import annotations

import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


class _Storage:
    def __init__(self, key: str, array: np.ndarray) -> None:
        self.key, self.array = key, array


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            kind = getattr(sys.modules["torch"], STORAGES[str(obj.array.dtype)])
            return "storage", kind, obj.key, "cpu", obj.array.size
        return None


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.parts = (storage, offset, size, stride, False, OrderedDict())

    def __reduce__(self) -> tuple:
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.parts


def fake_torch() -> dict[str, types.ModuleType]:
    """Modules that pickle finds torch's names in."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*_: Any) -> None: ...

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    return {"torch": torch, "torch._utils": utils}


def write_bin(file: Path, tensors: dict[str, np.ndarray], *, view: tuple | None = None) -> None:
    """A .bin file with the tensors; `view` = (offset, size, stride) describes each otherwise than as its whole storage."""
    storages = [_Storage(str(at), np.ascontiguousarray(tensor).ravel()) for at, tensor in enumerate(tensors.values())]
    described = OrderedDict()
    for storage, (name, tensor) in zip(storages, tensors.items(), strict=True):
        stride = tuple(int(np.prod(tensor.shape[axis + 1 :])) for axis in range(tensor.ndim))
        described[name] = _Tensor(storage, *(view or (0, tensor.shape, stride)))
    modules, text = fake_torch(), BytesIO()
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        _Pickler(text, protocol=2).dump(described)
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)
    write_archive(file, text.getvalue(), {storage.key: storage.array.tobytes() for storage in storages})


def write_archive(file: Path, pickled: bytes, storages: dict[str, bytes]) -> None:
    """The zip archive around a pickle."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
