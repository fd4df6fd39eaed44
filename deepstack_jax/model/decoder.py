"""LLaMA blocks under one scan whose carry holds the hidden states and `layer_inject`, the stack of high-resolution groups.

The scan compiles one block whatever the depth. `layer_inject` is forwarded by the body untouched and in plain sight, and remat
wraps injection and block together: so the backward pass saves one hidden state per layer and never the stack.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deepstack_jax.config import DecoderConfig
from deepstack_jax.model.attention import AttentionFn, AttentionMask, Rotary, rotate
from deepstack_jax.model.layers import ACTIVATIONS, PRODUCT, RMSNorm, linear
from deepstack_jax.model.merge import VisualIndex, inject
from deepstack_jax.types import DecoderOutput, KVCache

LAYER_INPUT = "layer_input"  # the name that remat knows the hidden states at the input of a layer by
# What a layer keeps for its backward pass, by `remat`. Matrix products with weights are most of a layer's work.
REMAT = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT], offload_src="device", offload_dst="pinned_host"
    ),
}
ACTIVATION_AXES = ("batch", "sequence", "embed")
Cache = tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]  # keys and values of all layers
CachePlace = tuple[Array, Array | None]  # i32[] this layer, i32[] the slots filled so far


def _through_cache(cache: Cache, new: tuple[Array, Array], at: CachePlace) -> tuple[Cache, tuple[Array, Array]]:
    """The cache with new keys and values at this layer's next slots, and all of this layer's."""
    layer, filled = at
    if filled is None:
        raise ValueError("a cache came without the number of its filled slots; pass a KVCache to the decoder")
    keys, values = (
        jax.lax.dynamic_update_slice(whole, part[None], (layer, 0, filled, 0, 0))
        for whole, part in zip(cache, new, strict=True)
    )
    k, v = (jax.lax.dynamic_index_in_dim(whole, layer, 0, keepdims=False) for whole in (keys, values))
    return (keys, values), (k, v)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions (LLaMA)."""

    config: DecoderConfig
    attend: AttentionFn
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: Rotary,
        mask: AttentionMask,
        cache: Cache | None,
        at: CachePlace,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        cfg = self.config
        axes = ("embed", "heads", "head_dim")
        q = linear((cfg.heads, cfg.head_dim), axes, dtype=self.dtype, name="q")(x)
        k = linear((cfg.kv_heads, cfg.head_dim), ("embed", "kv_heads", "head_dim"), dtype=self.dtype, name="k")(x)
        v = linear((cfg.kv_heads, cfg.head_dim), ("embed", "kv_heads", "head_dim"), dtype=self.dtype, name="v")(x)
        q = nn.with_logical_constraint(rotate(q, rotary), ("batch", "sequence", "heads", "head_dim"))
        k = rotate(k, rotary)
        if cache is not None:
            cache, (k, v) = _through_cache(cache, (k, v), at)
        y = self.attend(q, k, v, mask)
        residual_scale = 1 / (2 * cfg.layers)
        out = linear(cfg.width, ("heads", "head_dim", "embed"), inputs=2, scale=residual_scale, dtype=self.dtype, name="o")
        return out(y), cache


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cfg = self.config
        gate = linear(cfg.mlp, ("embed", "mlp"), dtype=self.dtype, name="gate")(x)
        up = linear(cfg.mlp, ("embed", "mlp"), dtype=self.dtype, name="up")(x)
        hidden = nn.with_logical_constraint(ACTIVATIONS["silu"](gate) * up, ("batch", "sequence", "mlp"))
        return linear(cfg.width, ("mlp", "embed"), scale=1 / (2 * cfg.layers), dtype=self.dtype, name="down")(hidden)


