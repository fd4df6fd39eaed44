"""What one device can do, as its maker publishes it."""

from typing import Any, NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """What one device can do, as its maker publishes it."""

    flops: float  # dense bf16 FLOP/s
    hbm: float  # bytes
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s that enter a chip over all its links to its neighbours, one direction
    links: int  # dimensions of the torus that these links form; 1 = a switch within a host
    network: float = 0.0  # bytes/s to other hosts (GPUs) or slices (TPUs), of the adapters that fall to one device
    fp8: float = 0.0  # dense FLOP/s of products of float8_e4m3fn and float8_e5m2; 0 = it has none
    sparse_cores: bool = False  # whether a TPU has cores that gather and scatter while the others compute

    def seconds(self, flops: float, fp8: float = 0.0) -> float:
        """Of so many FLOPs at the peak, and of so many in fp8."""
        return flops / self.flops + (fp8 / self.fp8 if fp8 else 0.0)


# Keyed by jax's `device_kind`.
#
# TPUs: cloud.google.com/tpu/docs, a page per version; they print the links' both directions together ("bidirectional"), half of
# which is listed here, and the data center's network per chip or per pod.
# GPUs: the makers' data sheets and NVIDIA's white papers of Ampere (GA102) and Ada: dense bf16 products that add up in float32
# (half of what is printed "with sparsity"), links one direction: NVLink, Infinity Fabric, else PCIe 4.0 x16. Memory is what the
# driver shows. FLOP/s and bandwidths of A100, H100, H200, L40S, L4, MI300X and RTX 3090 were compared with copies of the data
# sheets; those of B200, A10G, RTX A6000 and RTX 4090 are not confirmed.
# TPUs v4 and v7x have sparse cores as well, for which no program of this package was compiled.
# fp8 is that of the same sheets, dense, adding up in float32, not confirmed either; MI300X's 8-bit formats (fnuz) are others.
# TPU v7x is printed with 4614 TFLOP/s in fp8 as well, but only XLA's rewrite for NVIDIA's GPUs is known to make such products
# of what `model/fp8.py` writes.
# The network of cards that no maker puts into a host is that of the largest host that AWS rents with them (400 Gb/s for eight
# L40S, 100 for eight A10G); for those that nobody rents so, 100 Gb/s for eight.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 3),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 819e9, 200e9, 2, 3.125e9),  # v5e
    "TPU v5": Chip(459e12, 95 * GIB, 2765e9, 600e9, 3, 6.25e9, sparse_cores=True),  # v5p
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1640e9, 400e9, 2, 12.5e9, sparse_cores=True),  # v6e
    "TPU7x": Chip(1153.5e12, 96 * GIB, 3690e9, 600e9, 3),  # jax sees the two halves of a chip as two devices
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GIB, 1555e9, 300e9, 1, 25e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB, 2039e9, 300e9, 1, 25e9),
    "NVIDIA H100 80GB HBM3": Chip(989.4e12, 79.6 * GIB, 3350e9, 450e9, 1, 50e9, fp8=1978.9e12),
    "NVIDIA H100 PCIe": Chip(756e12, 79.6 * GIB, 2000e9, 64e9, 1, 25e9, fp8=1513e12),
    "NVIDIA H200": Chip(989.4e12, 140.4 * GIB, 4800e9, 450e9, 1, 50e9, fp8=1978.9e12),
    "NVIDIA B200": Chip(2250e12, 178.4 * GIB, 7700e9, 900e9, 1, 50e9, fp8=4500e12),
    "NVIDIA L40S": Chip(362.05e12, 45.0 * GIB, 864e9, 32e9, 1, 6.25e9, fp8=733e12),
    "NVIDIA A10G": Chip(70e12, 22.5 * GIB, 600e9, 32e9, 1, 1.5625e9),
    "NVIDIA RTX A6000": Chip(154.8e12, 48.0 * GIB, 768e9, 32e9, 1, 1.5625e9),
    "NVIDIA GeForce RTX 4090": Chip(165.2e12, 24.0 * GIB, 1008e9, 32e9, 1, 1.5625e9, fp8=330.3e12),
    "NVIDIA GeForce RTX 3090": Chip(71e12, 24.0 * GIB, 936e9, 32e9, 1, 1.5625e9),
    "AMD Instinct MI300X": Chip(1307.4e12, 192.0 * GIB, 5300e9, 448e9, 1, 50e9),
    "NVIDIA L4": Chip(121e12, 22.5 * GIB, 300e9, 32e9, 1, 12.5e9, fp8=242.5e12),
}


def has_sparse_cores(device: Any) -> bool:
    """Whether a jax device has cores that gather and scatter while the others compute."""
    chip = CHIPS.get(device.device_kind)
    return chip is not None and chip.sparse_cores
