"""Decoder blocks under one scan whose carry holds the hidden states and `layer_inject`, the stack of high-resolution groups.

The scan compiles one block whatever the depth. `layer_inject` is forwarded by the body untouched and in plain sight, and remat
wraps injection and block together: so the backward pass saves one hidden state per layer and never the stack.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deepstack_jax.config import DecoderConfig
from deepstack_jax.model.attention import (
    AttentionFn,
    AttentionMask,
    Rotary,
    Segments,
    keeps_attention,
    last_positions,
    rotary_angles,
    rotary_table,
    rotate,
)
from deepstack_jax.model.layers import ACTIVATIONS, PLAIN, PRODUCT, RMSNorm, Rounding, linear, scaled
from deepstack_jax.model.merge import VisualIndex, inject
from deepstack_jax.types import DecoderOutput, HostOrDevice, KVCache

# The names that remat knows the hidden states at the input of a layer by, and those between attention and MLP.
LAYER_INPUT, MIDDLE = "layer_input", "middle"
# What a layer keeps for its backward pass, by `remat`. Matrix products with weights are most of a layer's work.
REMAT = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "minimal": jax.checkpoint_policies.save_from_both_policies(
        keeps_attention, jax.checkpoint_policies.save_only_these_names(MIDDLE)
    ),
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT], offload_src="device", offload_dst="pinned_host"
    ),
}
ACTIVATION_AXES = ("batch", "sequence", "embed")
Cache = tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]  # keys and values of all layers


class LayerCall(NamedTuple):
    """All that one layer is given beside its parameters.

    Attributes:
      x: hidden states. layer_inject: the stack of groups, None where nothing is injected.
      group: i32[], of the stack, that is added here; -1 = none. layer: i32[], its number.
      cache: keys and values of all layers, None in training. filled: i32[], slots of the cache in use.
      visual_index, rotary, mask: where visual tokens are, rotary angles, what each token attends to; the same for all layers.
    """

    x: Float[Array, "B T D"]
    layer_inject: Float[Array, "J B M D"] | None
    group: Int[Array, ""]
    layer: Int[Array, ""]
    cache: Cache | None
    filled: Int[Array, ""] | None
    visual_index: VisualIndex | None
    rotary: Rotary
    mask: AttentionMask


def _through_cache(call: LayerCall, new: tuple[Array, Array]) -> tuple[Cache | None, tuple[Array, Array]]:
    """The cache with new keys and values at this layer's next slots, and those that its queries may see.

    With a mask over the cache's slots these are all of this layer's; segments are of the tokens of this call alone.
    """
    cache, layer, filled = call.cache, call.layer, call.filled
    if cache is None:
        return None, new
    if filled is None:
        raise ValueError("a cache came without the number of its filled slots; pass a KVCache to the decoder")
    keys, values = (
        jax.lax.dynamic_update_slice(whole, part[None], (layer, 0, filled, 0, 0))
        for whole, part in zip(cache, new, strict=True)
    )
    if isinstance(call.mask, Segments):
        return (keys, values), new
    k, v = (jax.lax.dynamic_index_in_dim(whole, layer, 0, keepdims=False) for whole in (keys, values))
    return (keys, values), (k, v)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: DecoderConfig
    attend: AttentionFn
    dtype: DTypeLike
    bias: bool = False  # of q, k and v
    out_bias: bool = False
    rounding: Rounding = PLAIN

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], call: LayerCall) -> tuple[Float[Array, "B T D"], Cache | None]:
        cfg = self.config
        sizes = {"q": (cfg.heads, "heads"), "k": (cfg.kv_heads, "kv_heads"), "v": (cfg.kv_heads, "kv_heads")}
        make = partial(linear, dtype=self.dtype, rounding=self.rounding)
        q, k, v = (
            make((heads, cfg.head_dim), ("embed", axis, "head_dim"), bias=self.bias, name=name)(x)
            for name, (heads, axis) in sizes.items()
        )
        if cfg.head_norm:
            q, k = (RMSNorm(cfg.norm_eps, "head_dim", name=name)(x) for name, x in (("q_norm", q), ("k_norm", k)))
        scale = cfg.attention_multiplier * cfg.head_dim**0.5 or 1.0  # the kernel itself divides by the root
        q = nn.with_logical_constraint(rotate(q, call.rotary, scale), ("batch", "sequence", "heads", "head_dim"))
        cache, (k, v) = _through_cache(call, (rotate(k, call.rotary), v))
        y = self.attend(q, k, v, call.mask)
        axes, scale = ("heads", "head_dim", "embed"), 1 / (2 * cfg.layers)
        return make(cfg.width, axes, inputs=2, bias=self.out_bias, scale=scale, name="o")(y), cache


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: DecoderConfig
    dtype: DTypeLike
    bias: bool = False
    rounding: Rounding = PLAIN

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cfg = self.config
        make = partial(linear, bias=self.bias, dtype=self.dtype, rounding=self.rounding)
        gate, up = (make(cfg.mlp, ("embed", "mlp"), name=name)(x) for name in ("gate", "up"))
        hidden = nn.with_logical_constraint(ACTIVATIONS["silu"](gate) * up, ("batch", "sequence", "mlp"))
        return make(cfg.width, ("mlp", "embed"), scale=1 / (2 * cfg.layers), name="down")(hidden)


class InjectedBlock(nn.Module):
    """One layer: add this layer's group, then the block. This is the unit that remat recomputes.

    A family whose blocks are others than LLaMA's replaces `layer`.
    """

    config: DecoderConfig
    attend: AttentionFn
    dtype: DTypeLike
    rounding: Rounding = PLAIN  # of the products with the layer's kernels

    @nn.compact
    def __call__(self, call: LayerCall) -> tuple[Array, Array, Cache | None]:
        """Hidden states after the layer, its input with the group added, and the cache."""
        x = checkpoint_name(call.x, LAYER_INPUT)
        if call.layer_inject is not None and call.visual_index is not None:
            x = inject(x, call.layer_inject, call.group, call.visual_index)
        injected = nn.with_logical_constraint(x, ACTIVATION_AXES)
        x, cache = self.layer(injected, call)
        return nn.with_logical_constraint(x, ACTIVATION_AXES), injected, cache

    def layer(self, x: Float[Array, "B T D"], call: LayerCall) -> tuple[Float[Array, "B T D"], Cache | None]:
        """LLaMA's pre-norm block; called within `__call__`, so that submodules may be made here."""
        cfg = self.config
        normed = RMSNorm(cfg.norm_eps, name="attention_norm")(x)
        attention = Attention(cfg, self.attend, self.dtype, cfg.qkv_bias, rounding=self.rounding, name="attention")
        attended, cache = attention(normed, call)
        x = nn.with_logical_constraint(x + scaled(attended, cfg.residual_multiplier), ACTIVATION_AXES)
        x = checkpoint_name(x, MIDDLE)
        added = SwiGLU(cfg, self.dtype, rounding=self.rounding, name="mlp")(RMSNorm(cfg.norm_eps, name="mlp_norm")(x))
        return x + scaled(added, cfg.residual_multiplier), cache


