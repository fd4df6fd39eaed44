"""The step compiled ahead of its first call, and what that took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from deepstack_jax.batch import Batch
from deepstack_jax.printing import Console
from deepstack_jax.train.account.journal import Journal
from deepstack_jax.train.core.program import Program
from deepstack_jax.train.core.step import StepFn
from deepstack_jax.types import TrainState


class Memory(NamedTuple):
    """Bytes per device that a compiled step needs."""

    arguments: int  # state and batch
    temporaries: int
    outputs: int  # beyond what reuses the arguments

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs


@dataclass
class CompiledSteps:
    """The step compiled ahead of its first call, once for every length of a batch.

    Attributes:
      memory, seconds: of each length compiled so far.
    """

    program: Program
    memory: dict[int, Memory | None] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    _compiled: dict[int, jax.stages.Compiled] = field(default_factory=dict)

    def known(self, batch: Batch) -> bool:
        return batch.tokens.shape[1] in self._compiled

    def compile(self, state: TrainState, batch: Batch) -> None:
        length = batch.tokens.shape[1]
        began = time.perf_counter()
        compiled = self._compiled[length] = self.program.jit_step().lower(state, batch).compile()
        self.seconds[length] = time.perf_counter() - began
        stats = compiled.memory_analysis()
        self.memory[length] = stats and Memory(
            stats.argument_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.output_size_in_bytes - stats.alias_size_in_bytes,
        )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        return self._compiled[batch.tokens.shape[1]](state, batch)


def compile_first(run_step: CompiledSteps, journal: Journal, console: Console) -> StepFn:
    """The step as the loop calls it: compiles at the first batch of every length, and says what that took."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if not run_step.known(batch):
            with journal.spend("compile"):
                run_step.compile(state, batch)
            console.print(describe_compiled(run_step, batch.tokens.shape[1]), soft_wrap=True)
        return run_step(state, batch)

    return step


def describe_compiled(steps: CompiledSteps, length: int) -> str:
    """Compile time and memory of the step, in one line."""
    memory = steps.memory[length]
    text = f"step of length {length} compiled in {steps.seconds[length]:.1f} s"
    if memory is None:
        return text
    arguments, temporaries, outputs = (f"{part / 1e9:.3f}" for part in memory)
    parts = f"state and batch {arguments} + temporaries {temporaries} + outputs {outputs}"
    return f"{text}; GB per device: {memory.total / 1e9:.3f} = {parts}"
