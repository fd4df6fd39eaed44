"""One stage: `python -m benchmarks.gpu_check.child STAGE SIZE FIGURES EARLIER SECONDS`, as the parent starts it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.gpu_check.record import AbsentError, Record
from benchmarks.gpu_check.sizes import SIZES
from benchmarks.gpu_check.stages import EXIT_ABSENT, STAGES


def run(name: str, record: Record) -> None:
    """Call the stage's function."""
    stage = next(stage for stage in STAGES if stage.name == name)
    module, function = stage.function.split(":")
    getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), function)(record)


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
    sys.exit(main())
