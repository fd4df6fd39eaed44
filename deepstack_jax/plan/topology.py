"""Machines by name: TPU slices that the compiler knows, GPU nodes that are described only, and the devices that are here."""

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from deepstack_jax.errors import ConfigError, nearest
from deepstack_jax.jax_messages import is_unknown_topology
from deepstack_jax.parallel.chips import CHIPS, GIB, Chip

GPUS_PER_HOST = 8


class Slices(NamedTuple):
    """The slices of a TPU version."""

    chip: str  # its name in CHIPS
    usable: float  # bytes of HBM that libtpu's compiler lets a program use: it names them when one does not fit
    shapes: tuple[str, ...]  # of its slices as cloud.google.com/tpu/docs lists them, smallest first


SLICES = {
    "v5e": Slices("TPU v5 lite", 15.75 * GIB, ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": Slices(
        "TPU v5",
        95.74 * GIB,
        ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
    ),
    "v6e": Slices("TPU v6 lite", 31.25 * GIB, ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
}
_GPUS = {
    "A100-40GB": "NVIDIA A100-SXM4-40GB",
    "A100": "NVIDIA A100-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
    "B200": "NVIDIA B200",
    "L40S": "NVIDIA L40S",
    "L4": "NVIDIA L4",
    "A10G": "NVIDIA A10G",
    "A6000": "NVIDIA RTX A6000",
    "RTX4090": "NVIDIA GeForce RTX 4090",
    "RTX3090": "NVIDIA GeForce RTX 3090",
    "MI300X": "AMD Instinct MI300X",
}
_MOST_GPUS = 4096  # simulated in seconds; four times as many take minutes and gigabytes
# Google's names of slices, as `gcloud compute tpus` takes them: the number is that of TensorCores on a v5p, of which a chip has
# two, and of chips on the others.
_GOOGLE = {"v5litepod": ("v5e", 1), "v5e": ("v5e", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
# The share of a GPU's memory that jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise is 0.75; this package's launch
# scripts ask for this much.
GPU_SHARE = 0.92


@dataclass(frozen=True)
class Machine:
    """Devices to plan for."""

    name: str  # as the user wrote it
    # What a mesh is made of: descriptions of TPU chips, simulated CPU devices in place of GPUs, or real devices
    devices: tuple[Any, ...]
    hosts: int
    compiler: str  # that compiles for it: "libtpu", "here" (that of the devices here), or "" for GPUs that are not here
    chip: Chip | None  # None where nothing is published of it: a CPU
    usable: float  # bytes of memory that a program may use on each device; 0 = unknown
    slices: int = 1  # of which the devices are parts, joined by the data center's network


def open_machine(name: str, slices: int = 1) -> Machine:
    """The machine of a name: `v5p:4x4x4` (`v5p-128` to Google), `gpu:8xH100` or `here`; of a TPU so many slices.

    Raises:
      ConfigError: an unknown name, with those that are known; no libtpu; too few simulated devices; slices of what has none.
    """
    name = with_shape(name)
    family, _, shape = name.partition(":")
    if slices > 1 and family not in SLICES:
        raise ConfigError(
            f"--slices={slices} with --topology={name}: only TPUs come in slices, e.g. --topology={examples()[0]}"
        )
    if name == "here":
        return _attached()
    if family == "gpu":
        return _gpus(name, shape)
    if family in SLICES:
        return _tpu_slices(name, family, shape, slices)
    meant = [f"gpu:1x{kind}" for kind in _GPUS if _plain(kind) == _plain(name)]
    raise ConfigError(f"--topology={name} is unknown; e.g. {', '.join(meant or examples())}")


def with_shape(name: str) -> str:
    """Google's name of a slice as ours, which says its shape; any other name as it is."""
    found = re.fullmatch(r"(v5litepod|v5e|v5p|v6e)-(\d{1,6})", name)
    if not found:
        return name
    family, cores = _GOOGLE[found[1]]
    sizes = {chips(shape) * cores: f"{family}:{shape}" for shape in SLICES[family].shapes}
    if int(found[2]) not in sizes:
        known = ", ".join(f"{found[1]}-{size}" for size in sizes)
        raise ConfigError(
            f"--topology={name} is not a slice of {found[1]}; known: {known}; for another shape e.g. {examples()[0]}"
        )
    return sizes[int(found[2])]


def chips(shape: str) -> int:
    """Chips of a slice of a shape as 4x4x8."""
    return math.prod(map(int, shape.split("x")))


def examples() -> list[str]:
    """One name of every kind."""
    return [*(f"{family}:{slices.shapes[4]}" for family, slices in SLICES.items()), "gpu:8xH100", "here"]


def _tpu_slices(name: str, family: str, shape: str, slices: int) -> Machine:
    kind, usable, shapes = SLICES[family]
    dimensions = shapes[0].count("x") + 1
    if not re.fullmatch(r"\d{1,4}(x\d{1,4})*", shape) or shape.count("x") + 1 != dimensions or chips(shape) > 2**14:
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
        if not is_unknown_topology(error):
            raise
        near = min(shapes, key=lambda other: abs(math.log(chips(other) / max(chips(shape), 1))))
        raise ConfigError(
            f"--topology={name} is not known to the compiler; nearest: {family}:{near}; all: {', '.join(shapes)}"
        ) from error
    hosts = len({device.process_index for device in devices})
    name = name if slices == 1 else f"{slices} slices of {name}"
    return Machine(name, tuple(devices), hosts, "libtpu", CHIPS[kind], usable, slices)


def _gpus(name: str, shape: str) -> Machine:
    count, _, kind = shape.partition("x")
    known = {_plain(one): one for one in (*_GPUS, *_GPUS.values())} | {_plain("A100-80GB"): "A100"}
    if not re.fullmatch(r"[1-9]\d{0,3}", count) or int(count) > _MOST_GPUS or _plain(kind) not in known:
        hint = f"kinds: {', '.join(_GPUS)}" if not kind or _plain(kind) in known else nearest(kind, _GPUS)
        raise ConfigError(
            f"--topology={name} is unknown, expected gpu:NUMBERxKIND with 1 to {_MOST_GPUS} GPUs, e.g. gpu:8xH100; {hint}"
        )
    chip = CHIPS[_GPUS.get(known[_plain(kind)], known[_plain(kind)])]
    devices = simulated_devices(int(count))
    return Machine(name, devices, -(-int(count) // GPUS_PER_HOST), "", chip, GPU_SHARE * chip.hbm)


def _plain(kind: str) -> str:
    """A GPU's name without what is written in several ways: `RTX 4090`, `rtx-4090` and `4090` are one."""
    return re.sub(r"nvidia|geforce|rtx|amd|instinct|[^a-z0-9]", "", kind.lower())


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
