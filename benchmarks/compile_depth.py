"""Compile time, program size and memory of the training step against depth, scanned and unrolled.

`python -m benchmarks.compile_depth [full]` writes a section of docs/plan.md: a model that is small in everything but depth, for
the CPU and, where its compiler is installed (`pip install -e '.[plan]'`), for a TPU; with `full` Vicuna-7B's widths for a TPU
too, which takes minutes. Nothing is cached.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import sys

import jax

from benchmarks.plan_table import write_section
from deepstack_jax.config import Config, DataConfig, DecoderConfig, ImageConfig, MeshConfig, TrainConfig, VisionConfig
from deepstack_jax.config_checks import ConfigError
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.planning.compile import Compiled, compile_step
from deepstack_jax.planning.topology import Machine, open_machine
from deepstack_jax.training.flops import GIB
from deepstack_jax.training.program import Program, build_program

DEPTHS = ((8, True), (32, True), (8, False), (32, False))
TINY_SLICE, SLICE = "v5e:2x2", "v5p:4x4x4"
REPEATS = 3


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


def measure(config: Config, machine: Machine, repeats: int) -> list[str]:
    """Rows of the table, and the ratio of the two depths."""
    rows, seconds = [], {}
    for layers, scan in DEPTHS:
        program = of_depth(config, layers, scan, machine)
        found: list[Compiled] = []
        for _ in range(repeats):
            jax.clear_caches()
            result = compile_step(program, config.train.batch_size, config.data.max_length)
            if not isinstance(result, Compiled):
                raise SystemExit(f"{layers} layers do not fit {machine.name}: {result.total / GIB:.1f} GiB")
            found.append(result)
        seconds[layers, scan] = statistics.median(one.seconds for one in found)
        size, memory = lowered_size(program) / 1e6, found[0]
        rows.append(
            f"| {layers} {'scanned' if scan else 'unrolled'} | {seconds[layers, scan]:.1f} | {size:.2f} | "
            f"{memory.temporaries / GIB:.3f} | {memory.code / 2**20:.1f} |"
        )
        print(rows[-1], flush=True)
    ratio = {scan: seconds[32, scan] / seconds[8, scan] for scan in (True, False)}
    return [*rows, "", f"32 layers against 8: scanned {ratio[True]:.2f}x, unrolled {ratio[False]:.2f}x."]


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    head = [
        "",
        "| layers | trace + lower + compile, s | lowered program, MB | temporaries, GiB | code, MiB |",
        "|---|---|---|---|---|",
    ]
    text = [
        "The whole training step (forward, backward, AdamW) with 4 crops and 4 injected groups, by",
        f"`python -m benchmarks.compile_depth full` (jax {jax.__version__}, {platform.machine()}, two cores). Tiny widths, for",
        f"the CPU, medians of {REPEATS}:",
        *head,
        *measure(small(), open_machine("here"), REPEATS),
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
        config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=-1))
        text += ["", f"{title}, for {name}, per chip, one run:", *head, *measure(config, machine, 1)]
    write_section("depth", "\n".join(text))


if __name__ == "__main__":
    main()