class ScanBody(nn.Module):
    """One step of the scan: the stack leaves as it came, outside remat, or it would be saved once per layer.

    The cache of all layers rides in the carry, where it is written in place; as an output per layer it would be copied whole
    for every token.
    """

    config: DecoderConfig
    attend: AttentionFn
    dtype: DTypeLike
    keep_inputs: bool
    block: type[InjectedBlock]
    rounding: Rounding

    @nn.compact
    def __call__(self, carry, per_layer, shared):
        x, layer_inject, cache = carry
        remat = self.config.remat
        block = self.block if remat == "none" else nn.remat(self.block, prevent_cse=False, policy=REMAT[remat])
        (group, layer), (filled, index, rotary, mask) = per_layer, shared
        call = LayerCall(x, layer_inject, group, layer, cache, filled, index, rotary, mask)
        x, injected, cache = block(self.config, self.attend, self.dtype, self.rounding, name="block")(call)
        return (x, layer_inject, cache), injected if self.keep_inputs else None


class Decoder(nn.Module):
    """Layers and final norm of a decoder with DeepStack injection (paper section 3.2, figure 2)."""

    config: DecoderConfig
    schedule: tuple[int, ...]  # group added at the input of each layer, or -1
    attend: AttentionFn
    dtype: DTypeLike
    keep_inputs: bool = False  # also return the input of every layer, for tests and inspection
    block: type[InjectedBlock] = InjectedBlock
    rounding: Rounding = PLAIN  # of the products with the layers' kernels

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
          mask: what each token attends to: as segments, of these T tokens alone; or as a mask over S keys, the cache's slots if
            there is one.
          layer_inject: the stack, or None: then nothing is injected (text only, baselines, decoding after prefill).
          index: where visual tokens are; needed with `layer_inject`.
          cache: keys and values so far; this call's T tokens are written at slots `filled`..`filled` + T.
        """
        cfg = self.config
        x = scaled(x, cfg.embedding_multiplier)
        scanned = nn.scan(
            ScanBody,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=cfg.layers,
            unroll=1 if cfg.scan else cfg.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=False,  # or the block is traced twice
        )
        kv, filled = (None, None) if cache is None else ((cache.keys, cache.values), cache.filled)
        per_layer = (jnp.asarray(self.schedule, jnp.int32), jnp.arange(cfg.layers, dtype=jnp.int32))
        body = scanned(cfg, self.attend, self.dtype, self.keep_inputs, self.block, self.rounding, name="layers")
        (x, _, kv), inputs = body((x, layer_inject, kv), per_layer, (filled, index, rotary, mask))
        if cache is not None:
            cache = cache._replace(keys=kv[0], values=kv[1], filled=cache.filled + x.shape[1])
        return DecoderOutput(RMSNorm(cfg.norm_eps, name="norm")(x), cache, inputs)

    def rotary(self, positions: Int[HostOrDevice, "B T"], segment_ids: Int[HostOrDevice, "B T"]) -> Rotary:
        """Rotary angles of these tokens."""
        cfg = self.config
        table = rotary_table(cfg.rope, cfg.head_dim, cfg.max_positions)
        return rotary_angles(table, positions, last_positions(positions, segment_ids))
