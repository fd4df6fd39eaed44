"""Logical axes of parameters and activations -> axes of the mesh. The model knows the left side only."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepstack_jax.errors import ConfigError
from deepstack_jax.model.cut_weights import Axes, cut_weights
from deepstack_jax.parallel.fsdp import AXIS, explicit_fsdp

BATCH_AXES = ("data", "fsdp")
ALL_AXES = (*BATCH_AXES, "tensor")
# Parameters and what is computed from them. Where two names of an array want the same axis of the mesh, the one that comes
# first here has it.
RULES = (
    ("batch", BATCH_AXES),
    ("crops", ALL_AXES),  # the tower is small and crops are many: each device encodes whole crops
    ("crop_slots", "tensor"),  # the same crops by row of the batch
    ("sequence", None),
    ("embed", "fsdp"),
    ("visual_tokens", "tensor"),  # of a row, in the projector, whose weights are gathered for it
    ("stack_embed", "tensor"),  # the width of the injected stack; a layer gathers its own group only
    ("vision_embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vision_heads", "tensor"),
    ("mlp", "tensor"),
    ("vision_mlp", "tensor"),
    ("vocab", "tensor"),
    ("head_dim", None),
    ("rank", None),
    ("patch_pixels", None),
    ("layers", None),
    ("vision_layers", None),
)
# Activations are split over the batch along fsdp already, so their width is not; those of the tower over crops along
# tensor, so its heads are not.
_CROPS_TAKE = ("vision_heads", "vision_mlp")
ACTIVATION_RULES = tuple((name, None if axes == "fsdp" or name in _CROPS_TAKE else axes) for name, axes in RULES)


def cut_axis(axes: Axes) -> int | None:
    """Which axis of a parameter lies along fsdp, None = none of them."""
    spec = nn.logical_to_mesh_axes(axes, RULES)
    return next((at for at, name in enumerate(spec or ()) if name == AXIS), None)


def computed_spec(axes: Axes) -> PartitionSpec:
    """Where an array lies in computation, by its logical axes."""
    return nn.logical_to_mesh_axes(axes, ACTIVATION_RULES) or PartitionSpec()


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Within: jitted code runs on `mesh`, the model's activation axes mean what ACTIVATION_RULES say, weights are gathered."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATION_RULES), cut_weights(explicit_fsdp(mesh, cut_axis, computed_spec)):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def crop_shards(mesh: Mesh) -> tuple[int, int]:
    """How a flat list of crops is cut: over so many shards of the batch, and each of those over so many devices."""
    return mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]


def shards_of(mesh: Mesh, name: str | None) -> int:
    """Parts that an axis of a parameter is cut into, by its logical name."""
    axes = dict(RULES)[name] if name else None
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all batch axes; the other axes are whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def param_shardings(mesh: Mesh, boxed: Any) -> Any:
    """Sharding of every parameter.

    Args:
      boxed: the abstract tree with logical axes, as `jax.eval_shape(model.init, ...)` gives it.

    Raises:
      ConfigError: naming every parameter that does not divide over its mesh axes.
    """
    specs = nn.get_partition_spec(boxed)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    problems = []
    sizes = jax.tree.leaves(nn.unbox(boxed))
    for (path, sharding), leaf in zip(jax.tree_util.tree_leaves_with_path(shardings), sizes, strict=True):
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            problems.append(f"{name} {leaf.shape} over {sharding.spec}")
    if problems:
        raise ConfigError(
            f"{len(problems)} parameters do not divide over the mesh {dict(mesh.shape)}: {'; '.join(problems[:8])}; "
            "choose smaller config.mesh.fsdp or config.mesh.tensor"
        )
    return shardings
