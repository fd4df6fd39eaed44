"""How our parameters are called elsewhere: one table per model, read in both directions.

The rows come from the families: a path in our tree beside a name in an official checkpoint; `{}` counts layers, which we stack
along axis 0. A row's layout says how the tensor is turned, its sizes what shape it has, in letters that the family replaces by
numbers. Every layout is a bijection. Other projects' names are rewritten to the official ones first (`canonical`), so there is
no second table.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from deepstack_jax.config import Config
from deepstack_jax.families.base import Names, Row
from deepstack_jax.families.forms import model_names


class TensorPiece(NamedTuple):
    """Where one layer of a parameter is stored: rows `start` to `stop` of the tensor `name`."""

    name: str
    start: int
    stop: int


class ParameterLeaf(NamedTuple):
    """A parameter of ours: its whole shape, and one piece per layer (or one alone)."""

    shape: tuple[int, ...]
    layer_shape: tuple[int, ...]
    layout: str
    inputs: int  # leading axes of a layer that a kernel contracts
    stacked: bool
    pieces: tuple[TensorPiece, ...]


class Foreign(NamedTuple):
    """A tensor of theirs: its shape, and the (path, layer) whose rows it holds, in order."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]


class NameTable:
    """The rows of one configuration, with numbers.

    Attributes:
      leaves: by our path. tensors: by the official name, in the order of the model.
    """

    def __init__(self, config: Config) -> None:
        self.leaves: dict[str, ParameterLeaf] = {}
        self.tensors: dict[str, Foreign] = {}
        for names in model_names(config):
            for row in names.rows:
                self._add(row, names)

    def _add(self, row: Row, names: Names) -> None:
        inner, outer = (tuple(names.sizes[letter] for letter in side.split()) for side in row.sizes.rpartition("|")[::2])
        if row.layout == "linear":
            shape = math.prod(outer), math.prod(inner)
        elif row.layout == "patches":
            side = math.isqrt(inner[0] // 3)
            shape = *outer, 3, side, side
        else:
            shape = (math.prod(outer),) if row.layout == "flat" else outer
        stacked = "{}" in row.theirs
        foreign = [row.theirs.format(layer) for layer in names.layers] if stacked else [row.theirs]
        pieces = tuple(self._claim(name, row.ours, at, shape) for at, name in enumerate(foreign))
        layer_shape = (*inner, *outer)
        whole = (len(foreign), *layer_shape) if stacked else layer_shape
        self.leaves[row.ours] = ParameterLeaf(whole, layer_shape, row.layout, len(inner), stacked, pieces)

    def _claim(self, name: str, path: str, layer: int, shape: tuple[int, ...]) -> TensorPiece:
        """The next rows of the tensor `name`, which another parameter may have begun where tensors are fused."""
        before = self.tensors.get(name, Foreign((0, *shape[1:]), ()))
        start = before.shape[0]
        self.tensors[name] = Foreign((start + shape[0], *shape[1:]), (*before.parts, (path, layer)))
        return TensorPiece(name, start, start + shape[0])

    def theirs(self, name: str, leaves: Mapping[str, Any]) -> np.ndarray:
        """The official tensor `name`, made of parameters by path: arrays, or what gives layers and blocks like one."""
        shape, parts = self.tensors[name]
        rows = []
        for path, layer in parts:
            leaf = self.leaves[path]
            index = layer if leaf.stacked else tuple(slice(None) for _ in leaf.shape)
            rows.append(to_theirs(np.asarray(leaves[path][index]), leaf, shape))
        return rows[0] if len(rows) == 1 else np.concatenate(rows)


def to_ours(tensor: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    """One layer's foreign tensor as ours, of `shape` (without the layer axis); a view wherever numpy can make one."""
    if layout == "linear":
        tensor = tensor.T
    elif layout == "patches":
        tensor = tensor.transpose(2, 3, 1, 0)
    if tensor.size != math.prod(shape):
        raise ValueError(f"a tensor of shape {tensor.shape} cannot become {shape}")
    return tensor.reshape(shape)


def to_theirs(layer: np.ndarray, leaf: ParameterLeaf, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_ours`: one layer of a parameter as rows of the foreign tensor of `shape`."""
    if leaf.layout == "linear":
        return layer.reshape(math.prod(layer.shape[: leaf.inputs]), -1).T
    if leaf.layout == "patches":
        return layer.reshape(*shape[2:], 3, -1).transpose(3, 2, 0, 1)
    return layer.reshape(-1, *shape[1:])
