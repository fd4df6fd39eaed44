"""local_multiprocess.sh with real processes: their flags, the worst exit code, a death among them, signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.scripts import LAUNCH, SECONDS, Tools, background, run, wait_for

SCRIPT = "local_multiprocess.sh"
TRAINER = """
import os, signal, subprocess, sys, time
flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
me, folder = flags["process_id"], flags["workdir"]
code, seconds = (flags.get(f"{key}.{me}", default) for key, default in (("code", "0"), ("seconds", "0")))

def stop(number, frame):
    open(f"{folder}/{me}.{signal.Signals(number).name}", "a").write("x")
    if "deaf" in flags and flags["deaf"] == me:
        return
    sys.exit(130 if number == signal.SIGINT else 75)

signal.signal(signal.SIGTERM, stop)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C would be ignored"
signal.signal(signal.SIGINT, stop)
if "child" in flags:
    child = subprocess.Popen(["sleep", "600"])
    open(f"{folder}/{me}.child", "w").write(str(child.pid))
print(f"coordinator {flags['coordinator_address']} count {flags['process_count']}", flush=True)
open(f"{folder}/{me}.pid", "w").write(str(os.getpid()))
end = time.monotonic() + float(seconds)
while time.monotonic() < end:
    time.sleep(0.02)
os._exit(int(code)) if int(code) >= 0 else os.kill(os.getpid(), -int(code))
"""


@pytest.fixture
def program(tmp_path):
    """Options that start the small program above in place of train, writing into tmp_path."""
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    return f"--program={sys.executable} -S {path}"


def arguments(program, tmp_path, *flags, processes=2, grace=1):
    return (f"--processes={processes}", f"--grace-seconds={grace}", program, "--", f"--workdir={tmp_path}", *flags)


def test_every_process_gets_its_number_and_one_coordinator(program, tmp_path):
    done = run(SCRIPT, *arguments(program, tmp_path, processes=3))
    assert done.returncode == 0
    lines = sorted(done.stdout.splitlines())
    assert [line[:4] for line in lines] == ["[0] ", "[1] ", "[2] "]
    assert len({line[4:] for line in lines}) == 1
    assert lines[0].startswith("[0] coordinator 127.0.0.1:")
    assert lines[0].endswith(" count 3")


def test_train_is_started_by_default(tmp_path):
    tools = Tools(tmp_path)
    tools.add("python")
    done = run(SCRIPT, "--port=1234", "--", "--config=c.py", "--workdir=w", tools=tools)
    assert done.returncode == 0
    assert sorted(tools.calls()) == [
        "python -m deepstack_jax.train --config=c.py --workdir=w "
        f"--coordinator_address=127.0.0.1:1234 --process_count=2 --process_id={number}"
        for number in (0, 1)
    ]


def test_each_process_has_a_gpu_of_its_own(tmp_path):
    tools = Tools(tmp_path)
    tools.add("python", f'echo "${{@: -1}} $JAX_LOCAL_DEVICE_IDS" >> "{tools.log}"')
    assert run(SCRIPT, "--", "--config=c.py", "--workdir=w", tools=tools).returncode == 0
    assert {"--process_id=0 0", "--process_id=1 1"} < set(tools.calls())
    assert run(SCRIPT, "--", "--config=c.py", "--workdir=w", tools=tools, JAX_LOCAL_DEVICE_IDS="2,3").returncode == 0
    assert {"--process_id=0 2,3", "--process_id=1 2,3"} < set(tools.calls())


@pytest.mark.parametrize(
    ("codes", "worst"),
    [((0, 0), 0), ((0, 75), 75), ((75, 75), 75), ((130, 75), 130), ((75, 130), 130), ((75, 1), 1), ((3, 0), 3), ((-9, 0), 137)],
)
def test_the_worst_code_counts(codes, worst, program, tmp_path):
    flags = [f"--code.{number}={code}" for number, code in enumerate(codes)]
    assert run(SCRIPT, *arguments(program, tmp_path, *flags)).returncode == worst


def test_one_dying_stops_the_others_whose_codes_do_not_count(program, tmp_path):
    start = time.monotonic()
    flags = ("--code.1=-9", "--seconds.0=60", "--seconds.1=0.5", "--seconds.2=60")
    done = run(SCRIPT, *arguments(program, tmp_path, *flags, processes=3, grace=30))
    assert done.returncode == 137
    assert "process 1 failed with code 137; stopping the others" in done.stderr
    assert {path.name for path in tmp_path.glob("*.SIGTERM")} == {"0.SIGTERM", "2.SIGTERM"}
    assert time.monotonic() - start < 15


def test_who_does_not_stop_is_killed_with_its_children(program, tmp_path):
    flags = ("--code.1=3", "--seconds.0=60", "--seconds.1=0.5", "--deaf=0", "--child=yes")
    done = run(SCRIPT, *arguments(program, tmp_path, *flags))
    assert done.returncode == 3
    for name in ("0.pid", "0.child"):
        pid = int((tmp_path / name).read_text())
        wait_for(lambda pid=pid: not alive(pid), f"the end of {name}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_process_once(number, code, program, tmp_path):
    flags = ("--seconds.0=60", "--seconds.1=60")
    with started(arguments(program, tmp_path, *flags, grace=30)) as process:
        wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2, "both processes")
        os.killpg(process.pid, number)  # as a terminal's Ctrl-C does
        assert process.wait(timeout=SECONDS) == code
        assert process.stdout.read().count("coordinator") == 2
    assert [path.read_text() for path in sorted(tmp_path.glob(f"*.{number.name}"))] == ["x", "x"]


def test_a_signal_ends_the_deaf_after_the_grace_period(program, tmp_path):
    flags = ("--seconds.0=60", "--seconds.1=60", "--deaf=1")
    with started(arguments(program, tmp_path, *flags)) as process:
        wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2, "both processes")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=SECONDS) == 137
    assert (tmp_path / "0.SIGTERM").exists()


def started(options):
    return background(["bash", str(LAUNCH / SCRIPT), *options], dict(os.environ))


def alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()
    return state != "" and not state.startswith("Z")
