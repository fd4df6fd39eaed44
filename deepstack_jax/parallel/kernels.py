"""Attention kernels, chosen by the kind of the mesh's devices, which need not be those of this machine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from deepstack_jax.model.attention import AttentionFn, AttentionMask, Segments, causal_segment_mask, dot_product
from deepstack_jax.parallel.rules import BATCH_AXES

Kernel = Literal["splash", "cudnn", "xla"]
_BLOCKS = (512, 256, 128)  # of queries and keys that a TPU holds at once; the largest that divides is the fastest
_LANES = 128
_ROWS = PartitionSpec(BATCH_AXES, None)
_HEADS = PartitionSpec(BATCH_AXES, None, "tensor", None)


def kernel_for(platform: str, dtype: str, head_dim: int) -> Kernel:
    """The kernel of training attention on devices of a platform: "tpu", "gpu" or "cpu".

    The tower, whose 577 tokens need no mask, and decoding with a cache take XLA's everywhere.
    """
    if platform == "tpu":
        return "splash"
    if platform == "gpu" and dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= _widest_head():
        return "cudnn"
    return "xla"


def _widest_head() -> int:
    """Of cuDNN's attention on this machine's GPUs, 0 where it has none; of the newest where no GPU is here, as `plan` asks."""
    try:
        capability = jax.local_devices(backend="gpu")[0].compute_capability
    except RuntimeError:
        return 256
    major = capability.split(".")[0]  # AMD's have a name, not a number
    return (256 if int(major) >= 9 else 128 if int(major) >= 8 else 0) if major.isdigit() else 0


def attention_for(kernel: Kernel, mesh: Mesh, *, packed: bool) -> AttentionFn:
    """Training attention on `mesh`, of rows that hold several segments where `packed`."""
    if kernel == "splash":
        return SplashAttention(mesh)
    return CudnnAttention(mesh, packed) if kernel == "cudnn" else dot_product


@dataclass(frozen=True)
class SplashAttention:
    """Pallas splash attention (jax.experimental): blocks above the diagonal or outside the window are never visited."""

    mesh: Mesh  # whose devices take rows along data and fsdp, heads along tensor
    interpret: bool = False  # emulate the kernel, on a machine without TPUs

    def __call__(self, q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
        def local(q: Array, k: Array, v: Array, mask: Segments) -> Array:
            return _splash(q, k, v, jnp.asarray(mask.segment_ids), mask.window, self.interpret)

        return _on_each_device(local, self.mesh, q, k, v, mask)


def _on_each_device(
    local: Callable[[Array, Array, Array, Segments], Array], mesh: Mesh, q: Array, k: Array, v: Array, mask: AttentionMask
) -> Array:
    """`local` on the rows and heads of each device, which need nothing of each other."""
    if not isinstance(mask, Segments) or q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return dot_product(q, k, v, mask)  # a mask; or the one row that parameters are drawn with

    spread = jax.shard_map(local, mesh=mesh, in_specs=(_HEADS, _HEADS, _HEADS, _ROWS), out_specs=_HEADS, check_vma=False)
    return spread(q, k, v, jax.tree.map(jnp.asarray, mask))


def _splash(q: Array, k: Array, v: Array, segment_ids: Array, window: int, interpret: bool) -> Array:
    """Attention of one device's rows and heads; within a segment positions are consecutive, so a window counts places."""
    # Pallas takes most of a second to import, which only a TPU's program needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, head_dim = q.shape[1:]
    pad = -length % _LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q * head_dim**-0.5, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    total = length + pad
    block = next(size for size in _BLOCKS if total % size == 0)
    shape = (total, total)
    one = masks.LocalMask(shape, (window, 0), 0) if window else masks.CausalMask(shape)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
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
    # Rows hold several segments, which cuDNN is told by a mask [B, 1, T, T] added to the scores. Rows of one example, padded on
    # the right, need no mask: causality alone keeps the padding out
    packed: bool
    # "xla" computes from the same arguments without cuDNN, on a machine without GPUs
    implementation: Literal["cudnn", "xla"] = "cudnn"

    def __call__(self, q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
        return _on_each_device(self._local, self.mesh, q, k, v, mask)

    def _local(self, q: Array, k: Array, v: Array, mask: Segments) -> Array:
        length = q.shape[1]
        pad = length % 2  # jax wants even lengths where there is a gradient
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        if self.packed:
            segment_ids, positions = (jnp.pad(jnp.asarray(x), ((0, 0), (0, pad))) for x in (mask.segment_ids, mask.positions))
            rule: dict[str, Any] = {"mask": causal_segment_mask(segment_ids, positions, mask.window)}
        else:
            rule = {"is_causal": True, "local_window_size": (mask.window, 0) if mask.window else None}
        return jax.nn.dot_product_attention(q, k, v, **rule, implementation=self.implementation)[:, :length]
