"""Arithmetic of a training step, counted from its configuration.

Two counts: *model* FLOPs are what the mathematics asks for, *executed* ones what the program does, recomputation and masked
attention scores included. Utilisation (MFU) is model FLOPs over time and peak, so recomputing never raises it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deepstack_jax.config import Config
from deepstack_jax.train.core.optimizer import FROZEN


@dataclass(frozen=True)
class Part:
    """FLOPs of one part of a step, over all devices; a multiply-add is two."""

    name: str
    forward: float
    backward: float
    executed: float  # forward, backward and what is recomputed; masked attention scores included

    @property
    def model(self) -> float:
        """What the mathematics asks for."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step, by part."""

    parts: tuple[Part, ...]

    @property
    def model(self) -> float:
        """What the mathematics asks for: the numerator of MFU."""
        return sum(part.model for part in self.parts)

    @property
    def executed(self) -> float:
        """What the program computes."""
        return sum(part.executed for part in self.parts)


class _Product(NamedTuple):
    """Matrix products with one kernel, or of attention, which has none."""

    part: str
    kernel: str  # its path; empty = attention
    forward: float  # what the mathematics asks for
    executed: float  # what the program computes for it in the forward pass
    again: float  # how many times it does so once more in the backward pass
    below: tuple[str, ...]  # beginnings of the parameters whose gradient flows through its input


# Whose gradients flow through the input of a tower layer, of a later layer of the projector, of a decoder layer, of the head.
_TOWER = tuple(f"vision_tower/{name}" for name in ("patch_embed/", "cls", "positions", "pre_norm/", "layers/"))
_PROJECTOR = (*_TOWER, "projector/")
_DECODER = (*_PROJECTOR, "embed/", "image_newline", "layers/layers/")
_HEAD = (*_DECODER, "layers/norm/")


def step_flops(
    config: Config,
    groups: dict[str, str],
    rows: int,
    length: int,
    *,
    squares: int | float | None = None,
    masked: bool = True,
) -> Flops:
    """FLOPs of one training step: its matrix products, beside which the rest, and an AdamW update, are a few thousandths.

    Every crop slot and every position counts, filled or not: the program does not know them apart.

    Args:
      config: of the run.
      groups: optimizer group of every parameter, or "frozen": a frozen kernel has no weight gradient, and one below which
        nothing trains has no backward pass at all.
      rows: of the global batch, over all its micro-batches.
      length: T.
      squares: sum of the squared lengths of the batch's segments; None = every row is one segment. The model's share of
        causal attention is half of it.
      masked: whether the attention kernel also computes the scores that the mask hides. XLA's does; a flash kernel does not,
        and computes the others once more in the backward pass instead.

    Returns:
      Parts in the order of the forward pass: tower, projector, decoder, attention, head.
    """
    every = float(rows * length**2)
    products = [
        *_tower(config, rows),
        *_projector(config, rows),
        *_decoder(config, rows * length),
        _attention(config, every if squares is None else float(squares), every, masked),
        _head(config, rows, length),
    ]
    parts = {product.part: [0.0, 0.0, 0.0] for product in products}
    for product in products:
        inputs = any(path.startswith(product.below) and group != FROZEN for path, group in groups.items())
        weights = groups[product.kernel] != FROZEN if product.kernel else inputs
        backward = inputs + weights
        again = product.again if backward else 0
        sums = parts[product.part]
        sums[0] += product.forward
        sums[1] += product.forward * backward
        sums[2] += product.executed * (1 + backward + again)
    return Flops(tuple(Part(name, *sums) for name, sums in parts.items()))


