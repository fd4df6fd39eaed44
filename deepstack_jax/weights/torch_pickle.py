"""PyTorch's .bin files, read without PyTorch and without running anything that they contain.

Such a file is a zip archive: a pickle that describes tensors, and one member per storage. Python's own unpickler is a machine
that a file may program: it calls, sets attributes and hashes what it is told to. Here the pickle is read as data instead: its
opcodes build lists, tuples, dictionaries with names for keys, and records of what was asked for, and nothing is called.
"""

import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from deepstack_jax.errors import WeightsError
from deepstack_jax.weights.stored_tensor import StoredTensor, map_bytes

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "BoolStorage": np.dtype(np.bool_),
}
_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = {_DICT, _TENSOR, _PARAMETER, *(f"torch.{name}" for name in _STORAGES)}
_MAX_PICKLE = 2**22  # bytes; a model of 1,000 tensors needs 300,000
# Opcodes whose argument is the object itself.
_PLAIN = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"}
_PLAIN |= {"SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Global(NamedTuple):
    """A name that the pickle asks for; never looked up."""

    name: str


class _Call(NamedTuple):
    """A call that the pickle asks for; never made."""

    name: str
    arguments: tuple


class _Stored(NamedTuple):
    """What the pickle says about a storage."""

    pid: tuple


def open_bin(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a .bin file, by name.

    WeightsError where it is of the older, unzipped kind, damaged, holds more than named tensors, or asks for code to run.
    """
    if not zipfile.is_zipfile(file):
        raise WeightsError(
            f"{file} is not a zip archive (torch.save before version 1.6, or cut off) and is not read; torch can convert it: "
            f"python -c \"import torch; torch.save(torch.load('{file}', weights_only=True), '{file}')\""
        )
    try:
        with zipfile.ZipFile(file) as archive:
            root, text = _pickle_of(file, archive)
            described = _Machine(file).run(text)
            if not isinstance(described, dict) or not all(isinstance(made, _Call) for made in described.values()):
                raise WeightsError(
                    f"{file} holds more than named tensors; save model.state_dict() alone, or convert it to safetensors"
                )
            return {name: _tensor(file, archive, root, made) for name, made in described.items()}
    except WeightsError:
        raise
    except Exception as error:  # a hostile or damaged file fails in its own ways; none of them ran foreign code
        raise WeightsError(
            f"{file} is not a readable file of tensors ({type(error).__name__}: {str(error)[:200]}); download it again"
        ) from error


def _pickle_of(file: Path, archive: zipfile.ZipFile) -> tuple[str, bytes]:
    """The folder inside the archive, and its pickle."""
    names = archive.namelist()
    pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"{file} is a zip archive without one data.pkl, not a file of torch.save; download it again")
    root = pickles[0].removesuffix("data.pkl")
    if root + "byteorder" in names and _member(file, archive, root + "byteorder", 16) != b"little":
        raise WeightsError(f"{file} was saved on a big-endian machine; convert it to safetensors there")
    return root, _member(file, archive, pickles[0], _MAX_PICKLE)


def _member(file: Path, archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    start, size = _place(file, archive, name)
    if size > most:
        raise ValueError(f"{name.rpartition('/')[2]} has {size} bytes, expected at most {most}")
    return map_bytes(file, start, np.dtype(np.uint8), size).tobytes()


def _place(file: Path, archive: zipfile.ZipFile, name: str) -> tuple[int, int]:
    """Where the bytes of a member lie in the file, and how many; torch.save compresses none, so a small file stays small."""
    entry = archive.getinfo(name)
    with file.open("rb") as opened:  # the name and extra field in front of the data may differ from the directory's
        opened.seek(entry.header_offset + 26)
        name_size, extra_size = (int.from_bytes(opened.read(2), "little") for _ in range(2))
        start = entry.header_offset + 30 + name_size + extra_size
        if entry.compress_type != zipfile.ZIP_STORED or start + entry.file_size > opened.seek(0, 2):
            raise ValueError(f"{name[-80:]!r} is compressed or cut off")
    return start, entry.file_size


class _Machine:
    """Runs the opcodes of a pickle that torch.save writes; any other opcode is refused."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}

    def run(self, text: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(text):
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, code: str, argument: Any) -> None:
        push = self._stack.append
        if code in _PLAIN:
            push(argument)
        elif code in _CONSTANTS:
            push(_CONSTANTS[code])
        elif code == "MARK":
            self._marks.append(len(self._stack))
        elif code in ("EMPTY_TUPLE", "TUPLE") or code in _TUPLES:
            push(() if code == "EMPTY_TUPLE" else tuple(self._above_mark() if code == "TUPLE" else self._top(_TUPLES[code])))
        elif code in ("EMPTY_LIST", "LIST"):
            push([] if code == "EMPTY_LIST" else self._above_mark())
        elif code in ("EMPTY_DICT", "DICT"):
            items = [] if code == "EMPTY_DICT" else self._above_mark()
            push({})
            self._set(items)
        elif code in ("APPEND", "APPENDS"):
            items = self._top(1) if code == "APPEND" else self._above_mark()
            _expected(list, self._stack[-1]).extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            self._set(self._top(2) if code == "SETITEM" else self._above_mark())
        elif code in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if code == "MEMOIZE" else int(argument)] = self._stack[-1]
        elif code in ("GET", "BINGET", "LONG_BINGET"):
            push(self._memo[int(argument)])
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            push(self._named(argument.split(" ") if code == "GLOBAL" else self._top(2)))
        elif code == "BINPERSID":
            push(_Stored(_expected(tuple, *self._top(1))))
        elif code == "REDUCE":
            function, arguments = self._top(2)
            push(self._called(_expected(_Global, function).name, _expected(tuple, arguments)))
        elif code == "BUILD":  # a state_dict has an attribute, `_metadata`, that says nothing about its tensors
            self._top(1)
            _expected(dict, self._stack[-1])
        elif code not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"opcode {code} is in no file of torch.save")

    def _top(self, count: int) -> list[Any]:
        at = len(self._stack) - count
        if at < (self._marks[-1] if self._marks else 0):
            raise ValueError("the stack is too short")
        taken = self._stack[at:]
        del self._stack[at:]
        return taken

    def _above_mark(self) -> list[Any]:
        return self._top(len(self._stack) - self._marks.pop())

    def _set(self, items: list[Any]) -> None:
        """Names only for keys: to hash a tuple of tuples could take forever."""
        into = _expected(dict, self._stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _expected(str, key) in into:
                raise ValueError("a name is there twice")
            into[key] = value

    def _named(self, parts: list[Any]) -> _Global:
        name = ".".join(_expected(str, part) for part in parts)
        if name not in _ALLOWED:
            raise WeightsError(
                f"{self._file} asks for {name[:80]}, expected tensors only; nothing of it was run: use safetensors, or save "
                "model.state_dict() alone"
            )
        return _Global(name)

    def _called(self, name: str, arguments: tuple) -> Any:
        if name == _DICT and not arguments:
            return {}
        if name == _PARAMETER and arguments:
            return _expected(_Call, arguments[0])
        if name == _TENSOR:
            return _Call(name, arguments)
        raise ValueError(f"{name} is called in another way than torch.save does")


def _expected(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__.strip('_')} where a {kind.__name__.strip('_')} belongs")
    return value


def _tensor(file: Path, archive: zipfile.ZipFile, root: str, made: _Call) -> StoredTensor:
    """A view of a storage; checked here, since numpy would read beyond it."""
    storage, offset, size, stride, *rest = made.arguments
    tag, kind, key, _, count = _expected(_Stored, storage).pid
    dtype = _STORAGES.get(_expected(_Global, kind).name.removeprefix("torch."))
    numbers = [_expected(int, number) for number in (offset, count, *_expected(tuple, size), *_expected(tuple, stride))]
    unsaid = any(rest[2:])  # after whether it is trained, and hooks: that the numbers are stored negated
    if tag != "storage" or dtype is None or len(size) != len(stride) or len(size) > 8 or unsaid:
        raise ValueError("a storage or a tensor of an unknown kind")
    start, nbytes = _place(file, archive, f"{root}data/{_expected(str, key)}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    elements = math.prod(size)
    if min(numbers) < 0 or count * dtype.itemsize > nbytes or elements > count or (elements and last >= count):
        raise ValueError("a tensor reaches beyond its storage")

    def read() -> np.ndarray:
        if not elements:
            return np.empty(size, dtype)
        flat = map_bytes(file, start + offset * dtype.itemsize, dtype, last - offset + 1)
        return np.lib.stride_tricks.as_strided(flat, size, [n * flat.itemsize for n in stride], writeable=False)

    return StoredTensor(file, dtype, tuple(size), read)
