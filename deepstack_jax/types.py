"""Pytree structs that pass between packages, besides the Batch."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt

PyTree = Any
LORA = ("lora_a", "lora_b", "lora_scale")
"""Parameters of an adapter, beside the kernel that it adds to."""
HostOrDevice = jax.Array | np.ndarray  # where a function may be called outside jit with a batch fresh from the pipeline


class KVCache(NamedTuple):
    """Keys and values of every layer. Slots fill from the left; a row's padding leaves invalid slots after them."""

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    positions: Int[Array, "B S"]  # of the token in each slot
    valid: Bool[Array, "B S"]  # slots that a later token of the row may attend to
    filled: Int[Array, ""]  # slots written so far, the same for all rows


@struct.dataclass
class TrainState:
    """All that a step changes."""

    step: Int[Array, ""]  # batches consumed
    params: PyTree  # float32 masters; frozen ones in `Program.frozen_dtype`
    opt_state: PyTree
    bad_steps: Int[Array, ""]  # of the batches consumed, those whose loss or gradient was not finite: nothing was updated
    bad_in_a_row: Int[Array, ""]  # the latest of them that follow each other without a good one


@struct.dataclass
class AdaptedState(TrainState):
    """The same of a run with adapters; a class of its own, so that checkpoints of other runs stay what they were."""

    base: UInt[Array, ""]  # checksum of what does not train, which no checkpoint holds


class DecoderOutput(NamedTuple):
    """What the decoder gives back."""

    hidden: Float[Array, "B T D"]  # after the final norm
    cache: KVCache | None
    layer_inputs: Float[Array, "L B T D"] | None  # input of every layer, its injection included; on request only
