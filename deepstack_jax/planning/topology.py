"""Machines by name: TPU slices that the compiler knows, GPU nodes that are described only, and the devices that are here."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from deepstack_jax.config_checks import ConfigError, nearest
from deepstack_jax.training.flops import CHIPS, GIB, Chip

GPUS_PER_HOST = 8
# A slice's shapes as cloud.google.com/tpu/docs lists them, and the bytes of HBM that libtpu's compiler lets a program use (it
# names them when one does not fit).
_SLICES = {
    "v5e": ("TPU v5 lite", 15.75 * GIB, ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": (
        "TPU v5",
        95.74 * GIB,
        ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
    ),
    "v6e": ("TPU v6 lite", 31.25 * GIB, ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
}
_GPUS = {
    "A100-40GB": "NVIDIA A100-SXM4-40GB",
    "A100": "NVIDIA A100-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
    "B200": "NVIDIA B200",
}
# The share of a GPU's memory that jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise is 0.75; this package's launch
# scripts ask for this much.
GPU_SHARE = 0.92


@dataclass(frozen=True)
class Machine:
    """Devices to plan for.

    Attributes:
      name: as the user wrote it.
      devices: what a mesh is made of: descriptions of TPU chips, simulated CPU devices in place of GPUs, or real devices.
      compiler: that compiles for it: "libtpu", "here" (that of the devices here), or "" for GPUs that are not here.
      chip: None where nothing is published of it: a CPU.
      usable: bytes of memory that a program may use on each device; 0 = unknown.
      slices: of which the devices are parts, joined by the data center's network.
    """

    name: str
    devices: tuple[Any, ...]
    hosts: int
    compiler: str
    chip: Chip | None
    usable: float
    slices: int = 1


def open_machine(name: str, slices: int = 1) -> Machine:
    """The machine of a name: `v5p:4x4x4`, `gpu:8xH100` or `here`; of a TPU so many slices.

    Raises:
      ConfigError: an unknown name, with those that are known; no libtpu; too few simulated devices; slices of what has none.
    """
    family, _, shape = name.partition(":")
    if slices > 1 and family not in _SLICES:
        raise ConfigError(
            f"--slices={slices} with --topology={name}: only TPUs come in slices, e.g. --topology={examples()[0]}"
        )
    if name == "here":
        return _attached()
    if family == "gpu":
        return _gpus(name, shape)
    if family in _SLICES:
        return _tpu_slices(name, family, shape, slices)
    raise ConfigError(f"--topology={name} is unknown; e.g. {', '.join(examples())}")


def examples() -> list[str]:
    """One name of every kind."""
    return [*(f"{family}:{shapes[4]}" for family, (_, _, shapes) in _SLICES.items()), "gpu:8xH100", "here"]


def known_slices(family: str) -> list[str]:
    """Names of a family's slices, smallest first."""
    return [f"{family}:{shape}" for shape in _SLICES[family][2]]


def _tpu_slices(name: str, family: str, shape: str, slices: int) -> Machine:
    kind, usable, shapes = _SLICES[family]
    dimensions = shapes[0].count("x") + 1
    if not re.fullmatch(r"\d+(x\d+)*", shape) or shape.count("x") + 1 != dimensions:
        raise ConfigError(f"--topology={name} has no shape of {dimensions} numbers; slices of {family}: {', '.join(shapes)}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={name} needs the TPU compiler, which is not installed; in a clone of the repository: pip install "
            "'.[plan]' (libtpu; no TPU is needed)"
        )
    # The compiler asks for no machine: without these it looks for one, for seconds, and complains that there is none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two plans at once, or one beside a run
    try:
        devices = topologies.get_topology_desc(name, "tpu", num_slices=slices).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        chips = math.prod(int(size) for size in shape.split("x"))
        near = min(shapes, key=lambda other: abs(math.log(math.prod(map(int, other.split("x"))) / max(chips, 1))))
        raise ConfigError(
            f"--topology={name} is not known to the compiler; nearest: {family}:{near}; all: {', '.join(shapes)}"
        ) from error
    hosts = len({device.process_index for device in devices})
    name = name if slices == 1 else f"{slices} slices of {name}"
    return Machine(name, tuple(devices), hosts, "libtpu", CHIPS[kind], usable, slices)


def _gpus(name: str, shape: str) -> Machine:
    count, _, kind = shape.partition("x")
    if not count.isdigit() or int(count) < 1 or kind not in _GPUS:
        hint = nearest(kind, _GPUS) if kind else f"kinds: {', '.join(_GPUS)}"
        raise ConfigError(f"--topology={name} is unknown, expected gpu:NUMBERxKIND, e.g. gpu:8xH100; {hint}")
    chip = CHIPS[_GPUS[kind]]
    devices = simulated_devices(int(count))
    return Machine(name, devices, -(-int(count) // GPUS_PER_HOST), "", chip, GPU_SHARE * chip.hbm)


def simulated_devices(count: int) -> tuple[Any, ...]:
    """So many CPU devices, to lay a mesh over.

    Raises:
      ConfigError: jax was started with fewer.
    """
    with contextlib.suppress(RuntimeError):  # jax is started already, with as many as it was told then
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"{count} devices are to be simulated and jax was started with {len(devices)}; start it with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return tuple(devices[:count])


def _attached() -> Machine:
    devices = jax.devices()
    chip = CHIPS.get(devices[0].device_kind)
    stats = devices[0].memory_stats() or {}
    usable = float(stats["bytes_limit"]) if "bytes_limit" in stats else 0.0
    return Machine("here", tuple(devices), jax.process_count(), "here", chip, usable)
