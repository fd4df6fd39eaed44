"""Arithmetic of a training step, counted from its configuration.

Two counts: *model* FLOPs are what the mathematics asks for, *executed* ones what the program does, recomputation and masked
attention scores included. Utilisation (MFU) is model FLOPs over time and peak, so recomputing never raises it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deepstack_jax.config import Config
from deepstack_jax.families.base import Names, Row, decoder_of, tower_of
from deepstack_jax.families.forms import projector_names
from deepstack_jax.train.core.optimizer import FROZEN
from deepstack_jax.weights.adapters import adapter_paths
from deepstack_jax.weights.names import NameTable

ADAPTERS = "adapters"  # the part of a step that no part of the model is: they are multiplied as they are, fp8 or not


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

    # In the order of the forward pass: tower, projector, decoder, attention, head; what LoRA adds, wherever, is "adapters"
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
    kernel: str  # path of the parameter; empty = attention
    forward: float  # what the mathematics asks for
    executed: float  # what the program computes for it in the forward pass
    again: float  # how many times it does so once more in the backward pass
    below: int  # parameters of the stages before this one have a gradient that flows through its input


def step_flops(
    config: Config, groups: dict[str, str], rows: int, length: int, *, squares: int | float | None = None, masked: bool = True
) -> Flops:
    """FLOPs of one training step: its matrix products, beside which the rest, and an AdamW update, are a few thousandths.

    Every crop slot and every position counts, filled or not: the program does not know them apart.

    Args:
      groups: optimizer group of every parameter, or "frozen": a frozen kernel has no weight gradient, and one below which
        nothing trains has no backward pass at all.
      rows: of the global batch, over all its micro-batches.
      length: T.
      squares: sum of the squared lengths of the batch's segments; None = every row is one segment. The model's share of
        causal attention is half of it.
      masked: whether the attention kernel also computes the scores that the mask hides. XLA's does; a flash kernel does not,
        and computes the others once more in the backward pass instead.
    """
    parts: dict[str, list[float]] = {}
    for _, part in product_flops(config, groups, rows, length, squares=squares, masked=masked):
        sums = parts.setdefault(part.name, [0.0, 0.0, 0.0])
        for at, value in enumerate((part.forward, part.backward, part.executed)):
            sums[at] += value
    return Flops(tuple(Part(name, *sums) for name, sums in parts.items()))


def product_flops(
    config: Config, groups: dict[str, str], rows: int, length: int, *, squares: int | float | None = None, masked: bool = True
) -> Iterator[tuple[str, Part]]:
    """The same by product: (path of its kernel, "" of attention's two; the part that it belongs to, with its FLOPs alone)."""
    every = float(rows * length**2)
    products = [
        *_tower(config, rows),
        *_projectors(config, rows),
        *_decoder(config, rows * length),
        _attention(config, every if squares is None else float(squares), every, masked),
        _head(config, rows, length),
    ]
    first = min((_stage(config, path) for path, group in groups.items() if group != FROZEN), default=_UNUSED)
    for product in _with_adapters(config, groups, products):
        inputs = first < product.below
        weights = groups[product.kernel] != FROZEN if product.kernel else inputs
        backward = inputs + weights
        again = product.again if backward else 0
        executed = product.executed * (1 + backward + again)
        yield product.kernel, Part(product.part, product.forward, product.forward * backward, executed)


def _with_adapters(config: Config, groups: dict[str, str], products: list[_Product]) -> Iterator[_Product]:
    """The products, each before the two of its kernel's adapter, through whose second a gradient always flows."""
    table = NameTable(config).leaves
    for product in products:
        yield product
        a, b, _ = adapter_paths(product.kernel)
        if a in groups:
            leaf = table[product.kernel]
            for path, share, below in (
                (a, config.lora.rank / math.prod(leaf.layer_shape[leaf.inputs :]), product.below),
                (b, config.lora.rank / math.prod(leaf.layer_shape[: leaf.inputs]), _UNUSED + 1),
            ):
                forward, executed = product.forward * share, product.executed * share
                yield product._replace(part=ADAPTERS, kernel=path, forward=forward, executed=executed, below=below)


# In the order of the forward pass; a gradient flows through the input of a product where something of a stage before trains.
_TOWER, _PROJECTOR, _LAYERS, _NORM, _UNUSED = range(5)


def _stage(config: Config, path: str) -> int:
    """Where in the forward pass a parameter is first used."""
    if path.startswith("vision_tower/"):
        return _UNUSED if path.startswith(tower_of(config).unused(config.vision)) else _TOWER
    if path.startswith(("projector/", "deepstack_mergers_")):
        return _PROJECTOR
    if path.startswith(("embed/", "image_newline", "layers/layers/")):
        return _LAYERS
    return _NORM if path.startswith("layers/") else _UNUSED


def _kernels(names: Names) -> Iterator[tuple[Row, float]]:
    """The kernels of a part of the model, and the elements of each (of one layer)."""
    for row in names.rows:
        if "|" in row.sizes:
            yield row, float(math.prod(names.sizes[letter] for letter in row.sizes.replace("|", " ").split()))


def _tower(config: Config, rows: int) -> Iterator[_Product]:
    """Patches, and the layers whose output is used. A layer that is recomputed needs all but its last product."""
    vision, family, remat = config.vision, tower_of(config), config.decoder.remat != "none"
    tokens = squares = 0.0
    for sequences, each, layers in _encoded(config, rows):
        tokens += sequences * each * layers
        squares += sequences * each**2 * layers
    for row, size in _kernels(family.names(config)):
        if "{}" in row.theirs:
            again = remat and not row.ours.endswith(f"/{family.last_kernel}/kernel")
            yield _Product("tower", row.ours, 2 * tokens * size, 2 * tokens * size, again, _TOWER + 1)
        else:
            flops = 2.0 * rows * config.data_spec.crop_slots * config.patch_side**2 * size
            yield _Product("tower", row.ours, flops, flops, 0, _TOWER)
    attention = 4 * squares * vision.width
    yield _Product("tower", "", attention, attention, remat, _TOWER + 1)


def _encoded(config: Config, rows: int) -> Iterator[tuple[int, int, int]]:
    """(sequences, tokens of each, layers that they run through) of the tower."""
    run, patches = config.deepstack.tower_layers(config.vision), config.patch_side**2
    prefix = tower_of(config).prefix_tokens(config.vision)
    slots, images = rows * config.data_spec.crop_slots, rows * config.data_spec.images_per_row
    if config.deepstack.into == "vision":  # all views to the first injection, the global views from there
        schedule = config.deepstack.tower_schedule(config.vision, config.layout.groups)
        first = schedule.index(0) if 0 in schedule else run
        yield slots, patches + prefix, first
        yield images, patches + prefix, run - first
    elif config.deepstack.high_res == "view":  # an image's crops are one large picture
        yield images, patches + prefix, run
        yield images, (config.layout.max_views - 1) * patches + prefix, run
    else:
        yield slots, patches + prefix, run


def _projectors(config: Config, rows: int) -> Iterator[_Product]:
    """On the tokens that are used, of the sequence and of every group, each tap's by its merger; recomputed as a layer is."""
    shape, stack = config.data_spec.batch_shape(rows, config.data.max_length), config.deepstack
    views = 1 if stack.into in ("vision", "channels") else 1 + shape.groups - len(stack.taps)
    for merger, names in enumerate(projector_names(config)):
        tokens = rows * shape.visual * (1 if merger else views)
        if stack.pool > 1:
            tokens = rows * shape.crops * config.patch_side**2
        kernels = list(_kernels(names))
        for number, (row, size) in enumerate(kernels, 1):
            again = config.decoder.remat != "none" and number < len(kernels)
            below = _TOWER + 1 if number == 1 and not merger else _PROJECTOR + 1  # a merger begins with a norm
            yield _Product("projector", row.ours, 2.0 * tokens * size, 2.0 * tokens * size, again, below)


def _decoder(config: Config, tokens: int) -> Iterator[_Product]:
    """The kernels of all layers. A layer that is recomputed needs all but its last product, and those that are kept."""
    family, remat = decoder_of(config), config.decoder.remat
    known = [family.last_kernel] + [family.middle_kernel] * (remat == "minimal")
    for row, size in _kernels(family.names(config)):
        if "{}" in row.theirs:
            flops = 2.0 * tokens * config.decoder.layers * size
            again = remat in ("block", "minimal", "offload") and not row.ours.endswith(tuple(f"/{one}/kernel" for one in known))
            yield _Product("decoder", row.ours, flops, flops, again, _LAYERS + 1)


def _attention(config: Config, pairs: float, all_pairs: float, masked: bool) -> _Product:
    """Scores and weighted values of all layers; a window counts as the causal triangle that holds it."""
    cfg = config.decoder
    each = 4.0 * cfg.layers * cfg.heads * cfg.head_dim  # of a pair of positions
    again = {"none": 0.0, "minimal": 0.5 if masked else 0.0}.get(cfg.remat, 1.0)  # where they exist, scores are never kept
    if masked:
        return _Product("attention", "", each * pairs / 2, each * all_pairs, again, _LAYERS + 1)
    return _Product("attention", "", each * pairs / 2, each * pairs / 2, again + 0.5, _LAYERS + 1)


def _head(config: Config, rows: int, length: int) -> _Product:
    """Logits, a chunk of positions at a time, and with them their gradients."""
    chunk, path = min(config.train.loss_chunk, length), "embed/embedding" if config.decoder.tied_head else "head/kernel"
    each = 2.0 * rows * config.decoder.width * config.decoder.vocab_size
    return _Product("head", path, each * length, each * -(-length // chunk) * chunk, 0, _NORM + 1)
