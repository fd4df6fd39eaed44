"""Twenty losses of a small run, compared with those written down: any change of the arithmetic shows here first.

python -m tests.unit.test_curve      # writes the file again; the commit that does so says why the numbers changed
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from deepstack_jax.config import Config, MeshConfig, build_config, default_config
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core.program import build_program
from tests.unit.tiny import TINY, draw_params

GOLDEN = Path(__file__).with_name("curve.json")
STEPS = 20


def small(matmul: str) -> Config:
    """DeepStack-L on the demo's pages, under AdamW: Muon's first steps would blow rounding up."""
    config = default_config()
    changes = {
        "image.size": 64,
        "image.global_filter": "box",
        "vision.patch_size": 16,
        "data.source": "pages",
        "data.template": "direct",
        "data.tokenizer": "bytes",
        "data.synthetic.questions": 2,
        "data.max_length": 64,
        "data.max_images": 1,
        "decoder.vocab_size": 260,
        "train.steps": STEPS,
        "train.accumulation": 2,
        "train.matmul": matmul,
        "optimizer.groups": {"default": {"algorithm": "adamw", "lr": 1e-3, "eps": 1e-4}},
    }
    config.update_from_flattened_dict(TINY | changes)
    return build_config(config)


def curve(mesh_config: MeshConfig, matmul: str = "compute_dtype") -> list[float]:
    """Loss of every step. Parameters are drawn by numpy, so that they do not change with jax's random bits."""
    config = small(matmul)
    mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.data * mesh_config.fsdp * mesh_config.tensor])
    program = build_program(config, mesh, STEPS)
    stream = TrainingStream(open_source(config.data, "train"), config.data_spec)
    state = jax.device_put(program.begin(draw_params(program.shapes)), program.shardings)
    losses = []
    with use_mesh(mesh):
        step = program.jit_step()
        for _ in range(STEPS):
            state, numbers = step(state, put_batch(mesh, next(stream).batch))
            losses.append(float(numbers["loss"]))
    stream.close()
    return losses


@pytest.mark.parametrize("mesh", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_the_losses_are_those_written_down(mesh):
    golden = json.loads(GOLDEN.read_text())
    assert golden[0] - golden[-1] > 0.3, "a curve on which nothing is learnt would hide much"
    np.testing.assert_allclose(curve(MeshConfig(*mesh)), golden, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_losses_in_fp8_are_near_them():
    golden, rounded = json.loads(GOLDEN.read_text()), curve(MeshConfig(1, 1, 1), "fp8")
    apart = np.abs(np.divide(rounded, golden) - 1)
    assert 1e-5 < apart.max() < 0.02, f"{apart.max():.2%} apart"
    assert apart.mean() < 0.01, f"{apart.mean():.2%} apart in the mean"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(curve(MeshConfig(1, 1, 1))) + "\n")
