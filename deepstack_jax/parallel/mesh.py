"""The device mesh of a run, from one laptop core to a pod, and what must divide by its axes."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from deepstack_jax.config import DecoderConfig, MeshConfig, TrainConfig, VisionConfig
from deepstack_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
# What is cut along an axis of the mesh, by the rules of `rules.py`.
CUT_BY = {
    "fsdp": {"decoder": ("width",), "vision": ("width",)},
    "tensor": {"decoder": ("heads", "kv_heads", "mlp", "width", "vocab_size"), "vision": ("width", "heads", "mlp")},
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over all devices (or those given) with axes data, fsdp, tensor; an axis of -1 takes what the others leave.

    Within a slice neighbours of an axis are neighbours on its interconnect; two axes may have to share one of its links.
    Several slices lie along data, or along fsdp where data is too small, so that tensor, and fsdp where possible, never cross
    the slower network between them.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or the slices divide neither data nor fsdp.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        with contextlib.suppress(NotImplementedError):  # of a TPU slice of which two axes would have to share a link
            return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
        laid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        across = across_slices(sizes, slices)
        within = tuple(size // count for size, count in zip(sizes, across, strict=True))
        laid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """The axes with -1 filled in."""
    asked: dict[str, int] = dict(zip(AXES, (config.data, config.fsdp, config.tensor), strict=True))
    if list(asked.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in asked.values()):
        raise ConfigError(f"config.mesh {asked}: expected positive sizes, at most one of them -1")
    sizes = dict(asked)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in asked.items():
        if size == -1 and devices % fixed == 0:
            sizes[axis] = devices // fixed
    if math.prod(sizes.values()) != devices:
        raise ConfigError(
            f"config.mesh {asked} does not cover {devices} devices; choose sizes whose product is {devices}, e.g. "
            f"{_nearest_mesh(asked, devices)}, or set one axis to -1"
        )
    return tuple(sizes.values())


def _nearest_mesh(asked: dict[str, int], devices: int) -> dict[str, int]:
    """The tensor axis as near to the one asked for as divides the devices, fsdp likewise of what is left, data the rest."""
    tensor = _nearest(asked["tensor"], _divisors(devices)) if asked["tensor"] > 0 else 1
    fsdp = _nearest(asked["fsdp"], _divisors(devices // tensor)) if asked["fsdp"] > 0 else devices // tensor
    return {"data": devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}


def across_slices(sizes: tuple[int, ...], slices: int) -> tuple[int, int, int]:
    """How many of so many slices lie along each axis of these sizes (data, fsdp, tensor).

    Raises:
      ConfigError: they would split the tensor axis.
    """
    data = math.gcd(sizes[0], slices)
    fsdp = slices // data
    if sizes[1] % fsdp:
        raise ConfigError(
            f"config.mesh {dict(zip(AXES, sizes, strict=True))} over {slices} slices: they would split the tensor axis; choose "
            f"config.mesh.data as a multiple of {slices}"
        )
    return data, fsdp, 1


def check_model_fits(decoder: DecoderConfig, vision: VisionConfig, mesh: Mesh) -> None:
    """Raise ConfigError where a size of the model does not divide by the mesh axis that cuts it, naming what would."""
    for axis, keys in CUT_BY.items():
        size = mesh.shape[axis]
        sections = {"decoder": vars(decoder), "vision": vars(vision)}
        values = {f"{section}.{key}": sections[section][key] for section, names in keys.items() for key in names}
        wrong = [f"config.{key} {value}" for key, value in values.items() if value % size]
        if wrong:
            valid = [number for number in _divisors(math.gcd(*values.values())) if mesh.size % number == 0]
            near = sorted({max(n for n in valid if n < size), *(n for n in valid if n > size)})[:2]
            raise ConfigError(
                f"config.mesh.{axis} {size} does not divide {', '.join(wrong)}; nearest valid config.mesh.{axis} on "
                f"{mesh.size} devices: {' or '.join(map(str, near))}"
            )


def check_batch_fits(train: TrainConfig, mesh: Mesh) -> None:
    """Raise ConfigError where a micro-batch does not split evenly over the batch axes of the mesh, and so over the hosts."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    step = shards * train.accumulation
    if train.batch_size % step:
        below = train.batch_size // step * step
        near = " or ".join(str(size) for size in (below, below + step) if size)
        raise ConfigError(
            f"config.train.batch_size {train.batch_size} with accumulation {train.accumulation} does not split over {shards} "
            f"devices along data x fsdp; nearest valid: {near}"
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nearest(wanted: int, valid: Sequence[int]) -> int:
    return min(valid, key=lambda number: abs(number - wanted))
