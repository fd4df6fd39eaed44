"""The CLIP vision transformer: pixels to patch features of the chosen hidden state."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deepstack_jax.config import VisionConfig
from deepstack_jax.model.attention import AttentionFn
from deepstack_jax.model.layers import ACTIVATIONS, layer_norm, linear


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer with biases (CLIP)."""

    config: VisionConfig
    attend: AttentionFn
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "Z A E"]) -> Float[Array, "Z A E"]:
        cfg = self.config
        heads = (cfg.heads, cfg.width // cfg.heads)
        scale = 1 / (2 * cfg.layers)
        y = layer_norm(cfg.norm_eps, self.dtype, "norm1")(x)
        axes = ("vision_embed", "vision_heads", "head_dim")
        q, k, v = (linear(heads, axes, bias=True, dtype=self.dtype, name=name)(y) for name in ("q", "k", "v"))
        y = self.attend(q, k, v, None)
        out_axes = ("vision_heads", "head_dim", "vision_embed")
        x = x + linear(cfg.width, out_axes, inputs=2, bias=True, scale=scale, dtype=self.dtype, name="o")(y)
        y = layer_norm(cfg.norm_eps, self.dtype, "norm2")(x)
        y = linear(cfg.mlp, ("vision_embed", "vision_mlp"), bias=True, dtype=self.dtype, name="fc1")(y)
        y = ACTIVATIONS[cfg.activation](y)
        x = x + linear(cfg.width, ("vision_mlp", "vision_embed"), bias=True, scale=scale, dtype=self.dtype, name="fc2")(y)
        return nn.with_logical_constraint(x, ("crops", None, "vision_embed"))


class VisionTower(nn.Module):
    """CLIP ViT. Holds every layer and the post norm of the checkpoint, runs only those that the feature layer needs."""

    config: VisionConfig
    image_size: int
    attend: AttentionFn
    dtype: DTypeLike
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: Float[Array, "Z y x 3"]) -> Float[Array, "Z P E"]:
        """Patch features, CLS dropped. `pixels` are normalised; Z = crops of the whole batch, flattened."""
        cfg = self.config
        x = self._embed(pixels)
        x = layer_norm(cfg.norm_eps, self.dtype, "pre_norm")(x)
        x = self._run_layers(x, 0, self.layers_run)
        if self.is_initializing():
            layer_norm(cfg.norm_eps, self.dtype, "post_norm")(x)
        return x[:, 1:]

    @property
    def layers_run(self) -> int:
        """Layers whose output is used: hidden state -2 is the input of the last layer."""
        layer = self.config.feature_layer
        return layer if layer >= 0 else self.config.layers + 1 + layer

    def _embed(self, pixels: Float[Array, "Z y x 3"]) -> Float[Array, "Z A E"]:
        """CLS and patches with their positions; A = P + 1. The patch convolution is written as one matmul."""
        cfg = self.config
        side, patch = self.image_size // cfg.patch_size, cfg.patch_size
        z = pixels.shape[0]
        patches = pixels.reshape(z, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(z, side**2, -1)
        x = linear(cfg.width, ("patch_pixels", "vision_embed"), dtype=self.dtype, name="patch_embed")(patches)
        init = nn.initializers.normal(cfg.position_std)
        cls = self.param("cls", nn.with_logical_partitioning(init, ("vision_embed",)), (cfg.width,))
        positions = self.param(
            "positions", nn.with_logical_partitioning(init, (None, "vision_embed")), (side**2 + 1, cfg.width)
        )
        cls_token = jnp.broadcast_to(cls.astype(x.dtype), (z, 1, cfg.width))
        return jnp.concatenate([cls_token, x], axis=1) + positions.astype(x.dtype)

    def _run_layers(self, x: Float[Array, "Z A E"], first: int, last: int) -> Float[Array, "Z A E"]:
        """Layers first..last-1 of the one stacked tree, scanned; so the checkpoint does not depend on where we cut."""
        layer = EncoderLayer(self.config, self.attend, self.dtype, parent=None)
        if self.is_initializing():
            stack = nn.scan(
                EncoderScanBody,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.config.layers,
                metadata_params={nn.PARTITION_NAME: "vision_layers"},
            )
            return stack(self.config, self.attend, self.dtype, name="layers")(x, None)[0]
        stacked = nn.unbox(self.variables["params"]["layers"]["block"])

        def body(x: Array, params: dict) -> tuple[Array, None]:
            return layer.apply({"params": params}, x), None

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        return jax.lax.scan(body, x, jax.tree.map(lambda leaf: leaf[first:last], stacked))[0]


class EncoderScanBody(nn.Module):
    """Declares the stacked parameters of all layers; runs at initialisation only."""

    config: VisionConfig
    attend: AttentionFn
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        return EncoderLayer(self.config, self.attend, self.dtype, name="block")(x), None
