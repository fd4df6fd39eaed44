"""Losses of a small DeepStack-L that learns with products in bfloat16 and in fp8: `python -m benchmarks.fp8_curve [STEPS]`.

The same parameters and batches; a CPU computes the rounded numbers in bfloat16. Written into docs/performance.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.plan_table import write_section
from deepstack_jax.config import Config, build_config, default_config
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core.program import build_program

OUTPUT = Path(__file__).parents[1] / "docs" / "performance.md"
WINDOW = 25  # losses that a row of the table is the mean of
SETTINGS = {
    "image.size": 64,
    "image.global_filter": "box",
    "image.num_crops": 4,
    "vision.patch_size": 16,
    "vision.width": 32,
    "vision.layers": 3,
    "vision.heads": 4,
    "vision.mlp": 128,
    "decoder.vocab_size": 260,
    "decoder.width": 64,
    "decoder.layers": 5,
    "decoder.heads": 4,
    "decoder.kv_heads": 2,
    "decoder.head_dim": 16,
    "decoder.mlp": 176,
    "decoder.remat": "none",
    "data.source": "pages",
    "data.template": "direct",
    "data.tokenizer": "bytes",
    "data.synthetic.questions": 2,
    "data.max_length": 64,
    "data.max_images": 1,
    "optimizer.groups": {"default": {"algorithm": "adamw", "lr": 1e-3}},
    "train.batch_size": 8,
    "train.compute_dtype": "bfloat16",
}


def config_of(matmul: str, steps: int) -> Config:
    source = default_config()
    source.update_from_flattened_dict(SETTINGS | {"train.steps": steps, "train.matmul": matmul})
    return build_config(source)


def losses(config: Config) -> Iterator[float]:
    """Of every step."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = build_program(config, mesh, config.train.steps)
    stream = TrainingStream(open_source(config.data, "train"), config.data_spec)
    with use_mesh(mesh):
        state, step = program.jit_begin()(program.draw(jax.random.key(0))), program.jit_step()
        for _ in range(config.train.steps):
            state, numbers = step(state, put_batch(mesh, next(stream).batch))
            yield float(numbers["loss"])
    stream.close()


def main() -> None:
    steps = int(sys.argv[1]) if sys.argv[1:] else 150
    curves = {name: np.array(list(losses(config_of(name, steps)))) for name in ("compute_dtype", "fp8")}
    lines = ["| steps | bfloat16 | fp8 | fp8 / bfloat16 |", "|---|---|---|---|"]
    for end in range(WINDOW, steps + 1, WINDOW):
        one, other = (curve[end - WINDOW : end].mean() for curve in curves.values())
        lines.append(f"| {end - WINDOW + 1} to {end} | {one:.4f} | {other:.4f} | {other / one:.3f} |")
    print("\n".join(lines))
    write_section("fp8", "\n".join(lines), OUTPUT)


if __name__ == "__main__":
    main()
