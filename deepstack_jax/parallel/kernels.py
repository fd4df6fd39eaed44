"""Attention kernels, chosen by the kind of the mesh's devices, which need not be those of this machine."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from deepstack_jax.config import Config
from deepstack_jax.model.attention import (
    ATTENDED,
    AttentionFn,
    AttentionMask,
    Everything,
    Segments,
    causal_segment_mask,
    dot_product,
)
from deepstack_jax.parallel.cudnn import NEWEST, has_packed_form, installed_cudnn, packed_attention
from deepstack_jax.parallel.rules import ACTIVATION_RULES, BATCH_AXES

# "cudnn" computes nothing that is masked; "cudnn_mask" is the same library told of segments by a mask [B, 1, T, T].
Kernel = Literal["splash", "cudnn", "cudnn_mask", "xla"]
_BLOCKS = (512, 256, 128)  # of queries and keys that a TPU holds at once; the largest that divides is the fastest
_WHOLE = (1024, 896, 768, 640, 384)  # of pictures, whose sides of 14 or 16 pixels fill no power of two
_LANES = 128
_SMALL = 512  # patches of a picture whose scores XLA keeps on the chip as well, by what the compiler says of the tower
_ROWS = PartitionSpec(BATCH_AXES, None)


class Kernels(NamedTuple):
    """Those of a model."""

    decoder: Kernel
    tower: Kernel

    @property
    def scores_exist(self) -> bool:
        """Whether the decoder's attention makes its [T, S] scores, as XLA's does; flash kernels hold a block at a time."""
        return self.decoder == "xla"

    @property
    def tower_scores_exist(self) -> bool:
        """The same of the tower's."""
        return self.tower == "xla"

    @property
    def masked_computed(self) -> bool:
        """Whether the decoder's scores that the mask hides are computed."""
        return self.decoder in ("xla", "cudnn_mask")


def most_segments(config: Config) -> int:
    """Segments that a training row has room for, its padding included; 1 where it holds one example, padded on the right."""
    packing = config.data.packing
    return packing.max_examples + 1 if packing.enabled else 1


def kernels_for(platform: str, config: Config) -> Kernels:
    """The kernels of training."""
    dtype, vision = config.train.compute_dtype, config.vision
    return Kernels(
        kernel_for(platform, dtype, config.decoder.head_dim, packed=config.data.packing.enabled),
        kernel_for(platform, dtype, vision.width // vision.heads, packed=False, picture=config.patch_side**2),
    )


def kernel_for(platform: str, dtype: str, head_dim: int, *, packed: bool, picture: int = 0) -> Kernel:
    """The kernel of attention on devices of a platform: "tpu", "gpu" or "cpu"; decoding with a cache takes XLA's everywhere.

    Args:
      packed: whether rows hold several segments.
      picture: patches of a picture, which all see each other; 0 = a causal row.
    """
    if platform == "tpu":
        return "xla" if 0 < picture < _SMALL else "splash"
    if platform != "gpu" or dtype != "bfloat16":
        return "xla"
    capability, cudnn = _gpu()
    widest = 256 if capability >= 9 else 128 if capability >= 8 else 0
    if head_dim % 8 or head_dim > widest:
        return "xla"
    return "cudnn" if not packed or (capability >= 9 and has_packed_form(cudnn)) else "cudnn_mask"


def _gpu() -> tuple[int, int]:
    """Compute capability (first number, 0 of AMD's) of this machine's GPUs, and its cuDNN; the newest where none is here."""
    try:
        capability = jax.local_devices(backend="gpu")[0].compute_capability
    except RuntimeError:
        return 10, NEWEST
    major = capability.split(".")[0]  # AMD's have a name, not a number
    return int(major) if major.isdigit() else 0, installed_cudnn()


def attentions(kernels: Kernels, mesh: Mesh, segments: int = 1) -> tuple[AttentionFn, AttentionFn]:
    """Attention of decoder and tower, as `build_model` takes them. Prompts are rows of one segment, padded on the right.

    Args:
      segments: of `most_segments`.
    """
    return attention_for(kernels.decoder, mesh, segments=segments), attention_for(kernels.tower, mesh)


def attention_for(kernel: Kernel, mesh: Mesh, *, segments: int = 1) -> AttentionFn:
    """Attention on `mesh`, without a cache.

    Args:
      segments: of `most_segments`.
    """
    match kernel:
        case "splash":
            return SplashAttention(mesh)
        case "cudnn" | "cudnn_mask":
            return CudnnAttention(mesh, segments, masked=kernel == "cudnn_mask")
        case "xla":
            return dot_product


@dataclass(frozen=True)
class SplashAttention:
    """Pallas splash attention (jax.experimental): blocks above the diagonal or outside the window are never visited."""

    mesh: Mesh  # whose devices take rows along data and fsdp, heads along tensor
    interpret: bool = False  # emulate the kernel, on a machine without TPUs

    def __call__(self, q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
        return _on_each_device(self._local, self.mesh, q, k, v, mask)

    def _local(self, q: Array, k: Array, v: Array, mask: Segments | Everything) -> Array:
        """Attention of one device's rows and heads; within a segment positions are consecutive, so a window counts places."""
        # Pallas takes most of a second to import, which only a TPU's program needs.
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        rows, length, heads, head_dim = q.shape
        pad = -length % _LANES
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q * head_dim**-0.5, k, v))
        shape = length + pad, length + pad
        if isinstance(mask, Segments):
            segment_ids, blocks = jnp.asarray(mask.segment_ids), _BLOCKS
            one = masks.LocalMask(shape, (mask.window, 0), 0) if mask.window else masks.CausalMask(shape)
        else:  # a picture is small: all of it at once
            segment_ids, blocks = jnp.ones((rows, length), jnp.int32), (*_WHOLE, *_BLOCKS)
            one = masks.FullMask(shape)
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
        block = next(size for size in blocks if shape[0] % size == 0)
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([one] * heads),
            block_sizes=splash.BlockSizes(
                block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
            ),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENDED,
            interpret=self.interpret,
        )

        def of_row(q: Array, k: Array, v: Array, ids: Array) -> Any:
            return kernel(q, k, v, splash.SegmentIds(ids, ids))

        out = jax.vmap(of_row)(q, k, v, segment_ids)
        return out.swapaxes(1, 2)[:, :length]


