"""What the loop needs: `Run`, and what it is put together from before it begins."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config, DataConfig, TrainConfig
from deepstack_jax.data.encode.tokenizer import open_tokenizer
from deepstack_jax.data.example import Source
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.errors import try_all
from deepstack_jax.parallel.distributed import process_slice
from deepstack_jax.parallel.mesh import check_batch_fits
from deepstack_jax.printing import Console
from deepstack_jax.train.account.journal import Journal
from deepstack_jax.train.checkpoint.init_weights import find_weights
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.core.program import Program
from deepstack_jax.train.core.step import StepFn
from deepstack_jax.train.run.metrics import MetricsLog, Quarantine
from deepstack_jax.types import PyTree, TrainState


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
    judged: dict[int, float] = field(default_factory=dict)  # step -> held-out loss, or the score that tells the best


class CompiledSteps:
    """The step of a program as the loop calls it: compiled at the first batch of every length, which is counted and printed."""

    def __init__(self, program: Program, journal: Journal, console: Console) -> None:
        self._program, self._journal, self._console = program, journal, console
        self._compiled: dict[int, jax.stages.Compiled] = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        length = batch.tokens.shape[1]
        if length not in self._compiled:
            with self._journal.spend("compile"):
                began = self._journal.clock()
                self._compiled[length] = self._program.jit_step().lower(state, batch).compile()
                seconds = self._journal.clock() - began
            said = f"step of length {length} compiled in {seconds:.1f} s{_memory(self._compiled[length])}"
            self._console.print(said, soft_wrap=True)
        return self._compiled[length](state, batch)


def _memory(compiled: jax.stages.Compiled) -> str:
    """What a step needs on each device, in words; "" where the backend does not say."""
    stats = compiled.memory_analysis()
    if not stats:
        return ""
    made = stats.output_size_in_bytes - stats.alias_size_in_bytes  # beyond what reuses the arguments
    sizes = [size / 1e9 for size in (stats.argument_size_in_bytes, stats.temp_size_in_bytes, made)]
    arguments, temporaries, outputs = (f"{size:.3f}" for size in sizes)
    parts = f"state and batch {arguments} + temporaries {temporaries} + outputs {outputs}"
    return f"; GB per device: {sum(sizes):.3f} = {parts}"


def open_inputs(config: Config, *, starts: bool) -> Source:
    """The training data. All that is missing of the tokenizer, of it, and of weights to start from is said at once."""
    weights = [partial(find_weights, config)] if starts and config.train.weights else []
    return try_all(partial(open_tokenizer, config.data_spec), partial(open_source, config.data, "train"), *weights)[1]


def open_stream(config: Config, source: Source, mesh: Mesh) -> TrainingStream:
    """This process' rows of every batch."""
    if not config.data.packing.enabled:  # packed rows are as many as do: see `data/order/batches.py`
        check_batch_fits(config.train, mesh)
    mine, shards = process_slice(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    return TrainingStream(source, config.data_spec, process=mine.index, processes=mine.count, devices=shards)
