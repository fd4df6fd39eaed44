"""Gradients under bfloat16 activations beside those in float32, every leaf of the tree, through the train step itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.families.base import tower_of
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core.optimizer import flatten, unflatten
from deepstack_jax.train.core.state import new_state
from tests.distributed.cases import FUSED, MESHES, VARIANTS, program_of
from tests.unit.tiny import FAMILIES, FIRST_WORD, draw_params, example, make_batch, tiny_config

pytestmark = pytest.mark.usefixtures("optimized")  # as real steps are

ROWS, LENGTH = 8, 256
NORM, COSINE = 0.02, 0.999
SIZES = {
    "vision.width": 64,
    "vision.heads": 8,
    "vision.mlp": 96,
    "vision.layers": 4,
    # Large enough that the gradient of the embedding is a scatter, as it is for a real vocabulary.
    "decoder.vocab_size": 1024,
    "decoder.width": 64,
    "decoder.heads": 8,
    "decoder.kv_heads": 8,
    "decoder.mlp": 96,
    "data.max_length": LENGTH,
    "data.max_images": 2,
    "train.batch_size": ROWS,
    "train.loss_chunk": 64,
    # The first moment is then a tenth of the gradient itself.
    "optimizer.clip_norm": 1e9,
    "optimizer.groups": {"default": {"algorithm": "adamw", "lr": 0.1, "b1": 0.9, "eps": 0.01}},
}


def config_of(variant: str, dtype: str, accumulation: int = 1) -> Config:
    return tiny_config(
        SIZES | (VARIANTS | FUSED | FAMILIES)[variant] | {"train.compute_dtype": dtype, "train.accumulation": accumulation}
    )


def batch_of(variant: str, packed: bool) -> Batch:
    """Rows of hundreds of tokens, two segments or one; one word is at most places of all rows, over 1,000 times."""
    config = config_of(variant, "float32")
    grids = [(2, 2)] if variant.startswith("V") else [(2, 2), (1, 2), (2, 1), (1, 3)]
    rows = []
    for row in range(ROWS):
        first = example(config, 2 * row, [grids[row % len(grids)]], words=40, answer=50 if packed else 100)
        second = example(config, 2 * row + 1, [], words=20, answer=30)
        rows.append([first, second] if packed else [first])
    batch = make_batch(config, rows, LENGTH)
    often = np.random.default_rng(0).random(batch.tokens.shape) < 0.9
    batch.tokens[often & (batch.visual_index < 0) & (batch.segment_ids > 0)] = FIRST_WORD
    assert (batch.tokens == FIRST_WORD).sum() > 1_000
    return batch


def draw(shapes: Any) -> Any:
    """Noise as large as a model's own: kernels keep the size of what they multiply, and a branch adds little to its stream.

    Larger kernels make attention sharp and the model rough, and rounding then moves gradients whatever they are added up in.
    """
    flat = flatten(draw_params(shapes))
    width = np.sqrt(64)
    factor = {"kernel": 5 / width, "bias": 0.5, "scale": 1.0, "embedding": 1.0}
    branch = ("o/kernel", "down/kernel", "fc2/kernel")
    return unflatten(
        {
            path: leaf * factor.get(path.rsplit("/")[-1], 1.0) * (0.3 if path.endswith(branch) and "layers" in path else 1.0)
            for path, leaf in flat.items()
        }
    )


@cache
def gradients(variant: str, dtype: str, mesh: str = "one", packed: bool = True, accumulation: int = 1) -> dict[str, np.ndarray]:
    """A tenth of the gradient of every leaf."""
    program = program_of(config_of(variant, dtype, accumulation), MESHES.get(mesh, (1, 1, 1)))

    params = draw(program.shapes)
    state = jax.jit(lambda params: new_state(params, program.groups, program.optimizer))(params)
    state = jax.device_put(state, program.shardings)
    with use_mesh(program.mesh):
        state, _ = program.jit_step()(state, put_batch(program.mesh, batch_of(variant, packed)))
    found = jax.tree_util.tree_leaves_with_path(state.opt_state)
    moments = {path[-1].key: np.asarray(leaf, np.float64) for path, leaf in found if ".mu" in jax.tree_util.keystr(path)}
    assert moments.keys() == program.sizes.keys()
    return moments


def check(variant: str, mesh: str, packed: bool, accumulation: int) -> None:
    """The norm of every leaf's gradient, and its direction, are those of float32 on one device."""
    whole = gradients(variant, "float32", packed=packed)
    half = gradients(variant, "bfloat16", mesh, packed, accumulation)
    total = np.sqrt(sum((leaf**2).sum() for leaf in whole.values()))
    wrong, config = [], config_of(variant, "float32")
    # Their true gradient is zero: softmax does not see what all keys have in common, and no feature depends on the others.
    none = ("vision_tower/layers/block/k/bias", *tower_of(config).unused(config.vision))
    for path, leaf in whole.items():
        one, two = np.linalg.norm(leaf), np.linalg.norm(half[path])
        if path.startswith(none):
            assert max(one, two) < 1e-3 * total, path
        else:
            assert one > 1e-5 * total, f"{path} has no gradient to compare"
            error, cosine = abs(two / one - 1), (leaf * half[path]).sum() / (one * two)
            if not (error <= NORM and cosine >= COSINE):
                wrong.append(f"{path}: norm {error:.2%} off, cosine {cosine:.5f}")
    assert not wrong


@pytest.mark.parametrize(
    ("variant", "mesh", "packed", "accumulation"),
    [("L", "dp2xfsdp2xtp2", True, 2), ("V", "one", False, 1)],
)
def test_gradients(variant, mesh, packed, accumulation):
    check(variant, mesh, packed, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mesh", ["one", "fsdp8", "dp2xfsdp2xtp2"])
@pytest.mark.parametrize("variant", [*VARIANTS, *FUSED, *FAMILIES])
def test_gradients_everywhere(variant, mesh, packed, accumulation):
    check(variant, mesh, packed, accumulation)
