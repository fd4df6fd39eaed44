"""Memory of each device by kind: the state exactly, from its shardings; what a step makes beside it, estimated."""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from deepstack_jax.config import Config
from deepstack_jax.families.base import decoder_of, tower_of
from deepstack_jax.parallel.kernels import most_segments
from deepstack_jax.train.core.optimizer import FROZEN, split
from deepstack_jax.train.core.program import Program
from deepstack_jax.types import PyTree

_LAYER_KERNEL = re.compile(r"layers/layers/.*/kernel$")


class StateMemory(NamedTuple):
    """Bytes on each device of what a step is given, exact before the compiler's padding."""

    parameters: float
    optimizer: float
    batch: float


class ActivationMemory(NamedTuple):
    """Bytes on each device of what a step makes, as estimated: each at its largest, which need not be at one time."""

    gradients: float
    activations: float  # kept from the forward pass for the backward pass
    stacks: float
    working: float  # of the largest moment: one layer's, one chunk of logits


def bytes_per_device(tree: PyTree) -> float:
    """Bytes of a tree of abstract arrays on each device, by their shardings."""

    def one(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    return float(sum(one(leaf) for leaf in jax.tree.leaves(tree)))


def state_memory(program: Program, rows: int, length: int) -> StateMemory:
    """What the step's arguments take."""
    state = program.abstract_state()
    return StateMemory(
        bytes_per_device(state.params),
        bytes_per_device(state.opt_state),
        bytes_per_device(program.abstract_batch(rows, length)),
    )


def activation_memory(program: Program, rows: int, length: int) -> ActivationMemory:
    """Estimate of what the step takes beside its arguments."""
    config, shape = program.config, program.mesh.shape
    local = rows / (shape["data"] * shape["fsdp"] * config.train.accumulation)  # rows of a micro-batch on a device
    width = np.dtype(program.model.dtype).itemsize
    trainable, _ = split(program.abstract_state().params, program.groups)
    return ActivationMemory(
        gradients=bytes_per_device(trainable) * (2 if config.train.accumulation > 1 else 1),
        activations=width * (_decoder_saved(program, local, length) + _tower_saved(program, local)),
        stacks=2.0 * width * _stack(config, local) / shape["tensor"],  # and its gradient
        working=_working(program, local, length),
    )


def _decoder_saved(program: Program, local: float, length: int) -> float:
    """Elements that the decoder keeps: the inputs of its layers, and under some policies their products."""
    cfg, tensor = program.config.decoder, program.mesh.shape["tensor"]
    layer = decoder_of(program.config).layer(cfg, tensor)
    scores = 2 * cfg.heads * length / tensor * program.kernels.scores_exist
    # Of attention's softmax, float32; cuDNN has one for each segment that a row may have.
    sums = most_segments(program.config) if program.kernels.decoder == "cudnn" else 1
    each = {
        "block": cfg.width,
        "minimal": 2 * cfg.width + (cfg.heads * cfg.head_dim + 2 * cfg.heads * sums) / tensor,
        "dots": cfg.width + layer.products,
        "offload": 0,  # they lie in the host's memory
        "none": layer.kept + scores,
    }[cfg.remat]
    return local * length * cfg.layers * each


def _tower_saved(program: Program, local: float) -> float:
    """Elements that the tower keeps, nothing where it is frozen."""
    config, cfg, tower = program.config, program.config.vision, tower_of(program.config)
    if not any(path.startswith("vision_tower/") and group != FROZEN for path, group in program.groups.items()):
        return 0.0
    tokens = config.patch_side**2 + tower.prefix_tokens(cfg)
    # Where nothing is recomputed, scores several times over too, in float32, if there are any.
    scores = 8 * cfg.heads * tokens * program.kernels.tower_scores_exist
    each = tower.layer(cfg).kept + scores if config.decoder.remat == "none" else cfg.width
    crops = local * config.data_spec.crop_slots / program.mesh.shape["tensor"]
    return crops * tokens * config.deepstack.tower_layers(cfg) * each


def _stack(config: Config, local: float) -> float:
    """Elements of the groups that are injected, over all devices along tensor: in decoder width, or in the tower's own."""
    shape = config.data_spec.batch_shape(1, config.data.max_length)
    width = config.vision.width if config.deepstack.into in ("vision", "channels") else config.decoder.width
    return local * shape.groups * shape.visual * width


def _working(program: Program, local: float, length: int) -> float:
    """Bytes of the largest moment: a layer's scores and products with their gradients, its gathered weights, or logits."""
    config, cfg, tensor = program.config, program.config.decoder, program.mesh.shape["tensor"]
    width = np.dtype(program.model.dtype).itemsize
    rows = max(1.0, local)
    # Scores, probabilities and the gradients of both, in float32: with three of them HD came out a fifth below its compilation.
    scores = 4 * 4 * rows * cfg.heads / tensor * length**2 * program.kernels.scores_exist
    layer = decoder_of(config).layer(cfg, tensor)
    products = width * rows * length * layer.working
    trains = any(group != FROZEN for path, group in program.groups.items() if _LAYER_KERNEL.match(path))
    weights = (2 * width + 4 * trains) * layer.kernels  # this layer's and the next one's, and the gradient
    chunk = min(config.train.loss_chunk, length)
    logits = 3 * 4 * rows * chunk * cfg.vocab_size / tensor + 2 * width * cfg.width * cfg.vocab_size / tensor
    patches = config.patch_side**2
    features = width * rows * config.data_spec.crop_slots * patches * config.vision.width / tensor
    features *= 1 + len(set(config.deepstack.tapped(config.vision)) - {config.vision.layers_run})
    return max(scores + products + weights, logits) + features
