"""Runs that are spread over several real processes of this machine, connected by jax.distributed and gloo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.e2e.verb import ENVIRONMENT, REPOSITORY, TIMEOUT, command


class Several:
    """The processes of one run.

    Args:
      line: what every process runs, without the flags that connect them.
      count: of processes.
      folder: for what each prints.
      devices: that each process has.
    """

    def __init__(self, line: Sequence[str], count: int, folder: Path, devices: int = 1) -> None:
        folder.mkdir(exist_ok=True)
        self._printed = [folder / f"{number}.out" for number in range(count)]
        simulated = f"{ENVIRONMENT['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        flags = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--process_count={count}"]
        self._processes = [
            subprocess.Popen(
                [*line, *flags, f"--process_id={number}"],
                cwd=REPOSITORY,
                env=ENVIRONMENT | {"XLA_FLAGS": simulated, "NPROC": str(2 * devices)},
                stdout=printed.open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for number, printed in enumerate(self._printed)
        ]

    def printed(self, number: int) -> str:
        return self._printed[number].read_text()

    def wait_for(self, text: str) -> None:
        """Until the first process has printed it."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.printed(0):
            ended = [process.poll() for process in self._processes]
            if any(code is not None for code in ended) or time.monotonic() > deadline:
                raise AssertionError(f"the run ended ({ended}) without printing {text!r}:\n{self.printed(0)}")
            time.sleep(0.01)

    def send(self, number: int, what: signal.Signals) -> None:
        os.kill(self._processes[number].pid, what)

    def codes(self, seconds: float = TIMEOUT, but: Sequence[int] = ()) -> list[int | None]:
        """Exit codes once all have ended, in at most so many seconds; `but` are not waited for."""
        deadline = time.monotonic() + seconds
        for number, process in enumerate(self._processes):
            if number not in but:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    raise AssertionError(f"process {number} goes on after {seconds} s:\n{self.printed(number)}") from None
        return [process.poll() for process in self._processes]

    def __enter__(self) -> Several:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def trainers(count: int, workdir: Path, changes: dict[str, Any], config: str = "configs/demo.py", devices: int = 1) -> Several:
    """A run of the train verb in `count` processes."""
    return Several(command(config, workdir, changes), count, workdir.with_suffix(".printed"), devices)


def train_in(count: int, workdir: Path, changes: dict[str, Any], **more: Any) -> Several:
    """The same to its end, which must be a good one."""
    with trainers(count, workdir, changes, **more) as run:
        codes = run.codes()
    assert codes == [0] * count, "\n".join(run.printed(number)[-2000:] for number in range(count))
    return run


def workers(count: int, module: str, folder: Path) -> Several:
    """A small program in `count` processes, each of which gets the folder as its first argument."""
    return Several([sys.executable, "-m", module, str(folder)], count, folder / "printed")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
