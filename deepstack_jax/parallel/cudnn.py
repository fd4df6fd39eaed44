"""cuDNN's attention over rows of several segments, which jax has beneath its public function: the one place that asks for it.

Each segment is computed as a sequence of its own, read where it lies: neither other segments nor keys after the query are.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepstack_jax.errors import ConfigError

_ASKED = ("mask_type", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "sliding_window_length")
_OLDEST = 90600  # cuDNN that has it, as its library counts versions
NEWEST = 10**9  # cuDNN, where nothing is known of it
# Until this version jax counts offsets of keys in steps of the query's heads, and so reads keys of grouped heads elsewhere.
_GROUPED_HEADS_RIGHT = (0, 11, 1)


def has_packed_form(cudnn: int) -> bool:
    """Whether this jax and a version of cuDNN have it; with jax it is not public, and may change with any version."""
    try:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
    except ImportError:
        return False
    asked = set(_ASKED) <= set(inspect.signature(dot_product_attention).parameters)
    return asked and hasattr(MaskType, "PADDING_CAUSAL") and cudnn >= _OLDEST


def installed_cudnn() -> int:
    """The version of this machine's cuDNN, 0 where there is none or jax does not say."""
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

        return int(check_cudnn_version())
    except (ImportError, RuntimeError):
        return 0


def spans(segment_ids: Int[Array, "B T"], most: int) -> tuple[Int[Array, "B most"], Int[Array, "B most"]]:
    """Where the segments of each row begin, and how long they are; -1 where a row has no more.

    A run of equal ids is a segment. Padding is one too, so that every place of the output is written.
    """
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    number = jnp.cumsum(begins, axis=1)
    lengths = (number[:, None] == jnp.arange(most)[:, None]).sum(axis=-1, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=1) - lengths
    return jnp.where(lengths > 0, starts, -1), jnp.where(lengths > 0, lengths, -1)


def packed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    segments: int,
    window: int = 0,
) -> Float[Array, "B T N H"]:
    """Causal attention within each segment.

    Args:
      segments: most runs of equal ids in a row, padding included. A place in a later one stays unwritten. The softmax's sums,
        which the backward pass reads, take B * segments * N * T floats.
      window: positions before its own that a token sees; 0 = all.

    Raises:
      ConfigError: more elements than cuDNN counts; how many rows a step has is known only now, where examples are packed.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    heads, groups = q.shape[2], q.shape[2] // k.shape[2]
    if q.size >= 2**31:
        raise ConfigError(
            f"{q.shape[0]} rows of {q.shape[1]} tokens and {heads} heads of {q.shape[3]} are more elements on a device than "
            "cuDNN counts, 2**31; raise config.train.accumulation"
        )
    if groups > 1 and jax.__version_info__ < _GROUPED_HEADS_RIGHT:
        # By way of float32, in which the gradients of the repeated heads are then added up.
        k, v = (jnp.repeat(x.astype(jnp.float32), groups, axis=2).astype(x.dtype) for x in (k, v))
    starts, lengths = spans(segment_ids, segments)
    starts = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    out: Any = dot_product_attention(
        q,
        k,
        v,
        mask_type=MaskType.PADDING_CAUSAL,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=q.shape[3] ** -0.5,
        sliding_window_length=window + 1 if window else None,  # cuDNN counts the token itself
    )
    return out
