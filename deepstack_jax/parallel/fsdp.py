"""FSDP written out: weights gathered along fsdp for each product, in its dtype; their gradients scattered back, in float32.

Left to itself the compiler gathers and scatters where it has one operation for all devices of the axis. The TPU's has none
over three dimensions of a torus, and without sparse cores none that scatters over two: it adds up zero-padded weights and
whole gradients instead, which moves twice as much. Over one dimension after the other, or with sparse cores two at a time,
both exist, and each piece still enters a device once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from deepstack_jax.model.cut_weights import Axes
from deepstack_jax.parallel.compiler import uses_sparse_cores

AXIS = "fsdp"
_ROWS = ("data", AXIS)  # axes of the mesh that rows of a batch lie over
Stage = tuple[tuple[int, ...], ...]  # places along fsdp that exchange with each other


@dataclass(frozen=True)
class ExplicitFsdp:
    """How the devices of a mesh make weights whole, and add up and cut their gradients."""

    mesh: Mesh
    cut_axis: Callable[[Axes], int | None]  # which axis of a weight lies along fsdp, by their logical names
    computed: Callable[[Axes], PartitionSpec]  # where an array lies in computation: rows, and what is cut along tensor
    stages: tuple[Stage, ...]  # of scattering; gathering runs them backwards
    # Whether the cut axis goes first for the exchange: last, its pieces would be smaller than the tile of 8 x 128 that a TPU's
    # memory consists of. A CPU has no product of bfloat16 for gradients that are turned
    turned: bool = False

    def whole(self, weight: Array, axes: Axes) -> Array:
        """The weight, gathered along fsdp."""
        at = self.cut_axis(axes)
        if at is None:
            return weight
        return self._on_each_device(partial(self._gather, at=at), (self._cut(axes, at),), self.computed(axes), axes)(weight)

    def gradient(self, local: Callable[..., Array], operands: tuple[Array, ...], taken: tuple[Axes, ...], axes: Axes) -> Array:
        """The gradient of each device's rows, then added up over all and scattered along fsdp."""
        at = self.cut_axis(axes)
        rows = [operand.shape[names.index("batch")] for operand, names in zip(operands, taken, strict=True)]
        if at is None or any(size % (self.mesh.shape["data"] * self.mesh.shape[AXIS]) for size in rows):
            return local(*operands)  # as for the one row that parameters are drawn with

        def one(*operands: Array) -> Array:
            found = self._scatter(local(*operands), at)
            return jax.lax.psum(found, "data") if self.mesh.shape["data"] > 1 else found

        # An axis that no operand has, as the words of an embedding, is made whole on each device.
        axes = tuple(name if any(name in names for names in taken) else None for name in axes)
        return self._on_each_device(one, tuple(map(self.computed, taken)), self._cut(axes, at), axes)(*operands)

    def _cut(self, axes: Axes, at: int) -> PartitionSpec:
        """Where a weight lies when it is not whole."""
        spec = [*self.computed(axes), *[None] * len(axes)][: len(axes)]
        return PartitionSpec(*spec[:at], AXIS, *spec[at + 1 :])

    def _on_each_device(self, run: Callable[..., Array], ins: Any, outs: Any, axes: Axes) -> Callable[..., Array]:
        # An axis along tensor is written out too: left to the compiler, it would be gathered for the exchange along fsdp.
        # Weights without one leave tensor to the compiler: those of the tower, whose crops lie along tensor, DeepStack-V's
        # layers with rows among them.
        names = {*_ROWS, *(name for name in self.computed(axes) if name is not None)}
        return jax.shard_map(run, mesh=self.mesh, in_specs=ins, out_specs=outs, axis_names=names, check_vma=False)

    def _gather(self, weight: Array, at: int) -> Array:
        place = 0 if self.turned else at
        weight = jnp.moveaxis(weight, at, place)
        for stage in reversed(self.stages):
            weight = jax.lax.all_gather(weight, AXIS, axis_index_groups=_groups(stage), axis=place, tiled=True)
        return jnp.moveaxis(weight, place, at)

    def _scatter(self, gradient: Array, at: int) -> Array:
        place = 0 if self.turned else at
        gradient = jnp.moveaxis(gradient, at, place)
        for stage in self.stages:
            gradient = jax.lax.psum_scatter(
                gradient, AXIS, scatter_dimension=place, axis_index_groups=_groups(stage), tiled=True
            )
        return jnp.moveaxis(gradient, place, at)


def explicit_fsdp(
    mesh: Mesh, cut_axis: Callable[[Axes], int | None], computed: Callable[[Axes], PartitionSpec]
) -> ExplicitFsdp | None:
    """How a mesh does it; None where nothing lies along fsdp."""
    if mesh.shape[AXIS] == 1:
        return None
    turned = mesh.devices.flat[0].platform == "tpu"
    sizes = stage_sizes(mesh.devices[0, :, 0].tolist(), sparse_cores=uses_sparse_cores(mesh))
    return ExplicitFsdp(mesh, cut_axis, computed, stages_of_sizes(sizes), turned)


def stage_sizes(devices: Sequence[Any], *, sparse_cores: bool) -> tuple[int, ...]:
    """How many devices along fsdp exchange in each stage, the slowest first: a dimension of their torus, or two of them."""
    sizes = torus_of(devices)
    if not sparse_cores:
        return sizes
    far = int(len({getattr(device, "slice_index", 0) for device in devices}) > 1)  # the first is from slice to slice
    return *sizes[:far], *(math.prod(sizes[at : at + 2]) for at in range(far, len(sizes), 2))


def torus_of(devices: Sequence[Any]) -> tuple[int, ...]:
    """The dimensions of the torus that the devices fill in this order, the slowest first.

    Where they are no such box, or in no torus, one of all.
    """
    count = len(devices)
    if any(getattr(device, "coords", None) is None for device in devices):
        return (count,)
    # The two cores of a TPU v7x chip are devices of their own at the same coordinates.
    places = np.array([(getattr(one, "slice_index", 0), *one.coords, getattr(one, "core_on_chip", 0)) for one in devices])
    sizes, stride = [], 1
    while stride < count:
        size = 2
        while size * stride < count and _is_line(places[: size * stride + 1 : stride]):
            size += 1
        if not _is_line(places[: size * stride : stride]) or count % (size * stride):
            return (count,)
        sizes.insert(0, size)
        stride *= size
    return tuple(sizes)


def stages_of_sizes(sizes: tuple[int, ...]) -> tuple[Stage, ...]:
    """A stage for each of these sizes, of places numbered row by row."""
    places = np.arange(np.prod(sizes)).reshape(sizes)
    return tuple(
        tuple(map(tuple, np.moveaxis(places, at, -1).reshape(-1, size).tolist())) for at, size in enumerate(sizes) if size > 1
    )


def _is_line(places: np.ndarray) -> bool:
    """Whether places differ along one dimension alone."""
    return int(np.any(places != places[0], axis=0).sum()) == 1


def _groups(stage: Stage) -> list[list[int]] | None:
    return [list(group) for group in stage] if len(stage) > 1 else None
