"""The train step compiled ahead of time, for devices that may not be here, and what the compiler says of it."""

import time
from dataclasses import dataclass
from typing import Any

import jax

from deepstack_jax.errors import ConfigError
from deepstack_jax.jax_messages import hbm_asked
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core.program import Program


@dataclass(frozen=True)
class Compiled:
    """A compiled step, with its bytes on each device."""

    arguments: float
    outputs: float
    aliased: float  # of the outputs, in the place of arguments
    temporaries: float
    code: float
    host: float  # bytes in the memory of each device's host, where activations are offloaded
    text: str  # HLO after partitioning and scheduling
    seconds: float  # to trace, lower and compile

    @property
    def total(self) -> float:
        """Bytes on each device."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Overflow:
    """A step that the compiler refused, since a device's memory does not hold it."""

    total: float  # bytes that it would take on each device
    seconds: float


def compile_step(program: Program, rows: int, length: int) -> Compiled | Overflow:
    """Compile the step for `rows` rows of `length` positions on the program's mesh.

    Raises:
      ConfigError: the compiler cannot compile it, whatever the memory.
    """
    began = time.perf_counter()
    with use_mesh(program.mesh):
        lowered = program.jit_step().lower(program.abstract_state(), program.abstract_batch(rows, length))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            if total := hbm_asked(message):
                return Overflow(total, time.perf_counter() - began)
            raise ConfigError(
                f"the compiler refuses this step: {message.splitlines()[0][:200]}; try another config.decoder.remat or mesh"
            ) from error
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()  # every backend that is planned for has one
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        host=memory.host_temp_size_in_bytes,
        text=compiled.as_text() or "",
        seconds=seconds,
    )
