"""`Run`, what the loop needs, put together before it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from deepstack_jax.config import DataConfig, TrainConfig
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.printing import Console
from deepstack_jax.train.account.journal import Journal
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.core.step import StepFn
from deepstack_jax.train.run.metrics import MetricsLog, Quarantine
from deepstack_jax.types import PyTree


@dataclass(frozen=True)
class Run:
    """What the loop needs."""

    train: TrainConfig
    data: DataConfig
    evaluate_every: int  # steps from one evaluation to the next, 0 = none
    profile: str  # steps to take a profile of, as FIRST:LAST; "" = none
    workdir: Path
    steps: int  # of the whole run
    mesh: Mesh
    stream: TrainingStream
    step: StepFn
    # (positions of a row, sum of the squared lengths of its segments) -> model FLOPs of a step
    flops: Callable[[int, float], float]
    learning_rate: float  # at the schedule's top, of the group that most parameters belong to
    # (parameters, step) -> held-out loss, or None where there is no held-out data
    evaluate: Callable[[PyTree, int], float | None]
    checkpoints: Checkpoints
    metrics: MetricsLog
    journal: Journal
    quarantine: Quarantine
    console: Console
    about: dict[str, Any]  # what checkpoints say of the run
    loss_at: dict[int, float] = field(default_factory=dict)  # held-out loss by the step that it was measured at
