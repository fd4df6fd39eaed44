"""Runs verbs as a user does: each in a process of its own, from the root of the repository."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from deepstack_jax.train.run.lock import LOCK
from tests import QUICK_COMPILATION

Done = subprocess.CompletedProcess[str]
REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 300  # seconds that one command may take on a busy machine

# Tiny programs that run for a few steps: XLA's optimizations would cost more than they save.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "NPROC"},  # of simulated devices
    "XLA_FLAGS": QUICK_COMPILATION,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "COLUMNS": "200",
}


def command(config: str, workdir: Path | None, changes: dict[str, Any]) -> list[str]:
    """The command line of a run; `changes` holds {"decoder.layers": 3, ...}."""
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    place = [] if workdir is None else [f"--workdir={workdir}"]
    return [sys.executable, "-m", "deepstack_jax.train", f"--config={config}", *place, *flags]


@cache
def _forks() -> subprocess.Popen[str]:
    """What starts verbs for the tests of this process; most of the time of a short one would go into imports."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forks"],
        cwd=REPOSITORY,
        env=ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    return process


def ask_fork(**request: Any) -> dict[str, Any]:
    """Have a verb or a piece of Python run; see `tests/forks.py` for the request and its answer."""
    process = _forks()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"seconds": TIMEOUT} | request) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def module(name: str, *flags: str, typed: str = "", folder: Path = REPOSITORY, seconds: int = TIMEOUT) -> Done:
    """One run of `python -m NAME` to its end, without the seconds that its imports take.

    Not for what has worker processes or gets signals: `subprocess` starts those from nothing.
    """
    done = ask_fork(module=name, arguments=flags, folder=str(folder), variables=ENVIRONMENT, typed=typed, seconds=seconds)
    return subprocess.CompletedProcess([name, *flags], done["code"], done["out"], done["err"])


def verb(name: str, *flags: str, **how: Any) -> Done:
    """The same of `python -m deepstack_jax.NAME`."""
    return module(f"deepstack_jax.{name}", *flags, **how)


def train(config: str, workdir: Path | None, changes: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """One run to its end."""
    words = command(config, workdir, changes)
    if changes.get("data.workers"):
        return subprocess.run(words, cwd=REPOSITORY, env=ENVIRONMENT, timeout=TIMEOUT, capture_output=True, text=True)
    return verb("train", *words[3:])


def train_until(
    line: str | Callable[[str], bool],
    number: signal.Signals,
    config: str,
    workdir: Path,
    changes: dict[str, Any],
    *,
    group: bool = False,
) -> tuple[int, str]:
    """Start a run, send the signal once `line` is part of what it prints; returns the exit code and all that it printed.

    `line` may also be a function of what it has printed so far. With `group` the signal reaches all processes of the run, as
    one from a terminal does. The call returns when all have ended.
    """
    printed = workdir.with_suffix(".out")
    with printed.open("w") as file:
        process = subprocess.Popen(
            command(config, workdir, changes),
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + TIMEOUT
        reached = line if callable(line) else lambda text: line in text
        while not reached(printed.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the run ended without printing {line!r}:\n{printed.read_text()}")
            time.sleep(0.01)
        (os.killpg if group else os.kill)(process.pid, number)
        code = process.wait(TIMEOUT)
        while members(process.pid):
            if time.monotonic() > deadline:
                raise AssertionError(f"the run is over, its processes {members(process.pid)} go on:\n{printed.read_text()}")
            time.sleep(0.1)
        return code, printed.read_text()
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)


def members(group: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, leader = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(leader) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def saved_state(workdir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Parameters, optimizer state and counters of a checkpoint, the newest if none is named, by path."""
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    folder = workdir.absolute() / "checkpoints" / str(step or steps[-1]) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:  # into numpy: other processes' devices are not here
        stored = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        state = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_bytes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Two states as `saved_state` gives them are equal, every one of their arrays."""
    assert ours.keys() == theirs.keys()
    assert any("opt_state" in path for path in ours)
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype, path
        assert leaf.tobytes() == theirs[path].tobytes(), path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(workdir: Path) -> dict[int, list[float]]:
    """Every training loss that was logged, by step; a step that was logged twice has two."""
    found: dict[int, list[float]] = {}
    for record in read_lines(workdir / "metrics.jsonl"):
        if "loss" in record:
            found.setdefault(record["step"], []).append(record["loss"])
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder but the lock of a run, to see that nothing was written over."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
