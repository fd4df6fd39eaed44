"""What the TPU compiler says of the vision tower with XLA's attention and with splash attention, into docs/performance.md.

`python -m benchmarks.tower_attention` needs the TPU compiler (`pip install -e '.[plan]'`), and a minute for each program. A
kernel's own time is in none of its figures: the scores that are not written are what can be seen.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepstack_jax.config import Config, MeshConfig
from deepstack_jax.families.base import tower_of
from deepstack_jax.parallel.kernels import Kernel, attention_for
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import replicated, use_mesh
from deepstack_jax.plan.topology import open_machine

OUTPUT = Path(__file__).parents[1] / "docs" / "performance.md"
START, END = "<!-- tower -->\n", "<!-- end of tower -->"
CROPS = 16
PASSES = (("v5e:2x2", False), ("v5e:2x2", True), ("v5p:2x2x1", False))  # and whether the tower trains
KERNELS: tuple[Kernel, ...] = ("xla", "splash")


def compiled(topology: str, kernel: Kernel, *, trains: bool) -> tuple[float, float]:
    """GB that a pass over the tower reads and writes, its scan's body counted once, and MiB of temporaries on the device."""
    config = dataclasses.replace(Config(), vision=dataclasses.replace(Config().vision, layers=4))
    mesh = make_mesh(MeshConfig(), open_machine(topology).devices[:1])
    tower = tower_of(config).build(config, attend=attention_for(kernel, mesh), dtype=jnp.bfloat16)
    pixels = jax.ShapeDtypeStruct((CROPS, config.image.size, config.image.size, 3), jnp.bfloat16, sharding=replicated(mesh))
    drawn = nn.unbox(jax.eval_shape(tower.init, jax.random.key(0), pixels))["params"]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), drawn)

    def forward(params: Any, pixels: jax.Array) -> jax.Array:
        return tower.apply({"params": params}, pixels)[0].astype(jnp.float32).sum()

    with use_mesh(mesh):
        program = jax.jit(jax.grad(forward) if trains else forward).lower(params, pixels).compile()
    cost: Any = program.cost_analysis()
    memory: Any = program.memory_analysis()
    return cost["bytes accessed"] / 1e9, memory.temp_size_in_bytes / 2**20


def main() -> None:
    lines = [
        f"CLIP L/14-336, {CROPS} crops of 577 tokens in bfloat16 on one chip, by `python -m benchmarks.tower_attention`:",
        "",
        "| chip | pass | GB, XLA | GB, splash | MiB of temporaries, XLA | splash |",
        "|---|---|---|---|---|---|",
    ]
    for topology, trains in PASSES:
        (xla, xla_held), (splash, splash_held) = (compiled(topology, kernel, trains=trains) for kernel in KERNELS)
        name = "forward and backward" if trains else "forward"
        lines.append(f"| {topology.split(':')[0]} | {name} | {xla:.2f} | {splash:.2f} | {xla_held:.0f} | {splash_held:.0f} |")
        print(lines[-1], flush=True)
    before, _, rest = OUTPUT.read_text().partition(START)
    OUTPUT.write_text(f"{before}{START}" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
