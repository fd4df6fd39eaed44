"""One stage: `python -m benchmarks.gpu_check.child STAGE SIZE FIGURES EARLIER SECONDS`, as the parent starts it."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import jax

from benchmarks.gpu_check.record import AbsentError, Record
from benchmarks.gpu_check.sizes import SIZES
from benchmarks.gpu_check.stages import EXIT_ABSENT, STAGES

SET_PDEATHSIG = 1  # of Linux's prctl
BEFORE = 2.0  # seconds before its limit, at which a stage writes where it is


def run(name: str, record: Record) -> None:
    """Call the stage's function.

    Raises:
      AbsentError: it measures PyTorch, which is not installed.
      RuntimeError: jax does not compute on the GPU. A CPU would take the whole time for nothing.
    """
    stage = next(stage for stage in STAGES if stage.name == name)
    if stage.peer and importlib.util.find_spec("torch") is None:
        raise AbsentError("torch is not installed; see benchmarks/gpu_check/requirements.txt")
    if record.size.name == "full" and not stage.platforms and jax.default_backend() != "gpu":
        raise RuntimeError(f"jax computes on a {jax.default_backend()} here, not on the GPU: has it its plugin for CUDA?")
    module, function = stage.function.split(":")
    getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), function)(record)


def watched(seconds: float) -> None:
    """Let this process end with the one that started it, and say where it is shortly before it is ended for being late."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.dump_traceback_later(max(0.1, seconds - BEFORE))  # by a thread that does not wait for Python's


def main() -> int:
    name, size, figures, earlier, seconds = sys.argv[1:]
    record = Record(SIZES[size], Path(figures), json.loads(Path(earlier).read_text()), float(seconds))
    try:
        run(name, record)
    except AbsentError as absent:
        print(absent, file=sys.stderr)
        return EXIT_ABSENT
    return 0


if __name__ == "__main__":
    watched(float(sys.argv[-1]))
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is saved: what libraries do when Python ends takes seconds, and may hang
