"""The device mesh of a run, from one laptop core to a pod."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from deepstack_jax.config import Config, MeshConfig
from deepstack_jax.config_checks import ConfigError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over all devices (or those given) with axes data, fsdp, tensor; an axis of -1 takes what the others leave.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"config.mesh {dict(zip(AXES, sizes, strict=True))}: expected positive sizes, at most one of them -1")
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"config.mesh {dict(zip(AXES, sizes, strict=True))} does not cover {len(devices)} devices; "
            f"choose sizes whose product is {len(devices)}, or set one axis to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_batch_fits(config: Config, mesh: Mesh, processes: int) -> None:
    """Raise ConfigError where a micro-batch does not split evenly over the batch axes of the mesh, or over the hosts.

    Packed rows are as many as do: see `data/schedule.py`.
    """
    if config.data.packing.enabled:
        return
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, divisor in (("devices along data x fsdp", shards), ("hosts", processes)):
        step = divisor * config.train.accumulation
        if config.train.batch_size % step:
            raise ConfigError(
                f"config.train.batch_size {config.train.batch_size} with accumulation {config.train.accumulation} does not "
                f"split over {divisor} {name}; nearest valid: {max(1, round(config.train.batch_size / step)) * step}"
            )
