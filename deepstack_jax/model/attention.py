"""Rotary positions, masks, and the attention kernel's signature. The kernel itself is a callable handed in."""

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jaxtyping import Array, Bool, Float, Int

from deepstack_jax.config import RopeConfig
from deepstack_jax.model.layers import scaled
from deepstack_jax.types import HostOrDevice


@struct.dataclass
class Segments:
    """What tokens of a training row see: earlier ones of their own segment, as `causal_segment_mask` says.

    Kernels that know segments never hold the mask, which grows with T squared.
    """

    segment_ids: Int[HostOrDevice, "B T"]
    positions: Int[HostOrDevice, "B T"]
    window: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Everything:
    """Every token sees every other of its row, as in a picture."""

    axes: tuple[str, str] = struct.field(pytree_node=False)  # logical axes of the rows and the heads, for kernels of a mesh


# The name that remat knows attention's output by, and what else of its forward pass the backward pass reads.
ATTENDED = "attended"
_UNNAMED = "dot_product_attention_fwd_wrapper"  # the primitive of cuDNN's attention in jax, which gives its results no name


def keeps_attention(primitive: Primitive, *_: Any, **params: Any) -> bool:
    """A policy of remat: attention's output, and the sums of its softmax, are not computed again."""
    return params.get("name") == ATTENDED if primitive.name == "name" else primitive.name == _UNNAMED


AttentionMask = Segments | Everything | Bool[Array, "B 1 T S"] | None  # None = everything, on one device


@runtime_checkable
class AttentionFn(Protocol):
    """softmax(q k^T / sqrt(H)) v with grouped key/value heads; softmax in float32."""

    def __call__(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: AttentionMask
    ) -> Float[Array, "B T N H"]: ...


def dot_product(q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
    """The portable kernel: XLA's own fusion on every backend, the mask made where it is used.

    Heads come before tokens in every product. `jax.nn.dot_product_attention` puts them after, and its gradient takes 1.1 to
    1.7 times as long on a CPU, in transposes.
    """
    match mask:
        case Segments():
            visible = causal_segment_mask(mask.segment_ids, mask.positions, mask.window)
        case Everything():
            visible = None
        case _:
            visible = mask
    rows, length, heads, width = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(rows, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)  # [B, K, N / K, T, H]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * width**-0.5
    if visible is not None:
        scores = jnp.where(visible[:, :, None], scores, jnp.finfo(jnp.float32).min)
    y = jnp.einsum("bkgts,bksh->bkgth", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    y = checkpoint_name(y, ATTENDED)
    return y.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)


def causal_segment_mask(
    segment_ids: Int[HostOrDevice, "B T"], positions: Int[HostOrDevice, "B T"], window: int = 0
) -> Bool[Array, "B 1 T T"]:
    """True where t may attend to s: same segment, s not after t, and at most `window` before it (0 = any distance).

    Padding (segment 0) sees padding, so no row is empty. `window` counts as upstream's masks; transformers 5 allows one less.
    """
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tri(length, dtype=bool)
    return (same & causal & within_window(positions, positions, window))[:, None]


def within_window(
    positions: Int[HostOrDevice, "B T"], keys: Int[HostOrDevice, "B S"], window: int
) -> Bool[Array, "B T S"] | Bool[Array, ""]:
    """True where a key is at most `window` positions before the query; always, for a window of 0."""
    if window == 0:
        return jnp.ones((), bool)
    return jnp.asarray(positions)[:, :, None] - jnp.asarray(keys)[:, None, :] <= window


class Rotary(NamedTuple):
    """Cosine and sine of every angle, the same for all layers; float32, since bf16 cannot tell position 257 from 256."""

    cos: Float[Array, "B T Hh"]  # Hh = H / 2
    sin: Float[Array, "B T Hh"]


class RotaryTable(NamedTuple):
    """What the angles of a model are computed from; numpy, made at build time by `rotary_table`."""

    short: np.ndarray  # f32[H / 2] frequencies of sequences within the original context
    long: np.ndarray  # f32[H / 2] those of longer ones
    limit: int  # the original context; 0 = there is no other
    scale: float  # on cosine and sine


def rotary_table(config: RopeConfig, head_dim: int, max_positions: int) -> RotaryTable:
    """Frequencies theta ** (-2i / H), divided by the factors that the scaling asks for (RoFormer; LongRoPE; Llama 3.1).

    `max_positions` over the original context gives LongRoPE's factor on cosine and sine, as upstream.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    plain = (config.theta**exponents).astype(np.float32)
    match config.scaling:
        case "linear":
            short = 1 / (plain * np.float32(config.factor))
        case "llama3":
            short = _llama3_frequencies(1 / plain, config)
        case "longrope" | "yarn":
            short, long = (1 / (np.asarray(factor, np.float32) * plain) for factor in (config.short_factor, config.long_factor))
            ratio = max(1.0, max_positions / config.original_positions)
            longrope = math.sqrt(1 + math.log(ratio) / math.log(config.original_positions))
            return RotaryTable(
                short, long, config.original_positions, longrope if config.scaling == "longrope" else 0.1 * math.log(ratio) + 1
            )
        case _:
            short = 1 / plain
    return RotaryTable(short, short, 0, 1.0)


def _llama3_frequencies(frequencies: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones kept, those between blended (transformers' `llama3`)."""
    turns = config.original_positions * frequencies / (2 * np.pi)  # of a wave within the original context
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (frequencies * (keep + (1 - keep) / config.factor)).astype(np.float32)


def rotary_angles(table: RotaryTable, positions: Int[HostOrDevice, "B T"], last: Int[HostOrDevice, "B T"]) -> Rotary:
    """Cosines and sines for every position.

    Args:
      table: frequencies.
      positions: of each token in its own segment.
      last: the last position of the segment that each token belongs to; only LongRoPE asks, which takes other frequencies for
        a sequence beyond the original context. Upstream asks for the longest row of the batch, which would let rows change
        each other.
    """
    frequencies = jnp.asarray(table.short)
    if table.limit:
        beyond = jnp.asarray(last)[..., None] >= table.limit
        frequencies = jnp.where(beyond, jnp.asarray(table.long), frequencies)
    angles = jnp.asarray(positions).astype(jnp.float32)[..., None] * frequencies
    return Rotary(jnp.cos(angles) * table.scale, jnp.sin(angles) * table.scale)


def last_positions(positions: Int[HostOrDevice, "B T"], segment_ids: Int[HostOrDevice, "B T"]) -> Int[Array, "B T"]:
    """The last position of the segment at each token; a segment's tokens are side by side."""
    positions, segment_ids = jnp.asarray(positions), jnp.asarray(segment_ids)
    length = positions.shape[1]
    ends = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(ends, jnp.arange(length), length - 1), axis=1, reverse=True)
    return jnp.take_along_axis(positions, end, axis=1)


def rotate(x: Float[Array, "B T N H"], rotary: Rotary, scale: float = 1.0) -> Float[Array, "B T N H"]:
    """Turn the two halves of each head by the angles (halves as in the Hugging Face LLaMA), times `scale`."""
    cos, sin = (scaled(part, scale)[:, :, None] for part in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
