"""How long a step takes at least, by what it computes, moves through each chip's memory, and moves between the chips."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deepstack_jax.config import Config
from deepstack_jax.families.base import decoder_of, tower_of
from deepstack_jax.parallel.chips import Chip, has_sparse_cores
from deepstack_jax.parallel.fsdp import stage_sizes, torus_of
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
# Shares of the time of gathering and of scattering that pass beside computation, where nothing is compiled, as libtpu 0.0.42
# does it for configs/llava15.py:finetune (docs/scaling.md): with sparse cores, 86% of both on v5p:4x4x4 and 87% on v6e:8x8;
# without, of the gathered bytes 63 and 71% on the same slices, of the scattered ones none.
BESIDE_SPARSE_CORES = {"all-gather": 0.86, "reduce-scatter": 0.86}
BESIDE = {"all-gather": 0.67, "reduce-scatter": 0.0}
GRADIENTS = "gradients, estimated"


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step by resource."""

    compute: float  # executed FLOPs at the share of the peak that large products reach
    memory: float  # traffic to and from each chip's memory, estimated
    links: float  # traffic between chips at the links' published rate
    exposed: float  # of the links' time that in which nothing runs beside a collective

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
    torus = torus_of(program.mesh.devices.ravel()[: devices // slices].tolist())
    compute = at_peak(program.config, chip, {part.name: part.executed for part in flops.parts}) / (devices * ATTAINED)
    links = exposed = 0.0
    for one in collectives:
        seconds = one.total / link_rate(chip, one, torus)
        beside = seconds if one.beside is None else one.times * one.beside * compute
        links += seconds
        exposed += seconds - one.hidden * min(seconds, beside)
    memory = memory_traffic(program, rows, length) / chip.hbm_bandwidth
    return Roofline(compute, memory, links, exposed)


def at_peak(config: Config, chip: Chip, flops: Mapping[str, float]) -> float:
    """Seconds of one chip at its peak for FLOPs by part of the step, the decoder's kernels in fp8 where it trains so."""
    fast = flops["decoder"] if config.train.matmul == "fp8" else 0.0
    return chip.seconds(sum(flops.values()) - fast, fast)


def link_rate(chip: Chip, one: Collective, torus: Sequence[int]) -> float:
    """Bytes per second that enter a device in a collective.

    In a torus, whose sizes are in the order of the mesh: over the links of the dimensions that its devices lie along, all of
    them where the whole slice takes part; between slices, over the network. Behind a switch: at its rate within a host, else
    through the adapters of the host's devices that take part.
    """
    if one.across:
        return chip.network
    if chip.links > 1:
        behind = [math.prod(torus[at + 1 :]) for at in range(len(torus))]
        along = sum(one.stride <= stride < one.stride * one.group for stride in behind)
        share = 1.0 if one.group == math.prod(torus) else min(1.0, max(1, along) / chip.links)
        return chip.link_bandwidth * share
    neighbours = max(1, min(one.group, GPUS_PER_HOST // one.stride))
    return chip.link_bandwidth if neighbours == one.group else min(chip.link_bandwidth, chip.network * neighbours)


def guess_collectives(program: Program, rows: int, length: int, slices: int = 1) -> list[Collective]:
    """The collectives of a step where nothing is compiled: those that the program writes out and cannot do without.

    Kernels are gathered along fsdp and their gradients scattered back, in the stages of `parallel/fsdp.py`, gradients added up
    along data, and hidden states along tensor, twice a layer and pass. Beside products runs what a compiler was seen to run
    there: a share of gathering and scattering, and nothing else.
    """
    config, mesh, cfg = program.config, program.mesh.shape, program.config.decoder
    width, parts = np.dtype(program.model.dtype).itemsize, config.train.accumulation
    gathered, scattered = (elements / mesh["tensor"] for elements in _travelling(program, length))
    own = 4 * scattered / mesh["fsdp"]  # float32, as gradients are
    hidden = width * rows * length * cfg.width / (mesh["data"] * mesh["fsdp"] * parts)
    far, along_fsdp, _ = across_slices(tuple(mesh[axis] for axis in AXES), slices)
    stages = _stages(program, along_fsdp)
    beside = BESIDE_SPARSE_CORES if has_sparse_cores(program.mesh.devices.flat[0]) else BESIDE
    found = [
        *_over_stages("all-gather", width * gathered, mesh["tensor"], stages, along_fsdp > 1, beside["all-gather"]),
        *_over_stages("reduce-scatter", 4 * scattered, mesh["tensor"], stages, along_fsdp > 1, beside["reduce-scatter"]),
    ]
    near, stride = mesh["data"] // far, mesh["fsdp"] * mesh["tensor"]
    # Within a slice first, so that each device exchanges its own share with its like in the others.
    for size, group, across in ((own, near, False), (own / near, far, True)):
        moved = size * ring("all-reduce", group)
        found.append(Collective("all-reduce", 1, int(size), moved, group, 1 if across else stride, GRADIENTS, across))
    passes = 2 * cfg.layers * (2 + (cfg.remat in ("block", "offload")))
    moved = hidden * ring("all-reduce", mesh["tensor"])
    found.append(Collective("all-reduce", passes, int(hidden), moved, mesh["tensor"], 1, "hidden states, estimated"))
    return [replace(one, times=one.times * parts) for one in found if one.group > 1]


def _travelling(program: Program, length: int) -> tuple[float, float]:
    """Elements that a micro-batch gathers and that it scatters, over all devices along tensor.

    A kernel is gathered for its product forward and once more backward, which what is recomputed shares; a frozen tower has no
    backward pass, the embedding none that reads it, and the head is gathered, and its gradient scattered, for each chunk.
    """
    config = program.config
    trainable, _ = split(program.abstract_state().params, program.groups)
    in_tower = 1 + any(path.startswith("vision_tower/") for path in trainable)
    chunks = -(-length // min(config.train.loss_chunk, length))
    embedding, head = "embed/embedding", "embed/embedding" if config.decoder.tied_head else "head/kernel"
    gathered = scattered = 0
    for path, size in program.sizes.items():
        times = (in_tower if path.startswith("vision_tower/") else 2), 1
        if path in (embedding, head):  # one after the other where they are the same array
            times = ((path == embedding) + chunks * (path == head),) * 2
        gathered += times[0] * size
        scattered += times[1] * size * (path in trainable)
    return gathered, scattered


def _stages(program: Program, slices: int) -> tuple[int, ...]:
    """How many devices exchange in each stage along fsdp, which so many slices lie along, the slowest first."""
    line = program.mesh.devices[0, :, 0].tolist()
    within = stage_sizes(line[: len(line) // slices], sparse_cores=has_sparse_cores(line[0]))
    return (slices, *within) if slices > 1 else within


def _over_stages(
    kind: str, size: float, stride: int, stages: Sequence[int], across: bool, beside: float
) -> Iterator[Collective]:
    """Gathering or scattering so many bytes in stages of so many devices, the first of them between slices where `across`.

    Scattering begins with the first stage and gathering ends with it, when all is there.
    """
    behind = np.prod(stages)
    for place, group in enumerate(stages):
        behind //= group  # devices of the stages still to come
        moved = size * (group - 1) / group
        result = int(size if kind == "all-gather" else size / group)
        beyond, said = across and place == 0, GRADIENTS if kind == "reduce-scatter" else "parameters, estimated"
        hidden = 0.0 if beyond else beside
        yield Collective(kind, 1, result, moved, group, 1 if beyond else stride * int(behind), said, beyond, hidden)
        size /= group


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
