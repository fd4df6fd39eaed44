"""Compile time, program size and memory of the training step against depth, scanned and unrolled.

`python -m benchmarks.compile_depth [full]` writes a section of docs/plan.md: a model that is small in everything but depth, for
the CPU and, where its compiler is installed (`pip install -e '.[plan]'`), for a TPU; with `full` Vicuna-7B's widths for a TPU
too, which takes ten minutes, and a sentence of README.md. Nothing is cached.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import sys
from typing import NamedTuple

import jax

from benchmarks.plan_table import OUTPUT, write_section
from deepstack_jax.config import Config, DataConfig, DecoderConfig, ImageConfig, MeshConfig, TrainConfig, VisionConfig
from deepstack_jax.errors import ConfigError
from deepstack_jax.parallel.chips import GIB
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.plan.compile import Compiled, compile_step
from deepstack_jax.plan.topology import Machine, open_machine
from deepstack_jax.train.core.program import Program, build_program

DEPTHS = ((8, True), (32, True), (8, False), (32, False))
TINY_SLICE, SLICE = "v5e:2x2", "v5p:4x4x4"
REPEATS = 3
README = OUTPUT.parents[1] / "README.md"


class Row(NamedTuple):
    """A step of one depth."""

    layers: int
    scan: bool
    seconds: float
    size: float  # MB of the program before it is compiled
    temporaries: float  # GiB
    code: float  # MiB; 0 where the compiler does not say

    def text(self) -> str:
        name, code = "scanned" if self.scan else "unrolled", f"{self.code:.1f}" if self.code else "-"
        return f"| {self.layers} {name} | {self.seconds:.1f} | {self.size:.2f} | {self.temporaries:.3f} | {code} |"


def small() -> Config:
    """A DeepStack-L model that is small in everything but depth."""
    decoder = DecoderConfig(vocab_size=64, width=64, heads=4, kv_heads=4, head_dim=16, mlp=128)
    image = ImageConfig(size=32, num_crops=4)
    vision = VisionConfig(patch_size=8, width=32, layers=3, heads=4, mlp=64)
    return Config(image=image, vision=vision, decoder=decoder, data=DataConfig(max_length=64), train=TrainConfig(batch_size=4))


def of_depth(config: Config, layers: int, scan: bool, machine: Machine) -> Program:
    decoder = dataclasses.replace(config.decoder, layers=layers, scan=scan)
    config = dataclasses.replace(config, decoder=decoder)
    return build_program(config, make_mesh(config.mesh, machine.devices), steps=10)


def lowered_size(program: Program) -> int:
    """Bytes of the program before it is compiled."""
    config = program.config
    batch = program.abstract_batch(config.train.batch_size, config.data.max_length)
    with use_mesh(program.mesh):
        return len(program.jit_step().lower(program.abstract_state(), batch).as_text())


def measure(config: Config, machine: Machine, repeats: int) -> list[Row]:
    """Every depth, its time the median of `repeats`."""
    rows = []
    for layers, scan in DEPTHS:
        program = of_depth(config, layers, scan, machine)
        found: list[Compiled] = []
        for _ in range(repeats):
            jax.clear_caches()
            result = compile_step(program, config.train.batch_size, config.data.max_length)
            if not isinstance(result, Compiled):
                raise SystemExit(f"{layers} layers do not fit {machine.name}: {result.total / GIB:.1f} GiB")
            found.append(result)
        seconds, memory = statistics.median(one.seconds for one in found), found[0]
        size = lowered_size(program) / 1e6
        rows.append(Row(layers, scan, seconds, size, memory.temporaries / GIB, memory.code / 2**20))
        print(rows[-1].text(), flush=True)
    return rows


def ratios(rows: list[Row]) -> tuple[float, float]:
    """Time of the deepest against the shallowest: (scanned, unrolled)."""
    seconds = {(row.layers, row.scan): row.seconds for row in rows}
    return seconds[32, True] / seconds[8, True], seconds[32, False] / seconds[8, False]


def table(rows: list[Row]) -> list[str]:
    head = [
        "",
        "| layers | trace + lower + compile, s | lowered program, MB | temporaries, GiB | code, MiB |",
        "|---|---|---|---|---|",
    ]
    scanned, unrolled = ratios(rows)
    return [*head, *(row.text() for row in rows), "", f"32 layers against 8: scanned {scanned:.2f}x, unrolled {unrolled:.2f}x."]


def sentence(tiny: list[Row], full: list[Row]) -> str:
    """For README.md."""
    deep, tiny_deep = ratios(full), ratios(tiny)
    memory = {row.scan: row.temporaries for row in full if row.layers == 32}
    return (
        f"The training step of 32 layers under `nn.scan` compiles in {deep[0]:.2f}x the time of 8 for {SLICE} at Vicuna-7B's "
        f"widths\n(unrolled {deep[1]:.2f}x), and in {tiny_deep[0]:.2f}x at tiny widths for the CPU ({tiny_deep[1]:.2f}x). "
        f"It takes {memory[True]:.1f} GiB of temporaries per chip where the\nunrolled one takes {memory[False]:.1f} "
        "([figures](docs/plan.md), by `python -m benchmarks.compile_depth full`)."
    )


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    tiny = measure(small(), open_machine("here"), REPEATS)
    text = [
        "The whole training step (forward, backward, AdamW) with 4 crops and 4 injected groups, by",
        f"`python -m benchmarks.compile_depth full` (jax {jax.__version__}, {platform.machine()}, two cores). Tiny widths, for",
        f"the CPU, medians of {REPEATS}:",
        *table(tiny),
    ]
    sizes = {TINY_SLICE: ("Tiny widths", small())}
    if "full" in sys.argv[1:]:
        sizes[SLICE] = ("Vicuna-7B's widths and CLIP-L, batch 128, length 2048", Config())
    for name, (title, config) in sizes.items():
        try:
            machine = open_machine(name)
        except ConfigError as error:
            print(error)
            break
        rows = measure(dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=-1)), machine, 1)
        text += ["", f"{title}, for {name}, per chip, one run:", *table(rows)]
        if name == SLICE:
            write_section("depth", sentence(tiny, rows), README)
    write_section("depth", "\n".join(text))


if __name__ == "__main__":
    main()
