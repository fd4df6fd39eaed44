"""Weights that may lie cut over devices: made whole for a product, their gradients added up and cut again.

The model knows no devices. Whoever does hands in how (`parallel/fsdp.py`); without, the compiler decides all of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

from jax import Array

Axes = tuple[str | None, ...]  # logical ones, one for each axis of a weight


@runtime_checkable
class CutWeights(Protocol):
    """How cut weights come together and their gradients go apart."""

    def whole(self, weight: Array, axes: Axes) -> Array:
        """The weight, whole where each of the devices that share it computes with all of it."""
        ...

    def gradient(self, local: Callable[..., Array], operands: tuple[Array, ...], taken: tuple[Axes, ...], axes: Axes) -> Array:
        """The gradient of a weight, cut as the weight is.

        Args:
          local: makes the gradient of some rows of the batch from those rows of the operands; gradients add up.
          taken: the logical axes of each operand: "batch" where its rows are, the weight's own where they are that axis.
        """
        ...


_how: ContextVar[CutWeights | None] = ContextVar("cut_weights", default=None)


@contextmanager
def cut_weights(how: CutWeights | None) -> Iterator[None]:
    """Within: traced products make weights whole as `how` says.

    It is asked while a function is traced, and jit's cache knows nothing of it: a function that was traced under one is not
    traced again under another. Whoever sets it therefore sets the mesh with it, which the cache does know.
    """
    token = _how.set(how)
    try:
        yield
    finally:
        _how.reset(token)


def whole(weight: Array, axes: Axes) -> Array:
    """The weight for a product, already in the dtype of the product."""
    how = _how.get()
    return how.whole(weight, axes) if how else weight


def gradient(local: Callable[..., Array], operands: tuple[Array, ...], taken: tuple[Axes, ...], axes: Axes) -> Array:
    """`local(*operands)`, the gradient of a weight; see `CutWeights`."""
    how = _how.get()
    return how.gradient(local, operands, taken, axes) if how else local(*operands)
