"""Run a launch script with stub tools on PATH; every stub writes down how it was called."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
TRAIN = ("--config=configs/llava15.py:finetune", "--workdir=/gcs/runs/a")
SECONDS = 60  # after which a test gives up waiting, on a busy machine too


class Tools:
    """A folder of stub programs, first on PATH, and the log of their calls."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.log = folder / "bin", folder / "calls"
        self.bin.mkdir(parents=True)
        self.log.touch()

    def add(self, name: str, body: str = "") -> None:
        """A stub that logs its arguments, then runs `body` (bash)."""
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "{self.log}"\n{body}\n')
        path.chmod(0o755)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def environment(self, **variables: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "XLA_", "JAX_"))}
        return inherited | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | variables


def run(
    script: str, *arguments: str, tools: Tools | None = None, folder: Path = REPOSITORY, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The script's result, standard output and error apart; it runs in `folder`."""
    environment = tools.environment(**variables) if tools else None
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=SECONDS, check=False)


@contextmanager
def background(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, ended with all its children whatever happens."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {SECONDS} s in vain for {what}")
        time.sleep(0.02)


def bare_path(folder: Path) -> str:
    """A PATH with what every system has, and without any of the tools that the scripts look for."""
    folder.mkdir()
    for name in ("bash", "cat", "awk", "dirname", "env", "git", "mktemp", "python3", "rm", "sed", "setsid", "sleep"):
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    return str(folder)
