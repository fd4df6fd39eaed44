"""Compile time, program size and temporaries of the training step against depth, scanned and unrolled.

`python -m benchmarks.compile_depth` prints a table and writes docs/compile_depth.md. No persistent compilation cache is used.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import jax
import numpy as np

from deepstack_jax.config import Config, DataConfig, DecoderConfig, ImageConfig, VisionConfig
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.training.program import build_program

OUTPUT = Path(__file__).parents[1] / "docs" / "compile_depth.md"
REPEATS = 3


def tiny(layers: int, scan: bool) -> Config:
    """A DeepStack-L model that is small in everything but depth."""
    decoder = DecoderConfig(vocab_size=64, width=64, layers=layers, heads=4, kv_heads=4, head_dim=16, mlp=128, scan=scan)
    image = ImageConfig(size=32, num_crops=4)
    vision = VisionConfig(patch_size=8, width=32, layers=3, heads=4, mlp=64)
    return Config(image=image, vision=vision, decoder=decoder, data=DataConfig(max_length=64))


def compile_step(config: Config) -> tuple[float, int, int]:
    """(seconds to lower and compile, bytes of the lowered program, bytes of temporaries)."""
    program = build_program(config, make_mesh(config.mesh, jax.devices()[:1]), steps=10)
    state, batch = program.abstract_state(), program.abstract_batch(4, config.data.max_length)
    jax.clear_caches()
    began = time.perf_counter()
    lowered = program.jit_step().lower(state, batch)
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    return seconds, len(lowered.as_text()), memory.temp_size_in_bytes if memory is not None else 0


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    rows, measured = [], {}
    for layers, scan in ((8, True), (32, True), (8, False), (32, False)):
        runs = [compile_step(tiny(layers, scan)) for _ in range(REPEATS)]
        seconds, size, temporaries = float(np.median([run[0] for run in runs])), runs[0][1], runs[0][2]
        measured[layers, scan] = seconds
        name = "scanned" if scan else "unrolled"
        rows.append(f"| {layers} {name} | {seconds:.2f} | {size / 1e6:.2f} | {temporaries / 1e6:.2f} |")
        print(rows[-1], flush=True)
    ratios = {scan: measured[32, scan] / measured[8, scan] for scan in (True, False)}
    text = f"""# Compile time against depth

The whole training step (forward, backward, AdamW) of a tiny DeepStack-L model with 4 crops and 4 injected groups. Median of
{REPEATS} on {jax.devices()[0].platform} ({platform.machine()}), jax {jax.__version__}; written by
`python -m benchmarks.compile_depth`.

| layers | lower + compile, s | lowered program, MB | temporaries, MB |
|---|---|---|---|
{chr(10).join(rows)}

32 layers against 8: scanned {ratios[True]:.2f}x, unrolled {ratios[False]:.2f}x.
"""
    OUTPUT.write_text(text)
    print(text.splitlines()[-1])


if __name__ == "__main__":
    main()
