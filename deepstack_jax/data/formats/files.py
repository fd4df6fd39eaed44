"""Files by path or URL. Local ones go through the operating system, others (gs://, s3://, memory://) through fsspec, by ranges.

Whatever goes wrong, here or in a backend of fsspec, is an OSError whose `strerror` is one line to show. Only files are read: a
FIFO, a device or a socket where one is expected is refused, since reading it might never end.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import posixpath
import re
import stat
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import glob as local_glob
from typing import IO, Any

from fsspec.core import url_to_fs

from deepstack_jax.atomic import whole_file

BUFFER_BYTES = 8 << 20  # what a stream over the network asks for at once
MAX_JSON_BYTES = 256 << 20  # of a JSON file that is read as a whole: a manifest, a state
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LOCAL = "file://"
_THREADS = 16  # requests under way at once; latency dominates, not bandwidth


def is_url(path: str) -> bool:
    """Whether the path names something that only fsspec can reach; "file://" does not."""
    return _URL.match(path) is not None and not path.startswith(_LOCAL)


def absolute(path: str | os.PathLike[str]) -> str:
    """An absolute local path, `~` expanded, or the URL without a slash at its end."""
    path = os.fspath(path)
    if is_url(path):
        return path.rstrip("/") if not path.endswith("://") else path
    return os.path.abspath(os.path.expanduser(path.removeprefix(_LOCAL)))


def under(root: str, name: str) -> str:
    """The relative path `name` below an absolute `root`, to the letter: nothing in `name` is expanded."""
    return f"{root}/{name}" if is_url(root) else os.path.join(root, name)


def join(root: str, name: str) -> str:
    """`name` as a user means it, starting from `root`; either may be a URL, and an absolute path or a URL stands for itself."""
    if not name or is_url(name) or name.startswith((_LOCAL, "~", "/")):
        return absolute(name or root)
    return absolute(under(absolute(root), posixpath.normpath(name)))


def held(folder: str, name: str) -> str:
    """The path of what a file of a folder says to be in the folder by `name`.

    OSError where that is no plain name, or a link that leads out: whoever wrote the folder would choose what is read here.
    """
    path = under(folder, name)
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0", "::", "?", "#")):
        raise OSError(errno.EINVAL, f"it names {name!r:.80}, expected what is in the folder; write or copy it again", path)
    if not is_url(path):
        # A snapshot in the hub's cache holds links alone, to the files beside all snapshots.
        place = os.path.realpath(folder).split("/snapshots/")[0]
        if not os.path.realpath(path).startswith(f"{place}/"):
            raise OSError(errno.EINVAL, f"{name!r:.80} is a link that leaves the folder; put the file itself there", path)
    return path


def size(path: str) -> int:
    """Bytes of a file."""
    if not is_url(path):
        return _checked(path).st_size
    if (length := _remote("size", path)) is None:
        raise OSError(errno.EIO, "its size is unknown there, so it cannot be read by ranges", path)
    return int(length)


def is_file(path: str) -> bool:
    """Whether a file is there."""
    return _remote("isfile", path) if is_url(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Whether a folder is there; object stores have one wherever a name continues after the slash."""
    return _remote("isdir", path) if is_url(path) else os.path.isdir(path)


def names(folder: str) -> list[str]:
    """Names of what lies in a folder, sorted."""
    if not is_url(folder):
        return sorted(os.listdir(folder))
    return sorted({posixpath.basename(str(path).rstrip("/")) for path in _remote("ls", folder, detail=False)})


def glob(pattern: str) -> list[str]:
    """Paths or URLs of the files that match, sorted."""
    if not is_url(pattern):
        return sorted(local_glob(pattern))
    with _backend(pattern) as (system, inner):
        return sorted(system.unstrip_protocol(str(path)) for path in system.glob(inner))


def read_bytes(path: str, most: int | None = None) -> bytes:
    """All of a file; OSError (EFBIG) where it has more than `most` bytes."""
    if most is not None and size(path) > most:
        raise OSError(errno.EFBIG, f"it has {size(path):,} bytes, more than the {most:,} allowed", path)
    if is_url(path):
        return _remote("cat_file", path)
    with open_binary(path) as file:
        return file.read()


def read_json(path: str) -> Any:
    """What a JSON file says; ValueError where it is none, whatever is wrong with it."""
    try:
        return json.loads(read_bytes(path, MAX_JSON_BYTES))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_range(path: str, start: int, length: int, whole: int) -> bytes:
    """`length` bytes from `start` on of a file that had `whole` bytes when it was opened; OSError where it has no longer."""
    if is_url(path):
        data = _remote("cat_file", path, start=start, end=start + length)
    else:
        _checked(path)
        with open(path, "rb", buffering=0) as file:
            now = os.fstat(file.fileno()).st_size
            if now != whole:
                raise OSError(errno.ESTALE, f"it changed while in use ({now} bytes, {whole} when opened)", path)
            file.seek(start)
            data = file.read(length)
    if len(data) != length:
        raise OSError(errno.EIO, f"got {len(data)} bytes for a range of {length}", path)
    return data


