"""LoRA adapters as parameters: which there are of a kernel, and what they are before training."""

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from deepstack_jax.config import Config
from deepstack_jax.types import LORA
from deepstack_jax.weights.names import NameTable, ParameterLeaf
from deepstack_jax.weights.save import LeafLike


def adapter_paths(kernel: str) -> tuple[str, str, str]:
    """Paths of the two maps of a kernel's adapter, and of its scale."""
    return tuple(f"{kernel.removesuffix('/kernel')}/{name}" for name in LORA)  # type: ignore[return-value]


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return path.endswith(tuple(f"/{name}" for name in LORA))


def adapter_shapes(leaf: ParameterLeaf, rank: int) -> tuple[tuple[int, ...], ...]:
    """Shapes [L, *in, r], [L, r, *out] and [L] of the adapter of a kernel; L for stacked ones only."""
    layers = leaf.shape[:1] if leaf.stacked else ()
    ins, outs = leaf.layer_shape[: leaf.inputs], leaf.layer_shape[leaf.inputs :]
    return (*layers, *ins, rank), (*layers, rank, *outs), layers


def boxed_adapters(kernels: Mapping[str, Any], config: Config) -> dict[str, nn.LogicallyPartitioned]:
    """The abstract adapters of some kernels with their logical axes, by path.

    Args:
      kernels: abstract and with logical axes, as `jax.eval_shape(model.init, ...)` gives them.
    """
    table, found = NameTable(config).leaves, {}
    for path, kernel in kernels.items():
        leaf = table[path]
        layers, axes = kernel.names[: leaf.stacked], kernel.names[leaf.stacked :]
        names = (*layers, *axes[: leaf.inputs], "rank"), (*layers, "rank", *axes[leaf.inputs :]), layers
        for name, shape, logical in zip(adapter_paths(path), adapter_shapes(leaf, config.lora.rank), names, strict=True):
            found[name] = nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), logical)
    return found


def fresh_adapters(kernels: Iterable[str], config: Config, key: jax.Array) -> dict[str, jax.Array]:
    """Adapters that change nothing yet, by path: lora_a drawn as PEFT draws it, lora_b zero.

    What is drawn for a kernel does not depend on which others have adapters.
    """
    table, made = NameTable(config).leaves, {}
    for path in kernels:
        leaf = table[path]
        a, b, scale = adapter_shapes(leaf, config.lora.rank)
        bound = math.prod(leaf.layer_shape[: leaf.inputs]) ** -0.5
        drawn = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), a, minval=-bound, maxval=bound)
        values = drawn, jnp.zeros(b), jnp.full(scale, config.lora.scale, jnp.float32)
        made |= dict(zip(adapter_paths(path), values, strict=True))
    return made


class MergedLeaf:
    """A kernel with its adapter added, in float32, layer by layer as it is asked for; see `LeafLike` of `save.py`."""

    def __init__(self, leaf: ParameterLeaf, kernel: LeafLike, adapter: tuple[LeafLike, LeafLike, LeafLike]) -> None:
        self.shape = leaf.shape
        self._kernel, self._adapter = kernel, adapter

    def __getitem__(self, index: Any) -> np.ndarray:
        """One layer, by its number, or the whole of a kernel that is not stacked."""
        kernel = np.asarray(self._kernel[index]).astype(np.float32)
        a, b, scale = (np.asarray(part[index if isinstance(index, int) else ...], np.float32) for part in self._adapter)
        return kernel + scale * np.tensordot(a, b, axes=1)


def merged(leaves: Mapping[str, LeafLike], config: Config) -> dict[str, LeafLike]:
    """Parameters without adapters, which are in their kernels then; kernels are computed when they are read."""
    table, found = NameTable(config).leaves, {}
    for path, value in leaves.items():
        adapter = adapter_paths(path)
        if adapter[0] in leaves:
            a, b, scale = (leaves[name] for name in adapter)
            found[path] = MergedLeaf(table[path], value, (a, b, scale))
        elif not is_adapter(path):
            found[path] = value
    return found
