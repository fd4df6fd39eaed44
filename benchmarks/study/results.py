"""The study's results: one small file that is committed, a run a line, from which every table, figure and verdict is made."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepstack_jax.atomic import write_lines
from deepstack_jax.config import Config, to_dict

FILE = Path(__file__).with_name("results.jsonl")
REACHED = 0.9  # token accuracy of training whose first step is reported
WINDOW = 3  # records of the log, over whose mean it is looked for: one batch is a small sample
# Sections and keys that change nothing of what is kept of a run.
_NOT_OF_THE_RESULT = ("name", "mesh", "profile", "train.checkpoint_every", "train.keep")


@dataclass(frozen=True)
class Run:
    """One trained row: what it was, what it took, what came out."""

    study: str  # which table it is of
    row: str
    seed: int
    digest: str  # of its whole configuration
    data: str  # fingerprint of its examples, of which a configuration says the settings alone
    changes: dict[str, Any]  # of the study's base
    scores: dict[str, float]  # kind of question -> held-out exact match
    curve: list[tuple[int, float]]  # (step, token accuracy of that step's batch): every example is new, so it is held out too
    steps: int
    parameters: int
    context: int  # positions of a row
    visual: int  # distinct visual tokens that an example shows
    flops: float  # of a step, the model's, as `plan` counts them
    memory: float  # bytes of a step, as `plan` estimates them
    seconds_per_step: float | None
    seconds: float  # of all, from the command's start to its end
    at_once: int  # runs that the machine had at the same time
    cores: int  # that this one could use
    versions: dict[str, str]

    @property
    def name(self) -> str:
        return run_name(self.row, self.seed)

    def score(self, kinds: Sequence[str]) -> float:
        """Mean over kinds, each of which counts alike."""
        return float(np.mean([self.scores[kind] for kind in kinds]))

    def reached(self) -> int | None:
        """The first step at which the mean of WINDOW records reaches REACHED; None where none does."""
        values = [accuracy for _, accuracy in self.curve]
        for end in range(WINDOW, len(values) + 1):
            if np.mean(values[end - WINDOW : end]) >= REACHED:
                return self.curve[end - 1][0]
        return None


def committed(size: str) -> Path:
    """The file of a size's results."""
    return FILE if size == "cpu" else FILE.with_stem(f"results_{size}")


def run_name(row: str, seed: int) -> str:
    return f"{row}-{seed}"


def digest_of(config: Config) -> str:
    """Of everything that a result depends on: a row whose digest is known is not trained again."""
    values = to_dict(config)
    for key in _NOT_OF_THE_RESULT:
        section, _, name = key.partition(".")
        del (values[section] if name else values)[name or section]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read_runs(file: Path = FILE) -> dict[tuple[str, str, int], Run]:
    """(study, row, seed) -> its run; empty where there is no file."""
    if not file.exists():
        return {}
    stored = map(json.loads, file.read_text().splitlines())
    runs = [Run(**one | {"curve": [(int(step), float(value)) for step, value in one["curve"]]}) for one in stored]
    return {(run.study, run.row, run.seed): run for run in runs}


def add_run(run: Run, file: Path = FILE) -> None:
    """Put a run into the file, in place of an earlier one of its row and seed; another process may do so at the same time."""
    with _alone(file):
        runs = read_runs(file) | {(run.study, run.row, run.seed): run}
        write_lines(file, (asdict(runs[key]) for key in sorted(runs)))


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    folder = os.open(file.parent, os.O_RDONLY)  # the folder's own lock: no further file
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def by_row(runs: Mapping[tuple[str, str, int], Run], study: str, row: str) -> list[Run]:
    """The runs of a row, by seed."""
    return [runs[key] for key in sorted(runs) if key[:2] == (study, row)]
