"""One run at a time in a workdir: two would delete each other's checkpoints."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepstack_jax.errors import UserError
from deepstack_jax.parallel.distributed import broadcast_str, is_first_host

log = logging.getLogger(__name__)

LOCK = ".lock"


class WorkdirError(UserError):
    """Another run is at work in the workdir."""


@contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Keep other runs out of an existing workdir; the end of the process, in whatever way, lets them in again.

    On several hosts the first one holds the lock, for all.

    Raises:
      WorkdirError: another run holds it; or it is a link, whose file would be overwritten.
    """
    try:
        lock = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666) if is_first_host() else -1
    except OSError as error:
        raise WorkdirError(f"cannot lock {workdir}/{LOCK}: {error.strerror}; delete it, or choose another --workdir") from error
    try:
        holder = broadcast_str(_taken_by_another(lock) if is_first_host() else "")
        if holder:
            raise WorkdirError(f"another run is at work in {workdir} ({holder}); wait for its end, or choose another --workdir")
        yield
    finally:
        if lock >= 0:
            os.close(lock)


def _taken_by_another(lock: int) -> str:
    """Who holds it, "" if this process does from now on."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(lock, 200, 0).decode(errors="replace").strip() or "it does not say who"
    except OSError as error:
        log.warning("the file system of the workdir has no locks (%s): see to it that no second run uses it", error.strerror)
        return ""
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return ""
