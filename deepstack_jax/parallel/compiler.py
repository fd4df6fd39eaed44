"""What the compiler of a kind of device is told beside the program, by `train` and by `plan` alike."""

import warnings
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepstack_jax.jax_messages import unknown_option
from deepstack_jax.parallel.chips import has_sparse_cores

# The TPU's compiler runs nothing that is gathered or scattered beside products unless it is told. Where a chip has sparse
# cores, these do both, over two dimensions of the torus at once, while the others compute; else gathering is cut into pieces
# that run beside products. LIBTPU_INIT_ARGS adds to these.
SPARSE_CORES = "sparse cores"
_OPTIONS: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {
        SPARSE_CORES: {
            "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
            "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
            "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
            "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
            # How the cores run then: MaxText's recipes for v5p and v6e set these beside the offloading.
            "xla_tpu_use_tc_device_shape_on_sc": True,
            "xla_sc_disable_megacore_partitioning": True,
            "xla_sc_enable_instruction_fusion": False,
        },
        "tpu": {
            "xla_enable_async_all_gather": True,
            "xla_tpu_enable_async_collective_fusion": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
            "xla_tpu_overlap_compute_collective_tc": True,
        },
    }
)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Options for the devices of a mesh, as `jax.jit` takes them; none where nothing is gathered.

    They are no fixed part of the compiler: what the installed one does not know is left out, with a warning.
    """
    if mesh.shape["fsdp"] == 1:
        return {}
    if uses_sparse_cores(mesh):
        return dict(_OPTIONS[SPARSE_CORES])
    platform = mesh.devices.flat[0].platform
    options = dict(_OPTIONS.get(platform, {}))
    while name := _refused(tuple(options.items()), mesh):
        del options[name]
        warnings.warn(f"the {platform} compiler of this machine does not know {name}; compiling without it", stacklevel=2)
    return options


def uses_sparse_cores(mesh: Mesh) -> bool:
    """Whether sparse cores gather and scatter: the chips have some, and the compiler knows all of their options."""
    if not has_sparse_cores(mesh.devices.flat[0]):
        return False
    if name := _refused(tuple(_OPTIONS[SPARSE_CORES].items()), mesh):
        warnings.warn(f"the compiler of this machine does not know {name}; sparse cores stay unused", stacklevel=2)
    return not name


@cache
def _refused(options: tuple[tuple[str, bool], ...], mesh: Mesh) -> str:
    """An option that the compiler does not know, by what it says of a program that does nothing; "" = it takes them all."""
    if not options:
        return ""
    out = NamedSharding(mesh, PartitionSpec())
    nothing = jax.jit(lambda: jnp.zeros(()), out_shardings=out, compiler_options=dict(options))
    try:
        nothing.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        name = unknown_option(error)
        return name if name in dict(options) else ""
    return ""
