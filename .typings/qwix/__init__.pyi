# What is used of it, since an extra installs it.
from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax.typing import DTypeLike

class QArray:
    qvalue: jax.Array
    scale: jax.Array
    def __init__(self, qvalue: Any, scale: Any, zero_point: Any = None, qtype: DTypeLike | str | None = None) -> None: ...

def quantize(
    array: jax.Array, qtype: DTypeLike | str, *, channelwise_axes: Collection[int] = (), tiled_axes: Mapping[int, int] = ...
) -> QArray: ...
def dequantize(array: QArray) -> jax.Array: ...
