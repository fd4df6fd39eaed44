"""The vision transformer: pixels to patch features of the chosen hidden states."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from deepstack_jax.config import VisionConfig
from deepstack_jax.model.attention import AttentionFn, AttentionMask, Everything
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

    @nn.compact
    def __call__(
        self, x: Float[Array, "Z A E"], axes: tuple[str, str, str] = CROP_AXES, mask: AttentionMask = None
    ) -> Float[Array, "Z A E"]:
        """`axes` are the logical axes of pictures, heads and mlp; `mask` is what tokens see, None = all of their picture."""
        cfg = self.config
        pictures, head_axis, mlp_axis = axes
        heads, scale = (cfg.heads, cfg.width // cfg.heads), 1 / (2 * cfg.layers)
        y = layer_norm(cfg.norm_eps, self.dtype, "norm1")(x)
        in_axes, head_axes = ("vision_embed", "vision_heads", "head_dim"), (pictures, None, head_axis, "head_dim")
        q, k, v = (
            nn.with_logical_constraint(linear(heads, in_axes, bias=True, dtype=self.dtype, name=name)(y), head_axes)
            for name in ("q", "k", "v")
        )
        y = self.attend(q, k, v, Everything((pictures, head_axis)) if mask is None else mask)
        out_axes = ("vision_heads", "head_dim", "vision_embed")
        x = x + linear(cfg.width, out_axes, inputs=2, bias=True, scale=scale, dtype=self.dtype, name="o")(y)
        y = layer_norm(cfg.norm_eps, self.dtype, "norm2")(x)
        y = linear(cfg.mlp, ("vision_embed", "vision_mlp"), bias=True, dtype=self.dtype, name="fc1")(y)
        y = ACTIVATIONS[cfg.activation](nn.with_logical_constraint(y, (pictures, None, mlp_axis)))
        x = x + linear(cfg.width, ("vision_mlp", "vision_embed"), bias=True, scale=scale, dtype=self.dtype, name="fc2")(y)
        return nn.with_logical_constraint(x, (pictures, None, "vision_embed"))


class LayerStack(nn.Module):
    """All layers of a tower as one stack of parameters, of which any part can run: a checkpoint then depends on no cut."""

    config: VisionConfig
    attend: AttentionFn
    dtype: DTypeLike
    remat: bool
    layer: type[EncoderLayer]

    def setup(self) -> None:
        self.block = self.layer(self.config, self.attend, self.dtype)

    def __call__(
        self,
        x: Float[Array, "Z A E"],
        first: int,
        last: int,
        axes: tuple[str, str, str] = CROP_AXES,
        add: Callable[[Array, Array], Array] | None = None,
        groups: Int[Array, " L"] | None = None,
    ) -> Float[Array, "Z A E"]:
        """Layers first..last-1.

        Args:
          axes: as of the layer.
          add: `add(x, group)` runs before each layer, with that layer's entry of `groups`.
        """

        def body(stack: LayerStack, x: Array, group: Array | None) -> tuple[Array, None]:
            return stack.block(x if add is None or group is None else add(x, group), axes), None

        def scan(body: Callable, length: int) -> Callable:
            names = {nn.PARTITION_NAME: "vision_layers"}
            return nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=length, metadata_params=names)

        if not self.has_variable("params", "block"):  # a first call to draw them, of all
            return scan(body, self.config.layers + self.config.post_layers)(self, x, None)[0]
        body = nn.remat(body, prevent_cse=False) if self.remat else body
        part = nn.map_variables(
            scan(body, last - first), "params", lambda params: jax.tree.map(lambda leaf: leaf[first:last], params)
        )
        return part(self, x, groups)[0]


class VisionTower(nn.Module):
    """A ViT. Holds every layer and the post norm of the checkpoint, runs only those that the feature layer needs."""

    config: VisionConfig
    image_size: int
    attend: AttentionFn
    dtype: DTypeLike
    remat: bool = False
    crop_shards: tuple[int, int] = (1, 1)  # see `spread_crops`
    class_token: bool = True  # CLS, before the patches
    patch_bias: bool = False
    norm_first: bool = True  # a norm before the first layer
    layer: type[EncoderLayer] = EncoderLayer
    # Layers whose input is a feature of its own, beside that of the feature layer
    tapped: tuple[int, ...] = ()

    def setup(self) -> None:
        cfg = self.config
        axes = ("patch_pixels", "vision_embed")
        self.patch_embed = linear(cfg.width, axes, bias=self.patch_bias, dtype=self.dtype, name="patch_embed")
        init = nn.initializers.normal(cfg.position_std)
        if self.class_token:
            self.cls = self.param("cls", nn.with_logical_partitioning(init, ("vision_embed",)), (cfg.width,))
        tokens = (self.image_size // cfg.patch_size) ** 2 + self.class_token
        axes = (None, "vision_embed")
        self.positions = self.param("positions", nn.with_logical_partitioning(init, axes), (tokens, cfg.width))
        if self.norm_first:
            self.pre_norm = layer_norm(cfg.norm_eps, self.dtype, "pre_norm")
        self.post_norm = layer_norm(cfg.norm_eps, self.dtype, "post_norm")
        self.layers = LayerStack(cfg, self.attend, self.dtype, self.remat, self.layer)

    def __call__(self, pixels: Float[Array, "Z y x 3"]) -> tuple[Float[Array, "Z P E"], ...]:
        """Patch features, CLS dropped: of the feature layer, then of every tapped one. `pixels` are normalised; Z = crops of
        the whole batch, flattened. Pictures larger than the tower was trained on get interpolated positions.
        """
        x, at, features = self._embed(pixels), 0, {}
        for layer in sorted({*self.tapped, self.config.layers_run}):
            x = self.layers(x, at, layer) if layer > at or self.is_initializing() else x
            features[layer], at = x[:, self.class_token :], layer
        if self.is_initializing():
            self.post_norm(x)
        return (self._normed(features[self.config.layers_run]), *(features[layer] for layer in self.tapped))

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
        first, last = schedule.index(0) if 0 in schedule else self.config.layers_run, self.config.layers_run
        if self.is_initializing():
            self.post_norm(self.layers(x, 0, last))
        x = return_crops(self.layers(x, 0, first), rows, slots, self.crop_shards)
        patches = x[:, :, self.class_token :].reshape(rows, -1, x.shape[-1])
        source = jnp.asarray(source)
        dealt = take_rows(patches, source.reshape(rows, -1)).reshape(*source.shape, -1)
        stack = jnp.moveaxis(jnp.where((source >= 0)[..., None], dealt, 0), 1, 0)
        stack = nn.with_logical_constraint(stack, STACK_AXES)
        whole = nn.with_logical_constraint(x[:, ::views], ("batch", None, None, "vision_embed"))
        images, tokens, width = whole.shape[1:]
        index = _after_class_token(rows, images, tokens, self.class_token)

        def add(x: Float[Array, "BI A E"], group: Int[Array, ""]) -> Float[Array, "BI A E"]:
            return inject(x.reshape(rows, -1, width), stack, group, index).reshape(x.shape)

        groups = jnp.asarray((*schedule, -1), jnp.int32)  # after the last layer nothing is added
        whole = self.layers(whole.reshape(-1, tokens, width), first, last, ROW_AXES, add, groups[first:last])
        whole = add(whole, groups[last]).reshape(rows, images, tokens, width)
        return self._normed(whole[:, :, self.class_token :].reshape(rows, -1, width))

    def _normed(self, features: Float[Array, "Z P E"]) -> Float[Array, "Z P E"]:
        """The features as they leave the tower."""
        return self.post_norm(features) if self.config.feature_norm else features

    def _embed(self, pixels: Float[Array, "Z y x 3"]) -> Float[Array, "Z A E"]:
        """CLS and patches with their positions, normed; A = P + 1, or P. The patch convolution is written as one matmul."""
        patch = self.config.patch_size
        z, side = pixels.shape[0], pixels.shape[1] // patch
        pixels = pixels[:, : side * patch, : side * patch]
        patches = pixels.reshape(z, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(z, side**2, -1)
        x = self.patch_embed(patches).astype(jnp.float32)  # added in float32, and so are the gradients of CLS and positions
        if self.class_token:
            x = jnp.concatenate([jnp.broadcast_to(self.cls, (z, 1, x.shape[-1])), x], axis=1)
        x = x + interpolate_positions(self.positions, side, self.class_token)
        x = x.astype(self.dtype)
        return self.pre_norm(x) if self.norm_first else x


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
    """Parts that the rows fall into, and blank crops after those of each part."""
    parts = math.gcd(rows, shards[0])
    return parts, -(rows // parts * slots) % (shards[0] * shards[1] // parts)


def _after_class_token(rows: int, images: int, tokens: int, prefix: int) -> VisualIndex:
    """Where the patch tokens of each global view are when the views, CLS first, are joined to one sequence."""
    visual = np.full((images, tokens), -1, np.int32)
    visual[:, prefix:] = np.arange(images * (tokens - prefix)).reshape(images, -1)
    position = np.arange(images * tokens, dtype=np.int32).reshape(images, tokens)[:, prefix:]
    both = (np.broadcast_to(index.reshape(1, -1), (rows, index.size)) for index in (visual, position))
    return VisualIndex(*map(jnp.asarray, both))


def interpolate_positions(positions: Num[HostOrDevice, "A E"], side: int, prefix: int = 1) -> Num[Array, "Q E"]:
    """Position embeddings for `prefix` tokens (CLS), which stay, and side x side patches; Q = prefix + side**2.

    Bicubic between the trained ones, corners not aligned, no antialiasing, as upstream's `custom_embedding` asks of PyTorch.
    """
    positions = jnp.asarray(positions)
    trained = math.isqrt(positions.shape[0] - prefix)
    if side == trained:
        return positions
    weights = jnp.asarray(_bicubic(trained, side))
    grid = positions[prefix:].reshape(trained, trained, -1)
    grid = jnp.einsum("yi,xj,ije->yxe", weights, weights, grid, precision="highest")
    return jnp.concatenate([positions[:prefix], grid.reshape(side**2, -1)])


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
