"""One run at a time in a workdir, and none that waits for a dead one."""

import errno
import fcntl
import signal
import subprocess
import sys

import pytest

from deepstack_jax.train.run.lock import WorkdirError, lock_workdir
from tests.e2e.verb import REPOSITORY

HOLDER = """
import sys, time
from pathlib import Path
from deepstack_jax.train.run.lock import lock_workdir

with lock_workdir(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(1000)
"""


def test_a_second_run_is_refused_until_the_first_one_is_dead(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "holds\n"
        said = rf"another run is at work in .* \(process {first.pid} on .*\); wait .* --workdir"
        with pytest.raises(WorkdirError, match=said), lock_workdir(tmp_path):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
    for _ in range(2):
        with lock_workdir(tmp_path):
            pass


def test_without_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock_workdir(tmp_path):
        assert "has no locks (No locks available)" in caplog.text
