"""Worker processes: what each does first, and the shared memory through which their batches come."""

import errno
import gc
import multiprocessing
import multiprocessing.process
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from deepstack_jax.config import DataConfig
from deepstack_jax.data.example import SourceError
from deepstack_jax.errors import ConfigError

SHARED_MEMORY = "/dev/shm"
_WAY_OUT = (
    "give it more (docker run --shm-size=8g; mount -o remount,size=8g /dev/shm), lower config.data.workers or "
    "config.data.prefetch, or set config.data.workers=0, which needs none"
)
_LOST = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")  # Grain's words


def ignore_signals_exit_with_parent(*_: object) -> None:
    """A terminal and a job scheduler signal every process of a run: its workers go on, so that it can save and end them.

    They end by themselves when the run was killed; without that they would wait for it forever. What Grain gives every worker
    (its number, and how many there are) is not looked at.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow(run: multiprocessing.process.BaseProcess) -> None:
        run.join()
        os._exit(1)

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=follow, args=(parent,), daemon=True).start()


_call: Callable[[Any], Any]
"""Of a worker process: what it does with every item."""


@contextmanager
def process_pool(workers: int, call: Callable[[Any], Any], lost: str) -> Iterator[Callable[[Any], Future]]:
    """Worker processes that end with the block; yields what hands an item to them, for the `call(item)` of its future.

    `call` is sent to every process once, when it starts; `lost` is what a SourceError says when one was killed.
    """
    # Spawned, not forked: the caller may have threads, and a forked copy of a locked lock stays locked.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (call,)) as pool:

        def submit(item: Any) -> Future:
            # Workers inherit the blocked signals, so that a Ctrl-C cannot hit one before it knows to ignore it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            try:
                return pool.submit(_work, item)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        try:
            yield submit
        except BrokenProcessPool as error:
            raise SourceError(lost) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(call: Callable[[Any], Any]) -> None:
    global _call
    ignore_signals_exit_with_parent()
    _call = call


def _work(item: Any) -> Any:
    return _call(item)


def check_shared_memory(data: DataConfig, batch: int) -> None:
    """Refuse more batches on their way at once than fit, of so many bytes: the kernel ends a worker that writes beyond."""
    # Each worker's queue is full where training is slower than reading, and one batch more is made; two are in use.
    needed = batch * (data.workers * (max(1, data.prefetch // data.workers) + 1) + 2) if data.workers else 0
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # a system that has it elsewhere
        return
    if needed > free:
        raise ConfigError(
            f"{SHARED_MEMORY} has {free / 1e6:,.1f} MB free; the batches of config.data.workers={data.workers} processes, of "
            f"{batch / 1e6:,.1f} MB each, take {needed / 1e6:,.1f} MB of it: {_WAY_OUT}"
        )


def free_shared_memory() -> None:
    """Give back the memory of the batches that nobody holds any more; called once, after the last one.

    Grain does it in a thread, and what is left to do when Python exits stays undone, with a warning of leaked objects. jax
    lets go of arrays that it was lent only when Python collects garbage.
    """
    from grain.multiprocessing import SharedMemoryArray  # here, since it imports jax, which workers do without

    gc.collect()
    if (deleting := SharedMemoryArray._del_thread_pool) is not None:
        deleting.apply(int)  # one thread, in order: done when everything before it is


def worker_failure(error: Exception) -> str:
    """What to say of workers that could not start or were ended from outside; "" of any other error."""
    found = _LOST.search(str(error))
    number = -int(found[1]) if found else 0
    if number == signal.SIGBUS or (isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename):
        return f"{SHARED_MEMORY}, through which worker processes hand over their batches, is full; {_WAY_OUT}"
    if number == signal.SIGKILL:
        return "a worker process was killed, perhaps for want of memory; lower config.data.workers or config.data.prefetch"
    return f"a worker process ended with exit code {-number}; its own output says why" if found else ""