class InjectedBlock(nn.Module):
    """One layer: add this layer's group, then the pre-norm block. This is the unit that remat recomputes."""

    config: DecoderConfig
    attend: AttentionFn
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer_inject: Float[Array, "J B M D"] | None,
        group: Int[Array, ""],
        index: VisualIndex | None,
        rotary: Rotary,
        mask: AttentionMask,
        cache: Cache | None,
        at: CachePlace,
    ) -> tuple[Array, Array, Cache | None]:
        x = checkpoint_name(x, LAYER_INPUT)
        if layer_inject is not None and index is not None:
            x = inject(x, layer_inject, group, index)
        injected = x = nn.with_logical_constraint(x, ACTIVATION_AXES)
        normed = RMSNorm(self.config.norm_eps, name="attention_norm")(x)
        attended, cache = Attention(self.config, self.attend, self.dtype, name="attention")(normed, rotary, mask, cache, at)
        x = nn.with_logical_constraint(x + attended, ACTIVATION_AXES)
        x = x + SwiGLU(self.config, self.dtype, name="mlp")(RMSNorm(self.config.norm_eps, name="mlp_norm")(x))
        return nn.with_logical_constraint(x, ACTIVATION_AXES), injected, cache


class ScanBody(nn.Module):
    """One step of the scan: the stack leaves as it came, outside remat, or it would be saved once per layer.

    The cache of all layers rides in the carry, where it is written in place; as an output per layer it would be copied whole
    for every token.
    """

    config: DecoderConfig
    attend: AttentionFn
    dtype: DTypeLike
    keep_inputs: bool

    @nn.compact
    def __call__(self, carry, per_layer, index, rotary, mask, filled):
        x, layer_inject, cache = carry
        group, layer = per_layer
        remat = self.config.remat
        block = InjectedBlock if remat == "none" else nn.remat(InjectedBlock, prevent_cse=False, policy=REMAT[remat])
        x, injected, cache = block(self.config, self.attend, self.dtype, name="block")(
            x, layer_inject, group, index, rotary, mask, cache, (layer, filled)
        )
        return (x, layer_inject, cache), injected if self.keep_inputs else None


class Decoder(nn.Module):
    """Layers and final norm of a LLaMA decoder with DeepStack injection (paper section 3.2, figure 2)."""

    config: DecoderConfig
    schedule: tuple[int, ...]  # group added at the input of each layer, or -1
    attend: AttentionFn
    dtype: DTypeLike
    keep_inputs: bool = False  # also return the input of every layer, for tests and inspection

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: Rotary,
        mask: AttentionMask,
        layer_inject: Float[Array, "J B M D"] | None = None,
        index: VisualIndex | None = None,
        cache: KVCache | None = None,
    ) -> DecoderOutput:
        """Run all layers.

        Args:
          x: input embeddings, visual tokens already merged in.
          rotary: cosine and sine at each token's position.
          mask: what each token attends to, as segments, or as a mask over S keys: T without a cache, else the cache's slots.
          layer_inject: the stack, or None: then nothing is injected (text only, baselines, decoding after prefill).
          index: where visual tokens stand; needed with `layer_inject`.
          cache: keys and values so far; this call's T tokens are written at slots `filled`..`filled` + T.
        """
        cfg = self.config
        scanned = nn.scan(
            ScanBody,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=cfg.layers,
            unroll=1 if cfg.scan else cfg.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=False,  # or the block is traced twice
        )
        kv = None if cache is None else (cache.keys, cache.values)
        filled = None if cache is None else cache.filled
        per_layer = (jnp.asarray(self.schedule, jnp.int32), jnp.arange(cfg.layers, dtype=jnp.int32))
        body = scanned(cfg, self.attend, self.dtype, self.keep_inputs, name="layers")
        (x, _, kv), inputs = body((x, layer_inject, kv), per_layer, index, rotary, mask, filled)
        if cache is not None:
            cache = cache._replace(keys=kv[0], values=kv[1], filled=cache.filled + x.shape[1])
        return DecoderOutput(RMSNorm(cfg.norm_eps, name="norm")(x), cache, inputs)
