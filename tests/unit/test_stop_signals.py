"""What signals do once a run has nothing left to save."""

import signal
import subprocess
import sys

import pytest

from tests.e2e.verb import REPOSITORY

# A mutex that is locked twice waits within C, as jax does for a process that never comes: no signal interrupts it.
WAITING = """
import ctypes, time
from deepstack_jax.stop_signals import StopSignals

c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)

stop = StopSignals()
stop.end_on_sigterm()
c.pthread_mutex_init(mutex, None)
try:
    print("waits", flush=True)
    WAIT
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.quick
@pytest.mark.parametrize(
    ("number", "wait", "code", "told"),
    [
        (
            signal.SIGTERM,
            "c.pthread_mutex_lock(mutex), c.pthread_mutex_lock(mutex)",
            75,
            "stopped with the state saved; the same command goes on from here",
        ),
        (signal.SIGINT, "time.sleep(1000)", 0, "interrupted"),
    ],
)
def test_what_ends_a_run_whose_state_is_saved(number, wait, code, told):
    command = [sys.executable, "-c", WAITING.replace("WAIT", wait)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed) == (code, f"{told}\n")


LAST = """
import os, signal, sys
from types import SimpleNamespace
from deepstack_jax.printing import Console
from deepstack_jax.stop_signals import StopSignals
from deepstack_jax.train.run.train import exit_code
from deepstack_jax.parallel.distributed import PreemptionSync

stop = StopSignals()
os.kill(os.getpid(), signal.NUMBER)
sys.exit(exit_code(SimpleNamespace(steps=8, console=Console()), 8, stop, PreemptionSync(lambda: stop.received)))
"""


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_in_the_last_step_is_not_forgotten(number, code):
    command = [sys.executable, "-c", LAST.replace("NUMBER", number)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "stopped at step 8, state saved" in done.stdout
