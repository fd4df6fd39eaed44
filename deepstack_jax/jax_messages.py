"""What jax, XLA, tensorstore and gloo say in words alone, where nothing else tells one of their errors from another.

All such texts are here; tests/unit/test_jax_messages.py holds each of them against the versions that are installed.
"""

import errno
import os
import re

# --- memory

_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED: *(.*)")
_HBM = re.compile(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT])")  # libtpu's, of a program that does not fit
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Too little memory on the host or a device."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_EXHAUSTED.search(str(error))))


def memory_asked(message: str) -> str:
    """What jax says of memory that it did not get, in one line; "" where it says something else."""
    found = _EXHAUSTED.search(message)
    if not found or not re.search("memory|allocat", found[1], re.IGNORECASE):  # a full disk has the same name
        return ""
    return re.sub(r"(\d{7,}) bytes", lambda number: f"{int(number[1]) / 1e9:,.1f} GB", found[1].rstrip(" ."))


def hbm_asked(message: str) -> float:
    """Bytes on each device that a program would take, as the compiler says when it refuses it; 0 = for another reason."""
    found = _HBM.search(message)
    return float(found[1]) * _UNITS[found[2]] if found and _EXHAUSTED.search(message) else 0.0


# --- processes and machines

# What collectives say whose other end is gone: gloo's words, the operating system's, NCCL's, and those of jax's own service.
LOST_PROCESS = (
    *("closed by peer", os.strerror(errno.ECONNRESET), os.strerror(errno.EPIPE)),
    *("remote process exited", "heartbeat timeout", "tasks are unhealthy"),
)
KUBERNETES = "Kubernetes environment detected"  # how a warning begins; a Pod need not belong to a run of several processes
NO_CLUSTER = "coordinator_address should be defined"


def is_lost_process(error: BaseException) -> bool:
    """Whether another process of the run is gone: a ValueError where jax met it while it dispatched."""
    return isinstance(error, RuntimeError | ValueError) and any(text in str(error) for text in LOST_PROCESS)


def is_cluster_missing(error: ValueError) -> bool:
    """Whether `jax.distributed.initialize` found no environment that it knows."""
    return NO_CLUSTER in str(error)


def unknown_option(error: BaseException) -> str:
    """The option that the compiler does not know, "" where it says something else."""
    found = re.search(r"No such compile option: '(\w+)'", str(error))
    return found[1] if found else ""


def is_unknown_topology(error: BaseException) -> bool:
    """Whether libtpu refuses the shape of a slice."""
    return "INVALID_ARGUMENT" in str(error)


def is_after_failed_save(said: BaseException | str | None) -> bool:
    """What follows a save that has failed, in which orbax has ended its event loop.

    tensorstore's error for every array, and Python's warning of those that nobody began to write.
    """
    return bool(re.fullmatch(r"Event loop is closed|coroutine 'async_serialize\S+' was never awaited", str(said)))


# --- files

# What the operating system says of a file that is missing, or something else than it was written as.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# Status codes of tensorstore and of jax that say nothing of the file.
TRANSIENT_CODES = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED", "CANCELLED", "UNKNOWN"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED"),
)
_TRANSIENT = re.compile(rf"\b(?:{'|'.join(TRANSIENT_CODES)})\b:")
_NUMBER = re.compile(r"(?:os_error_code='|\[Errno )(\d+)")
_WORDS = tuple(
    os.strerror(number)
    for number in (
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
        *(errno.EMFILE, errno.ENFILE, errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.EBUSY, errno.ENOTCONN, errno.ECONNRESET),
        *(errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPIPE),
    )
)


def is_transient(error: BaseException) -> bool:
    """Whether the error, or any that led to it, tells of memory, storage, a network or rights, and not of a file's bytes."""
    chain = [error]
    for link in chain:
        text, numbers = str(link), list[int]()
        if isinstance(link, OSError):
            if link.errno is None and not isinstance(link, FileNotFoundError | NotADirectoryError | IsADirectoryError):
                return True
            numbers += [link.errno] if link.errno is not None else []
        numbers += map(int, _NUMBER.findall(text))
        if isinstance(link, MemoryError) or any(number not in _MISSING for number in numbers):
            return True
        if not numbers and (_TRANSIENT.search(text) or any(words in text for words in _WORDS)):
            return True
        led = [link.__cause__, None if link.__suppress_context__ else link.__context__]
        led += link.exceptions if isinstance(link, BaseExceptionGroup) else ()
        chain += [earlier for earlier in led if earlier is not None and earlier not in chain]
    return False
