"""Compile time, program size and temporaries of the training step against depth, scanned and unrolled.

`python -m benchmarks.compile_depth` prints a table and writes docs/compile_depth.md. No persistent compilation cache is used.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from deepstack_jax.batch import empty_batch
from deepstack_jax.config import Config, DataConfig, DecoderConfig, ImageConfig, VisionConfig
from deepstack_jax.model.variants import build_model
from deepstack_jax.training.optimizer import assign_groups, flatten, make_optimizer, make_schedule
from deepstack_jax.training.step import ModelFns, make_train_step
from deepstack_jax.types import TrainState

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
    model = build_model(config)
    batch = empty_batch(config.batch_shape(4, config.data.max_length))
    batch = batch._replace(example_id=batch.example_id.astype(np.int32))
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
    groups = assign_groups(list(flatten(shapes)), config.optimizer.table)
    schedule = make_schedule(config.optimizer.schedule, 10)
    optimizer = make_optimizer(config.optimizer, groups, schedule)
    functions = ModelFns(
        lambda params, batch: model.apply({"params": params}, batch).hidden,
        lambda params, hidden: model.apply({"params": params}, hidden, method="logits"),
    )
    step = make_train_step(functions, optimizer, groups, schedule, accumulation=1, chunk=64)
    state = jax.eval_shape(lambda p: TrainState(jax.numpy.zeros((), jax.numpy.int32), p, optimizer.init(flatten(p))), shapes)
    jax.clear_caches()
    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
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
