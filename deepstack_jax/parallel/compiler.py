"""What the compiler of a kind of device is told beside the program, by `train` and by `plan` alike."""

from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import Mesh

# Gathering runs in pieces beside products. The TPU's compiler does none of it unless it is told; MaxText's recipes for v5e, v5p
# and v6e set the same. LIBTPU_INIT_ARGS adds to these.
_OPTIONS: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {
        "tpu": {
            "xla_enable_async_all_gather": True,
            "xla_tpu_enable_async_collective_fusion": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
            "xla_tpu_overlap_compute_collective_tc": True,
        }
    }
)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Options for the devices of a mesh, as `jax.jit` takes them; none where nothing is gathered."""
    gathers = mesh.shape["fsdp"] > 1
    return dict(_OPTIONS.get(mesh.devices.flat[0].platform, {})) if gathers else {}