def _tower(config: Config, rows: int) -> Iterator[_Product]:
    """Patches, and the layers whose output is used. A layer that is recomputed needs all but its last product."""
    vision, block = config.vision, "vision_tower/layers/block"
    patches = rows * config.crop_slots * config.patch_side**2
    embed = 2.0 * patches * 3 * vision.patch_size**2 * vision.width
    yield _Product("tower", "vision_tower/patch_embed/kernel", embed, embed, 0, ())
    remat = config.decoder.remat != "none"
    tokens = squares = 0.0
    for sequences, each, layers in _encoded(config, rows):
        tokens += sequences * each * layers
        squares += sequences * each**2 * layers
    square, mlp = 2 * tokens * vision.width**2, 2 * tokens * vision.width * vision.mlp
    sizes = dict.fromkeys("qkvo", square) | {"fc1": mlp, "fc2": mlp}
    for name, flops in sizes.items():
        yield _Product("tower", f"{block}/{name}/kernel", flops, flops, remat and name != "fc2", _TOWER)
    attention = 4 * squares * vision.width
    yield _Product("tower", "", attention, attention, remat, _TOWER)


def _encoded(config: Config, rows: int) -> Iterator[tuple[int, int, int]]:
    """(sequences, tokens of each, layers that they run through) of the tower."""
    run, patches = config.vision.layers_run, config.patch_side**2
    slots, images = rows * config.crop_slots, rows * config.images_per_row
    if config.deepstack.into == "vision":  # all views to the first injection, the global views from there
        schedule = config.vision_schedule
        first = schedule.index(0) if 0 in schedule else run
        yield slots, patches + 1, first
        yield images, patches + 1, run - first
    elif config.deepstack.high_res == "view":  # an image's crops are one large picture
        yield images, patches + 1, run
        yield images, (config.views_per_image - 1) * patches + 1, run
    else:
        yield slots, patches + 1, run


def _projector(config: Config, rows: int) -> Iterator[_Product]:
    """On the tokens that are used, one by one of the sequence and of every group; recomputed as a layer is."""
    shape = config.batch_shape(rows, config.data.max_length)
    if config.deepstack.pool > 1:
        tokens = rows * shape.crops * config.patch_side**2
    else:
        tokens = rows * shape.visual * (1 if config.deepstack.into == "vision" else 1 + shape.groups)
    inputs, width = config.vision.width, config.decoder.width
    for number in range(1, config.projector.layers + 1):
        flops = 2.0 * tokens * inputs * width
        below = _TOWER if number == 1 else _PROJECTOR
        again = config.decoder.remat != "none" and number < config.projector.layers
        yield _Product("projector", f"projector/fc{number}/kernel", flops, flops, again, below)
        inputs = width


def _decoder(config: Config, tokens: int) -> Iterator[_Product]:
    """The kernels of all layers. A layer that is recomputed needs all but its last product."""
    cfg = config.decoder
    remat = cfg.remat in ("block", "offload")  # the other policies keep the products
    query, key = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    sizes = {"attention/q": query, "attention/k": key, "attention/v": key, "attention/o": query}
    for name, size in (sizes | dict.fromkeys(("mlp/gate", "mlp/up", "mlp/down"), cfg.mlp)).items():
        flops = 2.0 * tokens * cfg.layers * cfg.width * size
        again = remat and name != "mlp/down"
        yield _Product("decoder", f"layers/layers/block/{name}/kernel", flops, flops, again, _DECODER)


def _attention(config: Config, pairs: float, all_pairs: float, masked: bool) -> _Product:
    """Scores and weighted values of all layers; a window counts as the causal triangle that holds it."""
    cfg = config.decoder
    each = 4.0 * cfg.layers * cfg.heads * cfg.head_dim  # of a pair of positions
    remat = cfg.remat != "none"
    if masked:
        return _Product("attention", "", each * pairs / 2, each * all_pairs, remat, _DECODER)
    return _Product("attention", "", each * pairs / 2, each * pairs / 2, remat + 0.5, _DECODER)


def _head(config: Config, rows: int, length: int) -> _Product:
    """Logits, a chunk of positions at a time, each chunk computed again in the backward pass."""
    chunk = min(config.train.loss_chunk, length)
    each = 2.0 * rows * config.decoder.width * config.decoder.vocab_size
    return _Product("head", "head/kernel", each * length, each * -(-length // chunk) * chunk, 1, _HEAD)