@dataclass(frozen=True)
class CudnnAttention:
    """cuDNN's flash attention through jax."""

    # Its devices take rows along data and fsdp, heads along tensor. Left to itself jax asks that q, k, v and the mask lie alike
    mesh: Mesh
    # Most segments of a row. Rows of one example, padded on the right, need no more than causality, which keeps the padding out
    segments: int = 1
    masked: bool = False  # segments are told by a mask, where GPU, cuDNN or jax have no packed form
    # "xla" computes from the same arguments without cuDNN, on a machine without GPUs; not the packed form
    implementation: Literal["cudnn", "xla"] = "cudnn"

    def __call__(self, q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
        return _on_each_device(self._local, self.mesh, q, k, v, mask)

    def _local(self, q: Array, k: Array, v: Array, mask: Segments | Everything) -> Array:
        rows, length = q.shape[:2]
        pad = length % 2  # jax wants even lengths where there is a gradient
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        told: dict[str, Any]
        if isinstance(mask, Everything):
            lengths = jnp.full(rows, length, jnp.int32) if pad else None
            told = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        elif self.segments == 1:
            told = {"is_causal": True, "local_window_size": (mask.window, 0) if mask.window else None}
        else:
            segment_ids, positions = (jnp.pad(jnp.asarray(x), ((0, 0), (0, pad))) for x in (mask.segment_ids, mask.positions))
            if not self.masked:
                return packed_attention(q, k, v, segment_ids, segments=self.segments, window=mask.window)[:, :length]
            # Causal besides, so that blocks above the diagonal are not computed.
            told = {"mask": causal_segment_mask(segment_ids, positions, mask.window), "is_causal": True}
        return jax.nn.dot_product_attention(q, k, v, **told, implementation=self.implementation)[:, :length]


Local = Callable[[Array, Array, Array, Any], Array]


def _on_each_device(local: Local, mesh: Mesh, q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
    """`local` on the rows and heads of each device, which need nothing of each other."""
    rows, heads = mask.axes if isinstance(mask, Everything) else ("batch", "heads")
    axes: dict[str, Any] = dict(ACTIVATION_RULES)
    if not isinstance(mask, Segments | Everything) or q.shape[0] % math.prod(mesh.shape[axis] for axis in axes[rows]):
        return dot_product(q, k, v, mask)  # a mask; or the one row that parameters are drawn with
    lie = PartitionSpec(axes[rows], None, axes[heads], None)
    spread = jax.shard_map(local, mesh=mesh, in_specs=(lie, lie, lie, _ROWS), out_specs=lie, check_vma=False)
    return spread(q, k, v, jax.tree.map(jnp.asarray, mask))
