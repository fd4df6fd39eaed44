"""A tiny model whose sizes divide by eight, batches of mixed rows for it, and its step on any mesh."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import numpy as np

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config, MeshConfig
from deepstack_jax.model.quantised import QuantisedKernel, unpack
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core.optimizer import flatten
from deepstack_jax.train.core.program import Program, build_program
from deepstack_jax.types import TrainState
from tests.unit.lora import LORA
from tests.unit.tiny import FAMILIES, draw_params, example, make_batch, tiny_config

ROWS, LENGTH = 16, 48
DIVISIBLE = {
    "decoder.vocab_size": 64,
    "decoder.heads": 8,
    "decoder.kv_heads": 8,
    "vision.heads": 8,
    "vision.layers": 4,
    "data.max_length": LENGTH,
    "data.max_images": 2,
    "train.batch_size": ROWS,
    # Not Adam's usual epsilon: the update would be the sign of a gradient near zero, and rounding would decide it.
    "optimizer.groups": {
        "default": {
            "algorithm": "adamw",
            "lr": 0.1,
            "eps": 0.01,
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 0.01,
            "moment_dtype": "float32",
        }
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "L": {},
    "V": {"image.grid": "square", "deepstack.into": "vision", "deepstack.vision_start": 1},
    # Beside crops in layers 0, 1 and 3; the second hidden state is one that no feature needs.
    "taps": {
        "deepstack.stack": "crops_taps",
        "deepstack.schedule": (0, 1, -1, 2, -1),
        "deepstack.taps": ((1, 2), (-1, 4)),
    },
    "HD": {"image.mode": "hd", "image.merge": "spatial_unpad", "data.max_images": 1},
}
# All groups at once into the sequence's tokens
FUSED = {into: {"deepstack.into": into} for into in ("input", "channels")}
# Most of such a model does not move.
ADAPTED: dict[str, dict[str, Any]] = {"LoRA": LORA, "quantised": LORA | {"lora.base_dtype": "nf4"}}
MESHES = {
    "dp8": (8, 1, 1),
    "fsdp8": (1, 8, 1),
    "tp8": (1, 1, 8),
    "dp2xfsdp2xtp2": (2, 2, 2),
    "dp4xtp2": (4, 1, 2),
    "fsdp4xtp2": (1, 4, 2),
    "dp2xfsdp4": (2, 4, 1),
    "fsdp2xtp4": (1, 2, 4),
}


def config_of(variant: str, accumulation: int = 1) -> Config:
    return tiny_config(DIVISIBLE | (VARIANTS | FUSED | ADAPTED | FAMILIES)[variant] | {"train.accumulation": accumulation})


def program_of(config: Config, sizes: tuple[int, int, int]) -> Program:
    devices = jax.devices()[: int(np.prod(sizes))]
    return build_program(config, make_mesh(MeshConfig(*sizes), devices), 10)


@cache
def batches(variant: str) -> tuple[Batch, Batch]:
    """Two batches of rows with text alone, one image, and two examples packed, supervised tokens in unequal numbers."""
    config = config_of(variant)
    grids = [(2, 2)] if variant.startswith("V") else [(2, 2), (1, 2), (2, 1), (1, 3)]

    def row(seed: int) -> list:
        image = [grids[seed % len(grids)]]
        text = example(config, 3 * seed, [], answer=seed % 5)
        if seed % 3 == 0:
            return [text]
        alone = example(config, 3 * seed + 1, image, answer=1 + seed % 4)
        return [alone] if seed % 3 == 1 else [example(config, 3 * seed + 2, [], words=1, answer=2), alone]

    return tuple(make_batch(config, [row(first + at) for at in range(ROWS)], LENGTH) for first in (0, 100))  # pyright: ignore


def start(program: Program) -> TrainState:
    """The same noise for parameters on every mesh, where it belongs there."""
    params = draw_params(program.shapes)
    state = jax.jit(program.begin)(params)
    return jax.device_put(state, program.shardings)


def is_quantised(leaf: Any) -> bool:
    return isinstance(leaf, QuantisedKernel)


def code_by_code(leaf: Any) -> Any:
    """A kernel that is packed on one mesh need not be on another."""
    if not is_quantised(leaf) or leaf.packed is None:
        return leaf
    return dataclasses.replace(leaf, codes=unpack(leaf.codes, leaf.packed), packed=None)


def two_steps(program: Program, variant: str) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """(state, metrics) after one step and after two; the first moment after one is a tenth of the clipped gradient."""
    state, step, found = start(program), program.jit_step(), []
    with use_mesh(program.mesh):
        for batch in batches(variant):
            state, metrics = step(state, put_batch(program.mesh, batch))
            leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(code_by_code, state, is_leaf=is_quantised))
            found.append(({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, jax.device_get(metrics)))
    return found


def parameters(state: TrainState) -> dict[str, jax.Array]:
    return flatten(state.params)
