"""What the compiler of a kind of device is told beside the program, by `train` and by `plan` alike."""

import warnings
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepstack_jax.jax_messages import unknown_option

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
    """Options for the devices of a mesh, as `jax.jit` takes them; none where nothing is gathered.

    They are no fixed part of the compiler: what the installed one does not know is left out, with a warning.
    """
    platform = mesh.devices.flat[0].platform
    options = dict(_OPTIONS.get(platform, {})) if mesh.shape["fsdp"] > 1 else {}
    while options and (name := _refused(options, mesh)) in options:
        del options[name]
        warnings.warn(f"the {platform} compiler of this machine does not know {name}; compiling without it", stacklevel=2)
    return options


def _refused(options: dict[str, bool], mesh: Mesh) -> str:
    """An option that the compiler does not know, by what it says of a program that does nothing; "" = it takes them all."""
    nothing = jax.jit(lambda: jnp.zeros(()), out_shardings=NamedSharding(mesh, PartitionSpec()), compiler_options=options)
    try:
        nothing.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return unknown_option(error)
    return ""
