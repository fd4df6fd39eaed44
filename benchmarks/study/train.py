"""One run of the study: its command, that of the train verb, and what its workdir says when it is done."""

import hashlib
import json
import os
import runpy
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.results import Run, digest_of, run_name
from benchmarks.study.table import Row, Study
from deepstack_jax import __version__
from deepstack_jax.config import Config, build_config
from deepstack_jax.data.cards import Cards
from deepstack_jax.data.synthetic import SPLITS
from deepstack_jax.evaluate.scorers.texts import levenshtein
from deepstack_jax.plan.planner import Wanted, make_plan
from deepstack_jax.plan.topology import open_machine
from deepstack_jax.train.run.metrics import read_metrics, seconds_per_step

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
SAMPLED = 8  # cards of each split that a fingerprint is of: all kinds of questions, all shapes
_PLANNING = threading.Lock()  # runs may end at the same time


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
    def key(self) -> tuple[str, str, int]:
        """Of its run among the results."""
        return self.study.name, self.row.name, self.seed

    @property
    def changes(self) -> dict[str, Any]:
        return dict(self.row.changes) | dict.fromkeys(self.study.seeds, self.seed)

    @cached_property
    def config(self) -> Config:
        """The configuration that the command below trains."""
        config = runpy.run_path(str(REPOSITORY / self.study.base))["get_config"](self.size)
        config.update_from_flattened_dict(self.changes)
        return build_config(config)

    @property
    def digest(self) -> str:
        return digest_of(self.config)

    @cached_property
    def data(self) -> str:
        """Fingerprint of the examples, and of weights that it begins with; empty where they are files that are not here."""
        found = hashlib.sha256()
        for folder in (REPOSITORY / name for name in self.needs):
            for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
                found.update(file.name.encode() + file.read_bytes())
        if not self.needs:
            cards = self.config.data.cards
            for split in SPLITS:
                source = Cards(cards.seed, SAMPLED, grids=cards.grids, unseen=cards.unseen, sharp=cards.sharp, split=split)
                for card in source:
                    found.update(repr(card.messages).encode() + np.asarray(card.images[0]).tobytes())
        return "" if self.missing else found.hexdigest()[:16]

    @property
    def needs(self) -> dict[str, str]:
        """The folders that it is trained on and begins with -> the command that makes each."""
        return {folder.replace("SIZE", self.size): how.replace("SIZE", self.size) for folder, how in self.study.needs.items()}

    @property
    def missing(self) -> str:
        """The first of them that is not there, and its command; empty where all are."""
        gone = ((folder, how) for folder, how in self.needs.items() if not (REPOSITORY / folder).is_dir())
        return next((f"{folder} is not there; {how} makes it" for folder, how in gone), "")

    @property
    def folder(self) -> str:
        """Of its workdir: another for another configuration or other examples."""
        return f"{self.name}-{hashlib.sha256((self.digest + self.data).encode()).hexdigest()[:8]}"

    def is_of(self, run: Run | None) -> bool:
        """Whether a run is of this very configuration and, as far as they are here, of these examples."""
        return run is not None and run.digest == self.digest and self.data in ("", run.data)

    def command(self, folder: Path) -> list[str]:
        """The arguments of python that train it, as a user types them."""
        flags = [f"--config.{key}={value}" for key, value in self.changes.items()]
        return ["-m", "deepstack_jax.train", f"--config={self.study.base}:{self.size}", *flags, f"--workdir={folder}"]


def train(job: Job, folder: Path, at_once: int = 1) -> Run:
    """Train a row, or go on with it where it was stopped, on the cores of the calling thread.

    Args:
      folder: of all runs of this study and size.
      at_once: runs that this machine has at the same time, which is kept beside the seconds.

    Raises:
      RunError: the command failed; its output is in the log beside the workdir.
    """
    workdir = folder / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    # The compiled step of a row serves all of its seeds.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    begun = time.monotonic()
    with (folder / f"{job.folder}.log").open("a") as log:
        command = [sys.executable, *job.command(workdir)]
        ended = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ | cache, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if ended.returncode:
        raise RunError(f"{job.name} ended with exit code {ended.returncode}; see {log.name}; the same command goes on with it")
    return read_run(job, workdir, time.monotonic() - begun, at_once)


def read_run(job: Job, workdir: Path, seconds: float, at_once: int = 1) -> Run:
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
    here = open_machine("here")
    with _PLANNING:
        plan = make_plan(job.config, replace(here, devices=here.devices[:1]), Wanted(), compiled=False)
    kept = job.study.curve
    curve = [(line["step"], round(line[kept], 4)) for line in read_metrics(workdir) if kept in line]
    return Run(
        study=job.study.name,
        row=job.row.name,
        seed=job.seed,
        digest=job.digest,
        data=job.data,
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
        at_once=at_once,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        versions={"deepstack_jax": __version__, **{name: version(name) for name in PACKAGES}},
    )


def character_errors(workdir: Path) -> float:
    """Character error rate: edits that turn all answers into the references, per character of these; 0 is perfect."""
    rows = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    edits = sum(levenshtein(row["prediction"].strip(), row["references"][0]) for row in rows)
    return edits / sum(len(row["references"][0]) for row in rows)
