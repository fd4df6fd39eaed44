"""The processes of a run: found on TPU pods, SLURM and Open MPI without a flag, told by flags elsewhere, or this one alone."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from types import TracebackType

import jax

from deepstack_jax.config_checks import ConfigError

# A process that says nothing for so long is dead, and the others stop. Well within a minute, and far beyond a pause of Python.
HEARTBEAT_SECONDS = 30
# How long one that ends waits for the others, which may be stuck in a step that it will never join.
SHUTDOWN_SECONDS = 30
CONNECT_SECONDS = 300

# Number of processes, where a launcher says it: nothing has to be connected where it is 1.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
# What collectives say whose other end is gone: gloo's words, NCCL's, and those of jax's own service.
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "heartbeat timeout", "tasks are unhealthy")
_NOT_DETECTED = "coordinator_address should be defined"  # how jax says that it knows no such environment


def join_processes(address: str | None = None, count: int | None = None, number: int | None = None) -> None:
    """Connect this process with the others of its run; must come before the first use of a device.

    Without arguments jax looks for TPU pods, SLURM and Open MPI; where there is none of them, or only one process, nothing is
    connected. SIGTERM to one of several processes is from here on a notice to all: see `told_to_stop`.

    Args:
      address: HOST:PORT on which process 0 listens, the same for all.
      count: number of processes; 1 on its own keeps jax from looking.
      number: of this process, from 0.

    Raises:
      ConfigError: arguments that do not go together.
      RuntimeError: the others did not come within CONNECT_SECONDS.
    """
    if address is None and number is None and count in (None, 1):
        if count is None and not any(os.environ.get(name) == "1" for name in _COUNTS):
            _connect_if_detected()
        return
    _connect(*_checked(address, count, number))


def _leave_at_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The end of one of several processes by an exception: Python's own would first wait for the others, and they for it."""
    if isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in _LOST):
        reason = str(error).splitlines()[0]
        print(
            f"error: lost another process of this run ({reason}); its own output says why; the same command goes on from "
            "the last checkpoint",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _connect(address: str | None = None, count: int | None = None, number: int | None = None) -> None:
    jax.distributed.initialize(
        address,
        count,
        number,
        initialization_timeout=CONNECT_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    sys.excepthook = _leave_at_once


def _connect_if_detected() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Kubernetes environment detected")  # a Pod need not belong to a run of several
        try:
            _connect()
        except ValueError as error:
            if _NOT_DETECTED not in str(error):
                raise


def _checked(address: str | None, count: int | None, number: int | None) -> tuple[str, int, int]:
    given = {"--coordinator_address": address, "--process_count": count, "--process_id": number}
    missing = [flag for flag, value in given.items() if value is None]
    if address is None or count is None or number is None:
        raise ConfigError(
            f"--coordinator_address, --process_count and --process_id go together; give {' and '.join(missing)} too, or none "
            "of them on TPU pods, SLURM, Open MPI and for a single process"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator_address={address} is not HOST:PORT; e.g. --coordinator_address=10.0.0.1:8476")
    if not 0 <= number < count:
        raise ConfigError(f"--process_id={number} with --process_count={count}; expected 0..{count - 1}, each once")
    return address, count, number
