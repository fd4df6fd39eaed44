"""A plan against the memory that the devices here say a step took: `python -m benchmarks.plan_peak [--config=...]`.

Plans the step for the devices of this machine, draws parameters, runs the step twice on empty rows, whose arrays are as large
as full ones, and prints what was planned beside `peak_bytes_in_use`. Exits with 1 where they are more than a tenth apart, and
where the devices keep no such count (CPUs). Without flags it takes stage 2 of LLaVA-1.5's recipe cut to 4 layers and 8 rows.
"""

from __future__ import annotations

import sys

import jax

from deepstack_jax import cli
from deepstack_jax.batch import empty_batch
from deepstack_jax.errors import ConfigError
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.plan.planner import Wanted, make_plan
from deepstack_jax.plan.report import gib
from deepstack_jax.plan.topology import open_machine
from deepstack_jax.train.checkpoint.init_weights import first_state
from deepstack_jax.train.core.program import build_program

DEFAULTS = (
    "--config=configs/llava15.py:finetune",
    "--config.decoder.layers=4",
    "--config.train.batch_size=8",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
    "--config.train.weights=",
    "--config.train.projector=",
)
APART = 0.1


def main() -> int:
    config = cli.parse_config()
    machine = open_machine("here")
    plan = make_plan(config, machine, Wanted())
    program = build_program(config, make_mesh(config.mesh), steps=10)
    batch = empty_batch(config.data_spec.batch_shape(plan.load.rows, plan.load.length))
    with use_mesh(program.mesh):
        state, placed = first_state(program), put_batch(program.mesh, batch)
        step, metrics = program.jit_step(), None
        for _ in range(2):
            state, metrics = step(state, placed)
        jax.block_until_ready((state, metrics))
    print(f"{config.name} on {machine.devices[0].device_kind}: planned {gib(plan.used)}, by the compiler that runs it")
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if not all(peaks):
        raise ConfigError("these devices keep no count of their memory (peak_bytes_in_use); run it on a GPU or TPU")
    ratio = plan.used / max(peaks)
    print(f"the device's peak: {gib(max(peaks))}; planned / peak = {ratio:.3f}, expected within {APART:.0%}")
    return cli.EXIT_DONE if abs(ratio - 1) <= APART else cli.EXIT_ERROR


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.argv[1:] = given if any(word.startswith("--config=") for word in given) else [*DEFAULTS, *given]
    cli.run(main, __doc__ or "", [cli.CONFIG])