def open_binary(path: str, buffer: int = BUFFER_BYTES) -> IO[bytes]:
    """A seekable file to read from; of a remote one `buffer` bytes are fetched at once."""
    if not is_url(path):
        _checked(path)
        return open(path, "rb")
    return io.BufferedReader(_RemoteFile(path), buffer)


def missing(paths: Iterable[str]) -> list[str]:
    """Those of `paths` where no file is, in their order."""
    paths = list(paths)
    return [path for path, found in zip(paths, in_parallel(is_file, paths), strict=True) if not found]


def in_parallel(function: Any, paths: Iterable[str]) -> list[Any]:
    """`function` of every path, in their order; several at once where the network answers."""
    paths = list(paths)
    if not any(map(is_url, paths)):
        return list(map(function, paths))
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, paths))


def cache_folder() -> str:
    """Where copies of remote files are kept: DEEPSTACK_CACHE, or ~/.cache/deepstack_jax."""
    return absolute(os.environ.get("DEEPSTACK_CACHE") or "~/.cache/deepstack_jax")


def local_copy(path: str) -> str:
    """A local path with the content of `path`: itself, or a copy in the cache, fetched once per version of the remote file.

    For formats whose readers need a file of the operating system. The copy appears when it is whole.
    """
    if not is_url(path):
        return path
    with _backend(path) as (system, inner):
        version = hashlib.sha256(f"{path} {system.ukey(inner)}".encode()).hexdigest()[:24]
        folder = os.path.join(cache_folder(), "copies", version)
        copy = os.path.join(folder, posixpath.basename(path.partition("?")[0]))  # a query may hold a key
        if not os.path.isfile(copy):
            os.makedirs(folder, exist_ok=True)
            with whole_file(copy) as partial:
                system.get_file(inner, partial.name)
    return copy


def _checked(path: str) -> os.stat_result:
    """What the system knows of a local file; OSError where there is none, or something that is not a file."""
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        other = "" if path.isascii() else _otherwise_composed(path)
        if other:
            reason = f"{error.strerror}, but {other!a} is: the same letters composed otherwise (NFC, NFD); rename one"
            raise FileNotFoundError(error.errno, reason, path) from error
        raise
    except ValueError as error:  # a null byte, half a surrogate
        raise OSError(errno.EINVAL, f"no name of a file ({_one_line(error)})", ascii(path)) from error
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a FIFO, a socket or a device, expected a file", path)
    return found


def named_files(path: str) -> tuple[Any, list[str]]:
    """A file system of fsspec and the files in it that `path` names: a file, a folder, a pattern, or one split of a folder."""
    system, inner = url_to_fs(path)
    if any(mark in path for mark in "*?["):
        found = system.glob(inner)
    else:
        found = system.find(inner if system.exists(inner) else posixpath.dirname(inner), maxdepth=2)
    return system, sorted(map(str, found)) or [inner]


def _otherwise_composed(path: str) -> str:
    """The name in the last folder of `path` that exists, which reads like the one missing there; "" if there is none."""
    folder, name = os.path.split(path)
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    with contextlib.suppress(OSError):
        wanted = unicodedata.normalize("NFC", name)
        return next((held for held in os.listdir(folder or ".") if unicodedata.normalize("NFC", held) == wanted), "")
    return ""


class ProcessCache(OrderedDict[int, Any]):
    """What a process keeps open or decoded, with a lock; it does not travel to another process."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        return ProcessCache, ()


class _RemoteFile(io.RawIOBase):
    """A remote file as ranges, one request per read."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path, self._size, self._at = path, size(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        if length := min(len(buffer), max(0, self._size - self._at)):
            buffer[:length] = read_range(self._path, self._at, length, self._size)
            self._at += length
        return length


@contextlib.contextmanager
def _backend(path: str) -> Iterator[tuple[Any, str]]:
    """The fsspec file system of a URL and the name inside it; errors of any kind leave as OSError with a reason."""
    try:
        yield url_to_fs(path)
    except OSError as error:
        if error.strerror:
            raise
        kinds = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, IsADirectoryError: errno.EISDIR}
        number = kinds.get(type(error))
        raise OSError(number or errno.EIO, os.strerror(number) if number else _one_line(error), path) from error
    except ImportError as error:  # fsspec says which package is missing
        reason = f"{_one_line(error)} (for gs:// in a clone of the repository: pip install '.[gcs]')"
        raise OSError(errno.EPROTONOSUPPORT, reason, path) from error
    except Exception as error:  # every backend raises kinds of its own
        raise OSError(errno.EIO, _one_line(error), path) from error


def _remote(method: str, path: str, **options: Any) -> Any:
    with _backend(path) as (system, inner):
        return getattr(system, method)(inner, **options)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
