"""One run of the study: its command, that of the train verb, and what its workdir says when it is done."""

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.study.results import Run, digest_of, run_name
from benchmarks.study.table import Row, Study
from deepstack_jax import __version__
from deepstack_jax.config import Config, build_config
from deepstack_jax.evaluate.scorers.texts import levenshtein
from deepstack_jax.plan.planner import Wanted, make_plan
from deepstack_jax.plan.topology import open_machine
from deepstack_jax.train.run.metrics import read_metrics, seconds_per_step

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class RunError(Exception):
    """A run that ended without scores; one line with the next move."""


@dataclass(frozen=True)
class Job:
    """A row with a seed and a size."""

    study: Study
    size: str
    row: Row
    seed: int

    @property
    def name(self) -> str:
        return run_name(self.row.name, self.seed)

    @property
    def changes(self) -> dict[str, Any]:
        return dict(self.row.changes) | dict.fromkeys(self.study.seeds, self.seed)

    @property
    def config(self) -> Config:
        """The configuration that the command below trains."""
        config = runpy.run_path(str(REPOSITORY / self.study.base))["get_config"](self.size)
        config.update_from_flattened_dict(self.changes)
        return build_config(config)

    @property
    def digest(self) -> str:
        return digest_of(self.config)

    def command(self, folder: Path) -> list[str]:
        """The arguments of python that train it, as a user types them."""
        flags = [f"--config.{key}={value}" for key, value in self.changes.items()]
        return ["-m", "deepstack_jax.train", f"--config={self.study.base}:{self.size}", *flags, f"--workdir={folder}"]


def train(job: Job, folder: Path, cores: Sequence[int] = ()) -> Run:
    """Train a row, or go on with it where it was stopped.

    Args:
      folder: of all runs of this study and size.
      cores: that the process may use; none = all.

    Raises:
      RunError: the command failed; its output is in the log beside the workdir.
    """
    workdir = folder / job.name
    folder.mkdir(parents=True, exist_ok=True)
    # The compiled step of a row serves all of its seeds.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    begun = time.monotonic()
    with (folder / f"{job.name}.log").open("a") as log:
        pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
        command = [sys.executable, *job.command(workdir)]
        ended = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ | cache, stdout=log, stderr=subprocess.STDOUT, preexec_fn=pin, check=False
        )
    if ended.returncode:
        raise RunError(f"{job.name} ended with exit code {ended.returncode}; see {log.name}; the same command goes on with it")
    return read_run(job, workdir, time.monotonic() - begun)


def read_run(job: Job, workdir: Path, seconds: float) -> Run:
    """What is kept of a finished workdir.

    Raises:
      RunError: it holds no scores.
    """
    try:
        found = json.loads((workdir / "results.json").read_text())
        exact = found["scores"]["exact_match"]
        scores = exact.get("by_kind") or {"exact_match": exact["score"], "character_errors": character_errors(workdir)}
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{workdir / 'results.json'} has no scores ({error!r}); delete {workdir} and run again") from error
    plan = make_plan(job.config, open_machine("here"), Wanted(), compiled=False)
    kept = job.study.curve
    curve = [(line["step"], round(line[kept], 4)) for line in read_metrics(workdir) if kept in line]
    return Run(
        study=job.study.name,
        row=job.row.name,
        seed=job.seed,
        digest=job.digest,
        changes=dict(job.row.changes),
        scores={name: round(score, 4) for name, score in scores.items()},
        curve=curve,
        steps=found["steps"],
        parameters=found["parameters"],
        context=found["context_length"],
        visual=found["visual_tokens"],
        flops=plan.model_flops,
        memory=sum(plan.memory.values()),
        seconds_per_step=seconds_per_step(workdir),
        seconds=round(seconds, 1),
        versions={"deepstack_jax": __version__, **{name: version(name) for name in PACKAGES}},
    )


def character_errors(workdir: Path) -> float:
    """Character error rate: edits that turn all answers into the references, per character of these; 0 is perfect."""
    rows = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    edits = sum(levenshtein(row["prediction"].strip(), row["references"][0]) for row in rows)
    return edits / sum(len(row["references"][0]) for row in rows)
