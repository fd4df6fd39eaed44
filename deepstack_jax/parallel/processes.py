"""The processes of a run: found on TPU pods, SLURM and Open MPI 4 without a flag, told by flags elsewhere, or one alone."""

import errno
import os
import socket
import sys
import threading
import traceback
import warnings
from ipaddress import ip_address
from types import TracebackType
from typing import NamedTuple

import jax

from deepstack_jax.errors import ConfigError
from deepstack_jax.jax_messages import KUBERNETES, is_cluster_missing, is_lost_process

# A process that says nothing for so long is dead, and the others stop. Well within a minute, and far beyond a pause of Python.
HEARTBEAT_SECONDS = 30
# How long one that ends waits for the others, which may be stuck in a step that it will never join.
SHUTDOWN_SECONDS = 30
CONNECT_SECONDS = 300
_JAX_WAITS_SECONDS = 60  # longer than we do: it then ends the process with a trace of its own C++

# Where launchers say how many processes they started, which one this is, and its number on its host. The first that speaks is
# heard: mpirun starts its processes under SLURM from tasks of srun, of which there is one per host.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MPICH", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("SLURM", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("SLURM", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)
_STEP = ("SLURM_STEP_ID", "SLURM_STEP_NODELIST")  # outside a step SLURM_NTASKS is what the job could start
_OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"  # the only sign by which jax knows Open MPI; 5 has none like it


class _Launched(NamedTuple):
    """What a launcher says of this process."""

    by: str
    processes: int
    number: int
    local: int  # number on its host


def join_processes(address: str | None = None, count: int | None = None, number: int | None = None) -> None:
    """Connect this process with the others of its run; must come before the first use of a device.

    Where they do not come within CONNECT_SECONDS, the process ends with one line that says so.

    Without arguments jax looks for TPU pods, SLURM and Open MPI 4; where there is none of them, or only one process, nothing is
    connected. An address alone is enough under a launcher that says the rest (Open MPI 5, MPICH, SLURM); the
    process then takes one GPU, by its number on its host, as jax does under SLURM, unless JAX_LOCAL_DEVICE_IDS names others.
    SIGTERM to one of several processes is from here on a notice to all: see `PreemptionSync`.

    Args:
      address: HOST:PORT on which process 0 listens, there alone if HOST is one of its own addresses; the same for all. Nothing
        in it is encrypted or asks who is there: the network must be one that only the run's own users reach.
      count: number of processes; 1 on its own keeps jax from looking.
      number: of this process, from 0.

    Raises:
      ConfigError: arguments that do not go together; the port of process 0 is taken; or the environment says that there are
        several processes, which nothing connects: each would train alone into the same workdir.
    """
    if address is None and number is None and count in (None, 1):
        if count is None:
            _connect_if_detected(_launched())
        return
    local = None
    if count is None and number is None and (launched := _launched()):
        count, number = launched.processes, launched.number
        local = None if "JAX_LOCAL_DEVICE_IDS" in os.environ else launched.local
    address, count, number = _checked(address, count, number)
    _connect(address, count, number, local, None if number else _to_bind(address))


def _launched() -> _Launched | None:
    for by, *names in _LAUNCHERS:
        said = [os.environ.get(name, "") for name in names]
        if all(word.isdigit() for word in said):
            count, number, local = map(int, said)
            if names[0] != "SLURM_NTASKS" or number > 0 or any(name in os.environ for name in _STEP):
                return _Launched(by, count, number, local)
    return None


def _leave_at_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The end of one of several processes by an exception: Python's own would first wait for the others, and they for it."""
    if is_lost_process(error):
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


def _connect(
    address: str | None = None,
    count: int | None = None,
    number: int | None = None,
    local: int | None = None,
    bind: str | None = None,
) -> None:
    too_late = threading.Timer(CONNECT_SECONDS, _end_unconnected, (address, count, number))
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            None if local is None else [local],
            coordinator_bind_address=bind,
            initialization_timeout=CONNECT_SECONDS + _JAX_WAITS_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    finally:
        too_late.cancel()
    sys.excepthook = _leave_at_once


def _end_unconnected(address: str | None, count: int | None, number: int | None) -> None:
    """The end of a process that waits for others within jax, out of reach of an exception."""
    me = "this process" if address is None else f"process {number} of {count}, coordinator {address}"
    print(
        f"error: {me}: not all processes of this run connected within {CONNECT_SECONDS} s; see the "
        "output of the others; all need the same --coordinator_address=HOST:PORT, of the host of process 0 and reachable from "
        "here, the same --process_count and each a --process_id of its own",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(1)


def _connect_if_detected(launched: _Launched | None) -> None:
    if launched and launched.processes == 1:
        return
    # Under MPICH and Open MPI 5 jax would find, on some hosts, SLURM's variables for the task that started the processes there.
    known = launched is None or launched.by == "SLURM" or _OPEN_MPI_4 in os.environ
    if known and _detected():
        return
    if launched:
        raise ConfigError(
            f"{launched.by} started {launched.processes} processes, which jax cannot connect by itself here; give all of them "
            "--coordinator_address=HOST:PORT with the host of the first, e.g. --coordinator_address=node0:8476; or "
            "--process_count=1 to train alone"
        )
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) > 1:
        raise ConfigError(
            f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts, but jax sees no TPU here; install the extra `tpu` on all of them, "
            "or give --process_count=1 to train alone"
        )


def _detected() -> bool:
    """Whether jax found the other processes by itself; they are connected then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", KUBERNETES)
        try:
            _connect()
        except ValueError as error:
            if not is_cluster_missing(error):
                raise
            return False
    return True


def _checked(address: str | None, count: int | None, number: int | None) -> tuple[str, int, int]:
    given = {"--coordinator_address": address, "--process_count": count, "--process_id": number}
    missing = [flag for flag, value in given.items() if value is None]
    if address is None or count is None or number is None:
        raise ConfigError(
            f"--coordinator_address, --process_count and --process_id go together; give {' and '.join(missing)} too, or none "
            "of them on TPU pods, SLURM, Open MPI 4 and for a single process, or the address alone under Open MPI 5 and MPICH"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator_address={address} is not HOST:PORT; e.g. --coordinator_address=10.0.0.1:8476")
    if not 0 <= number < count:
        raise ConfigError(f"--process_id={number} with --process_count={count}; expected 0..{count - 1}, each once")
    return address, count, number


def _to_bind(address: str) -> str:
    """IP:PORT that process 0 listens on: that of the host in its address alone, since whoever reaches the port joins the run.

    Raises:
      ConfigError: no such host, or the port is taken: jax may crash on a port that it does not get.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        for family, *_, place in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM):
            # A name that means this machine within itself only (127.0.1.1 in /etc/hosts) is another address for the others.
            if ip_address(place[0]).is_loopback and host not in ("localhost", place[0]):
                continue
            try:
                socket.create_server(place[:2], family=family).close()
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
            else:
                return f"[{place[0]}]:{port}" if family == socket.AF_INET6 else f"{place[0]}:{port}"
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--coordinator_address={address}: process 0 cannot listen on port {port} ({error}); choose a free one for all"
        ) from error
    warnings.warn(
        f"--coordinator_address={address}: {host} is not an address that this machine has for others, so process 0 listens on "
        "all of its own; let nobody else reach the port",
        stacklevel=2,
    )
    return f"0.0.0.0:{port}"
