"""Memory of a step whose stack is projected first, as the package does, beside one that keeps it in vision width.

    python -m benchmarks.stack_width --topology=v5e:2x4 --mesh=1,8,1 --rows=8

Compiles DeepStack-L of LLaMA-7B's widths at few layers and runs nothing. In the other form a layer gathers its group in
vision width and projects it under its own condition, so that the projector runs once more per group in the backward pass. Needs
the package libtpu; without --topology the compiler is that of eight simulated CPU devices.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.experimental import topologies

from deepstack_jax.batch import Batch
from deepstack_jax.config import MeshConfig, build_config, default_config
from deepstack_jax.model import decoder
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.model.layers import ACTIVATIONS, take_rows
from deepstack_jax.model.merge import STACK_AXES, VisualIndex, spread
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core.program import Program, build_program


def narrow_tokens(model: Any, batch: Batch) -> tuple[Array, Any]:
    """In place of DeepStack.visual_tokens: the stack in vision width, and what projects it."""
    (features,) = model.encode(batch.pixels)
    rows, groups, visual = batch.stack_source.shape
    source = jnp.asarray(batch.stack_source)
    stack = take_rows(features, source.reshape(rows, -1)).reshape(rows, groups, visual, -1)
    stack = nn.with_logical_constraint(jnp.moveaxis(stack, 1, 0), STACK_AXES)
    tokens = model.gather_project(features, batch.token_source)
    weights = model.projector.variables["params"] if not model.is_initializing() else {}
    return tokens, (stack, jnp.moveaxis(source >= 0, 1, 0), nn.unbox(weights))


def project_and_inject(x: Array, layer_inject: Any, group: Array, index: VisualIndex) -> Array:
    """In place of `inject`."""
    stack, real, weights = layer_inject

    def add(x: Array) -> Array:
        tokens = jax.lax.dynamic_index_in_dim(stack, group, 0, keepdims=False)
        tokens = nn.with_logical_constraint(tokens, ("batch", None, None))
        for number in (1, 2):
            layer = weights[f"fc{number}"]
            tokens = ACTIVATIONS["gelu"](tokens) if number == 2 else tokens
            tokens = tokens @ layer["kernel"].astype(tokens.dtype) + layer["bias"].astype(tokens.dtype)
        kept = jax.lax.dynamic_index_in_dim(real, group, 0, keepdims=False)
        return x + spread(jnp.where(kept[..., None], tokens, 0), index).astype(x.dtype)

    return jax.lax.cond(group >= 0, add, lambda x: x, x) if weights else x


def program_of(sizes: tuple[int, ...], devices: Any, layers: int) -> Program:
    config = default_config()
    config.update_from_flattened_dict(
        {
            "decoder.layers": layers,
            "vision.layers": 3,
            "optimizer.table": (("vision_tower", "frozen"), (".*", "default")),
            "train.frozen_dtype": "bfloat16",
            "data.max_images": 1,
        }
    )
    return build_program(build_config(config), make_mesh(MeshConfig(*sizes), devices), 100)


def temporaries(program: Program, rows: int) -> tuple[float, float]:
    """(MB per device beyond state and batch, seconds to compile)."""
    began = time.perf_counter()
    with use_mesh(program.mesh):
        step: Any = program.jit_step()
        lowered = step.lower(program.abstract_state(), program.abstract_batch(rows, program.config.data.max_length))
        memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes / 1e6, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="")
    parser.add_argument("--mesh", default="1,8,1", help="data,fsdp,tensor")
    parser.add_argument("--rows", type=int, default=8, help="of the global batch")
    parser.add_argument("--layers", type=int, default=6)
    asked = parser.parse_args()
    devices = topologies.get_topology_desc(asked.topology, "tpu").devices if asked.topology else jax.devices()
    sizes = tuple(map(int, asked.mesh.split(",")))
    for form in ("projected first", "vision width"):
        if form == "vision width":
            decoder.inject = project_and_inject  # pyright: ignore[reportAttributeAccessIssue]
            DeepStack.visual_tokens = narrow_tokens  # pyright: ignore[reportAttributeAccessIssue]
        size, seconds = temporaries(program_of(sizes, devices, asked.layers), asked.rows)
        print(f"{form}: {size:,.0f} MB of temporaries per device ({asked.rows} rows, mesh {asked.mesh}; {seconds:.0f} s)")


if __name__ == "__main__":
    sys.exit(main())
