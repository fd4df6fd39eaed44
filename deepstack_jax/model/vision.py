"""The CLIP vision transformer: pixels to patch features of the chosen hidden state."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from deepstack_jax.config import VisionConfig
from deepstack_jax.model.attention import AttentionFn
from deepstack_jax.model.layers import ACTIVATIONS, layer_norm, linear, take_rows
from deepstack_jax.model.merge import STACK_AXES, VisualIndex, inject
from deepstack_jax.types import HostOrDevice

# Crops lie over all devices, each computed whole on one of them; pictures that stay with the rows of the batch are cut along
# the tensor axis over heads and mlp, as the decoder is.
CROP_AXES = ("crops", "vision_heads", "vision_mlp")
ROW_AXES = ("batch", "heads", "mlp")


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer with biases (CLIP)."""

    config: VisionConfig
    attend: AttentionFn
    dtype: DTypeLike
    axes: tuple[str, str, str] = CROP_AXES  # logical axes of pictures, heads and mlp

    @nn.compact
    def __call__(self, x: Float[Array, "Z A E"]) -> Float[Array, "Z A E"]:
        cfg = self.config
        heads = (cfg.heads, cfg.width // cfg.heads)
        scale = 1 / (2 * cfg.layers)
        y = layer_norm(cfg.norm_eps, self.dtype, "norm1")(x)
        axes = ("vision_embed", "vision_heads", "head_dim")
        pictures, head_axis, mlp_axis = self.axes
        x_axes, head_axes = (pictures, None, "vision_embed"), (pictures, None, head_axis, "head_dim")
        q, k, v = (
            nn.with_logical_constraint(linear(heads, axes, bias=True, dtype=self.dtype, name=name)(y), head_axes)
            for name in ("q", "k", "v")
        )
        y = self.attend(q, k, v, None)
        out_axes = ("vision_heads", "head_dim", "vision_embed")
        x = x + linear(cfg.width, out_axes, inputs=2, bias=True, scale=scale, dtype=self.dtype, name="o")(y)
        y = layer_norm(cfg.norm_eps, self.dtype, "norm2")(x)
        y = linear(cfg.mlp, ("vision_embed", "vision_mlp"), bias=True, dtype=self.dtype, name="fc1")(y)
        y = ACTIVATIONS[cfg.activation](nn.with_logical_constraint(y, (pictures, None, mlp_axis)))
        x = x + linear(cfg.width, ("vision_mlp", "vision_embed"), bias=True, scale=scale, dtype=self.dtype, name="fc2")(y)
        return nn.with_logical_constraint(x, x_axes)


class VisionTower(nn.Module):
    """CLIP ViT. Holds every layer and the post norm of the checkpoint, runs only those that the feature layer needs."""

    config: VisionConfig
    image_size: int
    attend: AttentionFn
    dtype: DTypeLike
    remat: bool = False
    crop_shards: tuple[int, int] = (1, 1)  # see `spread_crops`

    def setup(self) -> None:
        cfg = self.config
        self.patch_embed = linear(cfg.width, ("patch_pixels", "vision_embed"), dtype=self.dtype, name="patch_embed")
        init = nn.initializers.normal(cfg.position_std)
        self.cls = self.param("cls", nn.with_logical_partitioning(init, ("vision_embed",)), (cfg.width,))
        tokens = (self.image_size // cfg.patch_size) ** 2 + 1
        axes = (None, "vision_embed")
        self.positions = self.param("positions", nn.with_logical_partitioning(init, axes), (tokens, cfg.width))
        self.pre_norm = layer_norm(cfg.norm_eps, self.dtype, "pre_norm")
        self.post_norm = layer_norm(cfg.norm_eps, self.dtype, "post_norm")
        scanned = nn.scan(
            EncoderScanBody,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.layers + cfg.post_layers,
            metadata_params={nn.PARTITION_NAME: "vision_layers"},
        )
        self.layers = scanned(cfg, self.attend, self.dtype, name="layers")

    def __call__(self, pixels: Float[Array, "Z y x 3"]) -> Float[Array, "Z P E"]:
        """Patch features, CLS dropped. `pixels` are normalised; Z = crops of the whole batch, flattened.

        Pictures larger than the tower was trained on get interpolated positions.
        """
        x = self._embed(pixels)
        if self.is_initializing():
            self.post_norm(self.layers(x, None)[0])
        return self._run_layers(x, 0, self.config.layers_run)[:, 1:]

    def inject(
        self, crops: Float[Array, "B C y x 3"], source: Int[HostOrDevice, "B J M"], schedule: tuple[int, ...], views: int
    ) -> Float[Array, "B M E"]:
        """DeepStack-V (paper section 3.3): features of the global views, the crops' tokens added inside the tower.

        All views run through the first layers as separate pictures; then the crops' tokens are dealt into groups, and each
        group is added to the global views' tokens at the input of its layer, as the decoder does it.

        Args:
          crops: normalised, `views` slots per image, its global view first; M = images * P.
          source: the patch token (crop * P + patch) of every token of every group, or ZERO.
          schedule: the group added at the input of each layer, or -1.
          views: slots per image.
        """
        rows, slots = crops.shape[:2]
        x = self._embed(spread_crops(crops, self.crop_shards))
        if self.is_initializing():
            self.post_norm(self.layers(x, None)[0])
        first = schedule.index(0) if 0 in schedule else self.config.layers_run
        x = return_crops(self._run_layers(x, 0, first), rows, slots, self.crop_shards)
        patches = x[:, :, 1:].reshape(rows, -1, x.shape[-1])
        source = jnp.asarray(source)
        dealt = take_rows(patches, source.reshape(rows, -1)).reshape(*source.shape, -1)
        stack = jnp.moveaxis(jnp.where((source >= 0)[..., None], dealt, 0), 1, 0)
        stack = nn.with_logical_constraint(stack, STACK_AXES)
        whole = nn.with_logical_constraint(x[:, ::views], ("batch", None, None, "vision_embed"))
        index = _behind_cls(rows, whole.shape[1], whole.shape[2])

        def add(x: Float[Array, "B I A E"], group: Int[Array, ""]) -> Float[Array, "B I A E"]:
            return inject(x.reshape(rows, -1, x.shape[-1]), stack, group, index).reshape(x.shape)

        layer = EncoderLayer(self.config, self.attend, self.dtype, ROW_AXES, parent=None)

        def body(x: Array, step: tuple[dict, Array]) -> tuple[Array, None]:
            params, group = step
            x = add(x, group).reshape(-1, *x.shape[2:])
            return layer.apply({"params": params}, x).reshape(whole.shape), None

        groups = jnp.asarray((*schedule, -1), jnp.int32)  # behind the last layer nothing is added
        whole = self._scan(body, whole, first, self.config.layers_run, groups[first : self.config.layers_run])
        whole = add(whole, groups[self.config.layers_run])
        return whole[:, :, 1:].reshape(rows, -1, whole.shape[-1])

    def _embed(self, pixels: Float[Array, "Z y x 3"]) -> Float[Array, "Z A E"]:
        """CLS and patches with their positions, normed; A = P + 1. The patch convolution is written as one matmul."""
        patch = self.config.patch_size
        z, side = pixels.shape[0], pixels.shape[1] // patch
        patches = pixels.reshape(z, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(z, side**2, -1)
        x = self.patch_embed(patches).astype(jnp.float32)  # added in float32, and so are the gradients of CLS and positions
        cls_token = jnp.broadcast_to(self.cls, (z, 1, x.shape[-1]))
        x = jnp.concatenate([cls_token, x], axis=1) + interpolate_positions(self.positions, side)
        return self.pre_norm(x.astype(self.dtype))

    def _run_layers(self, x: Float[Array, "Z A E"], first: int, last: int) -> Float[Array, "Z A E"]:
        """Layers first..last-1 of the one stacked tree, scanned; so the checkpoint does not depend on where we cut."""
        layer = EncoderLayer(self.config, self.attend, self.dtype, parent=None)

        def body(x: Array, params: dict) -> tuple[Array, None]:
            return layer.apply({"params": params}, x), None

        return self._scan(body, x, first, last)

    def _scan(self, body: Callable, x: Array, first: int, last: int, *per_layer: Array) -> Array:
        stacked = nn.unbox(self.variables["params"]["layers"]["block"])
        steps = jax.tree.map(lambda leaf: leaf[first:last], stacked)
        body = jax.checkpoint(body, prevent_cse=False) if self.remat else body
        return jax.lax.scan(body, x, (steps, *per_layer) if per_layer else steps)[0]


def spread_crops(crops: Num[Array, "B C y x 3"], shards: tuple[int, int]) -> Num[Array, "Z y x 3"]:
    """All crops of a batch as one list, cut over all devices.

    Args:
      crops: whose rows lie over `shards[0]` shards of the batch.
      shards: numbers of shards of the batch, and of devices that each of them spreads its crops over. Crops of a shard are
        padded to a multiple of its devices, so that none has to leave the shard.
    """
    rows, slots = crops.shape[:2]
    parts, pad = _padding(rows, slots, shards)
    crops = crops.reshape(parts, rows // parts * slots, *crops.shape[2:])
    crops = jnp.pad(crops, [(0, 0), (0, pad)] + [(0, 0)] * (crops.ndim - 2))
    return nn.with_logical_constraint(crops.reshape(-1, *crops.shape[2:]), ("crops", *[None] * (crops.ndim - 2)))


def return_crops(features: Float[Array, "Z A E"], rows: int, slots: int, shards: tuple[int, int]) -> Float[Array, "B C A E"]:
    """What was computed from `spread_crops` back with the rows that the crops belong to, along tensor cut over its width.

    C is `slots`.
    """
    parts, pad = _padding(rows, slots, shards)
    features = features.reshape(parts, -1, *features.shape[1:])
    # From crops to width in one exchange: no device ever holds the features of all crops of its rows.
    features = nn.with_logical_constraint(features, ("batch", "crop_slots", None, None))
    features = nn.with_logical_constraint(features, ("batch", None, None, "stack_embed"))
    return features[:, : features.shape[1] - pad].reshape(rows, slots, *features.shape[2:])


def _padding(rows: int, slots: int, shards: tuple[int, int]) -> tuple[int, int]:
    """Parts that the rows fall into, and blank crops behind those of each part."""
    parts = math.gcd(rows, shards[0])
    return parts, -(rows // parts * slots) % (shards[0] * shards[1] // parts)


def _behind_cls(rows: int, images: int, tokens: int) -> VisualIndex:
    """Where the patch tokens of each global view stand when the views, CLS first, are joined to one sequence."""
    patches = tokens - 1
    visual = np.full((images, tokens), -1, np.int32)
    visual[:, 1:] = np.arange(images * patches).reshape(images, patches)
    position = np.arange(images * tokens, dtype=np.int32).reshape(images, tokens)[:, 1:]
    both = (np.broadcast_to(index.reshape(1, -1), (rows, index.size)) for index in (visual, position))
    return VisualIndex(*map(jnp.asarray, both))


def interpolate_positions(positions: Num[HostOrDevice, "A E"], side: int) -> Num[Array, "Q E"]:
    """Position embeddings for side x side patches and CLS; Q = side**2 + 1.

    Bicubic between the trained ones, corners not aligned, no antialiasing, as upstream's `custom_embedding` asks of PyTorch.
    """
    positions = jnp.asarray(positions)
    trained = math.isqrt(positions.shape[0] - 1)
    if side == trained:
        return positions
    weights = jnp.asarray(_bicubic(trained, side))
    grid = positions[1:].reshape(trained, trained, -1)
    grid = jnp.einsum("yi,xj,ije->yxe", weights, weights, grid, precision="highest")
    return jnp.concatenate([positions[:1], grid.reshape(side**2, -1)])


def _bicubic(old: int, new: int) -> np.ndarray:
    """f32[new, old] weights of PyTorch's bicubic resizing along one axis: Keys' kernel with a = -0.75, edges repeated."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    base = np.floor(centre).astype(int)
    weights = np.zeros((new, old), np.float32)
    for tap in range(-1, 3):
        distance = np.abs(centre - (base + tap))
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        np.add.at(weights, (np.arange(new), np.clip(base + tap, 0, old - 1)), np.where(distance <= 1, near, far))
    return weights


class EncoderScanBody(nn.Module):
    """Declares the stacked parameters of all layers; runs at initialisation only."""

    config: VisionConfig
    attend: AttentionFn
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        return EncoderLayer(self.config, self.attend, self.dtype, name="block")(x), None
