"""How the processes of a run find each other, and that those which do not never train alone."""

import errno
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; it has no public name

from deepstack_jax.errors import ConfigError
from deepstack_jax.parallel.processes import join_processes
from tests.distributed.several import free_port
from tests.e2e.verb import REPOSITORY

pytestmark = pytest.mark.quick

LAUNCHERS = ("OMPI_", "PMI_", "MPI_", "SLURM_", "TPU_WORKER", "JAX_LOCAL_DEVICE_IDS")
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
OPEN_MPI_4 = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "0"}
SLURM_TASK = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
SLURM = SLURM_TASK | {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]"}


@pytest.fixture
def connected(monkeypatch):
    """Address, count, number and local device of every attempt to connect, in an environment without a launcher."""
    calls = []

    def initialize(*given, **_):
        found = ClusterEnv.auto_detect_unset_distributed_params(*given, None, 1)
        if found[0] is None:
            raise ValueError("coordinator_address should be defined.")
        calls.append(found)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    return calls


def within(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_processes_are_told_by_flags(connected):
    join_processes("10.0.0.1:8476", 4, 3)
    assert connected == [("10.0.0.1:8476", 4, 3, None)]


def test_processes_that_jax_finds(connected, monkeypatch):
    within(monkeypatch, SLURM)
    join_processes()
    within(monkeypatch, OPEN_MPI_4)
    join_processes()
    assert [found[1:] for found in connected] == [(4, 3, [1]), (2, 1, [1])]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        dict.fromkeys(OPEN_MPI, "1") | {"OMPI_COMM_WORLD_RANK": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # salloc's interactive step, in a job of four tasks
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"},  # a batch script, without srun
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
)
def test_one_process_connects_to_nobody(variables, connected, monkeypatch):
    within(monkeypatch, variables)
    join_processes()
    join_processes(count=1)
    assert connected == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (OPEN_MPI, "Open MPI started 2 processes"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"} | OPEN_MPI, "Open MPI started 2 processes"),  # mpirun in a job
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"} | MPICH, "MPICH started 2 processes"),
        (SLURM_TASK, "SLURM started 4 processes"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, "SLURM started 2 processes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES names 2 hosts, but jax sees no TPU here"),
    ],
)
def test_several_processes_never_train_alone(variables, message, connected, monkeypatch):
    within(monkeypatch, variables)
    with pytest.raises(ConfigError, match=message):
        join_processes()
    join_processes(count=1)
    assert connected == []


@pytest.mark.parametrize(
    ("variables", "found"), [(OPEN_MPI, (2, 1, [1])), (MPICH, (2, 1, [0])), (SLURM, (4, 3, [1])), (OPEN_MPI_4, (2, 1, [1]))]
)
def test_an_address_is_enough_where_a_launcher_says_the_rest(variables, found, connected, monkeypatch):
    within(monkeypatch, variables)
    join_processes("10.0.0.1:8476")
    assert connected == [("10.0.0.1:8476", *found)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, None), "give --coordinator_address and --process_id too"),
        (("a:1", None, None), "give --process_count and --process_id too, .* or the address alone under Open MPI 5 and MPICH"),
        (("a:1", 2, None), "give --process_id too"),
        (("a", 2, 0), "--coordinator_address=a is not HOST:PORT"),
        (("a:1", 2, 2), r"--process_id=2 with --process_count=2; expected 0\.\.1"),
    ],
)
def test_flags_that_do_not_go_together(given, message, connected):
    with pytest.raises(ConfigError, match=message):
        join_processes(*given)
    assert connected == []


def test_a_process_alone_stays_alone():
    """In a process of its own, on a machine where there is nothing to detect."""
    code = (
        "import jax; from deepstack_jax.parallel.processes import join_processes; join_processes(); "
        "assert not jax.distributed.is_initialized(); assert jax.process_count() == 1"
    )
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_coordinator_listens_on_the_named_address_alone():
    port = free_port()
    code = (
        f"from deepstack_jax.parallel.processes import join_processes; join_processes('127.0.0.1:{port}', 1, 0); "
        "print(open('/proc/net/tcp').read() + open('/proc/net/tcp6').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sockets = [line.split()[1:4] for line in done.stdout.splitlines() if line.strip()]
    listens = [local for local, _, state in sockets if local.endswith(f":{port:04X}") and state == "0A"]
    assert {local.split(":")[0][-8:] for local in listens} == {"0100007F"}, "127.0.0.1, be it written as IPv6; else zeros"


MINE = "10.9.8.7"


@pytest.mark.parametrize(
    ("host", "found", "bound"),
    [
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        ("[::1]", ["::1"], "[::1]"),
        ("localhost", ["127.0.0.1"], "127.0.0.1"),
        ("node0", ["127.0.1.1", MINE], MINE),
        ("node0", ["127.0.1.1"], None),
        ("balanced", ["192.0.2.9"], None),
    ],
)
def test_which_address_is_listened_on(host, found, bound, connected, monkeypatch):
    said = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **named: said.update(named))
    families = [(socket.AF_INET6 if ":" in address else socket.AF_INET, 1, 6, "", (address, 1234)) for address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: families)

    def create(place, family):
        if place[0] == "192.0.2.9":
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(socket, "create_server", create)
    if bound:
        join_processes(f"{host}:1234", 2, 0)
    else:
        with pytest.warns(UserWarning, match=f"{host} is not an address that this machine has for others"):
            join_processes(f"{host}:1234", 2, 0)
    assert said["coordinator_bind_address"] == f"{bound or '0.0.0.0'}:1234"


def test_a_port_that_is_taken_is_said_before_jax_tries(connected):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: process 0 cannot listen on port {port} .*in use"):
            join_processes(f"127.0.0.1:{port}", 2, 0)
    assert connected == []


def test_processes_of_open_mpi_5_train_together_or_not_at_all():
    """With the variables that Open MPI 5.0.11 sets, of those that say how many there are."""
    port = free_port()
    code = (
        "import sys, jax; from deepstack_jax.parallel.processes import join_processes; join_processes(*sys.argv[1:]); "
        "print(jax.process_index(), jax.process_count(), jax.device_count())"
    )

    def run(*address):
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, *address],
                env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "OMPI_VERSION": "5.0.11", "PMIX_RANK": str(rank)}
                | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in (0, 1)
        ]
        return [(*one.communicate(timeout=60), one.returncode) for one in started]

    assert [out.split() for out, _, _ in run(f"127.0.0.1:{port}")] == [["0", "2", "2"], ["1", "2", "2"]]
    for _, error, code in run():
        assert "Open MPI started 2 processes" in error
        assert code != 0


@pytest.mark.parametrize("kind", ["jax.errors.JaxRuntimeError", "ValueError"])
def test_a_collective_whose_other_end_is_gone_is_one_line(kind):
    """As jax raises it: of a program that runs, or while it dispatches one."""
    message = "UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error [127.0.0.1]:30636: Connection reset by peer"
    code = f"import jax; from deepstack_jax.parallel import processes; error = {kind}({message!r}); "
    code += "processes._leave_at_once(type(error), error, None)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: lost another process of this run (UNKNOWN: Gloo AllGather failed")
    assert done.stderr.count("\n") == 1
