"""The step compiled ahead of its first call, and what that took."""

from __future__ import annotations

import jax

from deepstack_jax.batch import Batch
from deepstack_jax.printing import Console
from deepstack_jax.train.account.journal import Journal
from deepstack_jax.train.core.program import Program
from deepstack_jax.types import TrainState


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
