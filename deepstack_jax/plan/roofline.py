"""How long a step takes at least, by what it computes, moves through each chip's memory, and moves between the chips."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from deepstack_jax.config import Config
from deepstack_jax.families.base import decoder_of, tower_of
from deepstack_jax.parallel.chips import Chip
from deepstack_jax.parallel.mesh import AXES, across_slices
from deepstack_jax.plan.collectives import Collective, ring
from deepstack_jax.plan.memory import bytes_per_device
from deepstack_jax.plan.topology import GPUS_PER_HOST
from deepstack_jax.train.core.optimizer import split
from deepstack_jax.train.core.program import Program
from deepstack_jax.train.flops import Flops

# Share of the peak that large bf16 products are taken to reach: 770 to 798 of 989 TFLOP/s are reported for plain products on an
# H200. No step of this package was measured on one.
ATTAINED = 0.8


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step by resource."""

    compute: float  # executed FLOPs at the share of the peak that large products reach
    memory: float  # traffic to and from each chip's memory, estimated
    links: float  # traffic between chips at the links' published rate
    exposed: float  # of the links' time that of collectives which nothing runs beside

    @property
    def step(self) -> float:
        """The estimate: what overlaps at once, perfectly, and then what does not."""
        return max(self.compute, self.memory, self.links - self.exposed) + self.exposed

    @property
    def least(self) -> float:
        """All three at once, perfectly overlapped: a lower bound."""
        return max(self.compute, self.memory, self.links)

    @property
    def serial(self) -> float:
        """One after the other, nothing overlapped."""
        return self.compute + self.memory + self.links

    @property
    def bound(self) -> str:
        """The resource that limits the step."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


def estimate(
    program: Program, chip: Chip, flops: Flops, collectives: Iterable[Collective], rows: int, length: int, *, slices: int = 1
) -> Roofline:
    """The roofline of a step of `rows` rows of `length` positions, on a mesh of so many slices of chips of a kind."""
    devices = program.mesh.size
    seconds = {True: 0.0, False: 0.0}
    for one in collectives:
        seconds[one.hidden] += one.total / link_rate(chip, one, devices // slices)
    return Roofline(
        compute=at_peak(program.config, chip, {part.name: part.executed for part in flops.parts}) / (devices * ATTAINED),
        memory=memory_traffic(program, rows, length) / chip.hbm_bandwidth,
        links=sum(seconds.values()),
        exposed=seconds[False],
    )


def at_peak(config: Config, chip: Chip, flops: Mapping[str, float]) -> float:
    """Seconds of one chip at its peak for FLOPs by part of the step, the decoder's kernels in fp8 where it trains so."""
    fast = flops["decoder"] if config.train.matmul == "fp8" else 0.0
    return chip.seconds(sum(flops.values()) - fast, fast)


def link_rate(chip: Chip, one: Collective, devices: int) -> float:
    """Bytes per second that enter a device in a collective.

    In a torus: over all links where all devices of the slice take part, else over those of one dimension; between slices, over
    the network. Behind a switch: at its rate within a host, else through the adapters of the host's devices that take part.
    """
    if one.across:
        return chip.network
    if chip.links > 1:
        return chip.link_bandwidth if one.group == devices else chip.link_bandwidth / chip.links
    neighbours = max(1, min(one.group, GPUS_PER_HOST // one.stride))
    return chip.link_bandwidth if neighbours == one.group else min(chip.link_bandwidth, chip.network * neighbours)


def guess_collectives(program: Program, rows: int, length: int, slices: int = 1) -> list[Collective]:
    """The collectives that a step cannot do without, where nothing is compiled.

    Kernels are gathered along fsdp for every pass of every micro-batch and their gradients scattered back, gradients added
    up along data, and hidden states along tensor, twice a layer and pass. Along an axis that crosses slices each device first
    exchanges its own share with its like in the others. Weights and gradients are taken to travel beside products, which do not
    wait for them; hidden states are waited for.
    """
    config, mesh, cfg = program.config, program.mesh.shape, program.config.decoder
    width, parts = np.dtype(program.model.dtype).itemsize, config.train.accumulation
    trainable, _ = split(program.abstract_state().params, program.groups)
    whole = sum(program.sizes.values()) / mesh["tensor"] * width
    trained = sum(program.sizes[path] for path in trainable) / mesh["tensor"] * 4  # float32, whatever activations are
    hidden = width * rows * length * cfg.width / (mesh["data"] * mesh["fsdp"] * parts)
    remat = cfg.remat != "none"
    strides = {"data": mesh["fsdp"] * mesh["tensor"], "fsdp": mesh["tensor"], "tensor": 1}
    found = [
        ("all-gather", "fsdp", (2 + remat) * parts, whole, "parameters"),
        ("reduce-scatter", "fsdp", parts, trained / mesh["fsdp"], "gradients"),
        ("all-reduce", "data", parts, trained / mesh["fsdp"], "gradients"),
        ("all-reduce", "tensor", 2 * cfg.layers * (2 + (cfg.remat in ("block", "offload"))) * parts, hidden, "hidden states"),
    ]
    between: dict[str, int] = dict(zip(AXES, across_slices(tuple(mesh.values()), slices), strict=True))
    collectives = []
    for kind, axis, times, size, source in found:
        far, near = between[axis], mesh[axis] // between[axis]
        # Gradients are scattered within the slice first, so that across slices goes the share of one device.
        within, beyond = (size * far, size) if kind == "reduce-scatter" else (size, size / near)
        for part, group, across in ((within, near, False), (beyond, far, True)):
            moved, stride = part * ring(kind, group), 1 if across else strides[axis]
            said = f"{source}, estimated"
            collectives.append(Collective(kind, times, int(part), moved, group, stride, said, across, axis != "tensor"))
    return [one for one in collectives if one.group > 1]


def memory_traffic(program: Program, rows: int, length: int) -> float:
    """Bytes that a device reads and writes per step, estimated from shapes: weights, optimizer, activations, scores."""
    config, mesh, cfg = program.config, program.mesh.shape, program.config.decoder
    width, tensor = np.dtype(program.model.dtype).itemsize, mesh["tensor"]
    local = rows / (mesh["data"] * mesh["fsdp"])
    state = program.abstract_state()
    trainable, _ = split(state.params, program.groups)
    passes = 3 + (cfg.remat != "none")  # forward, twice backward, recomputed
    weights = sum(program.sizes.values()) / tensor * width * 2 * passes * config.train.accumulation  # gathered and read
    update = bytes_per_device(trainable) * 3 + 2 * bytes_per_device(state.opt_state)  # gradient, parameters; moments both ways
    each = decoder_of(config).layer(cfg, tensor).traffic
    activations = local * length * cfg.layers * each * width * passes
    scores = local * cfg.heads / tensor * length**2 * cfg.layers * 12 * passes * program.kernels.scores_exist
    return weights + update + activations + scores + _tower_traffic(program, local, tensor, width)


def _tower_traffic(program: Program, local: float, tensor: int, width: int) -> float:
    """The same of the vision tower's forward pass, beside which its backward pass is left out."""
    config, cfg, tower = program.config, program.config.vision, tower_of(program.config)
    tokens, each = config.patch_side**2 + tower.prefix_tokens(cfg), tower.layer(cfg).traffic
    crops = local * config.data_spec.crop_slots / tensor  # which lie over all devices
    scores = 12 * cfg.heads * tokens**2 * program.kernels.tower_scores_exist
    return crops * config.deepstack.tower_layers(cfg) * (tokens * each * width + scores)
