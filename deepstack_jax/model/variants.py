"""The variants that index arrays alone cannot make, each one method of DeepStack replaced."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from deepstack_jax.batch import ZERO, Batch
from deepstack_jax.model.deepstack import TOKEN_AXES, DeepStack
from deepstack_jax.model.layers import take_rows
from deepstack_jax.model.merge import STACK_AXES
from deepstack_jax.types import HostOrDevice


class DeepStackV(DeepStack):
    """DeepStack-V (paper section 3.3): the groups enter the vision tower, the sequence sees the global view alone."""

    vision_schedule: tuple[int, ...] = ()  # group added at the input of each tower layer, or -1
    views: int = 1  # crop slots of an image

    def visual_tokens(self, batch: Batch) -> tuple[Float[Array, "B M D"], None]:
        """The global views' tokens; the stack is spent inside the tower."""
        crops = self.normalise(batch.pixels)
        features = self.vision_tower.inject(crops, batch.stack_source, self.vision_schedule, self.views)
        patches = features.shape[1] * self.views // crops.shape[1]
        source = jnp.asarray(batch.token_source)  # counts the tokens of all crops; here are those of the global views
        whole = source // (self.views * patches) * patches + source % patches
        return self.gather_project(features, jnp.where(source >= 0, whole, source)), None


class AddedDeepStack(DeepStack):
    """All groups at once, added to the sequence's tokens at the decoder's input."""

    def visual_tokens(self, batch: Batch) -> tuple[Float[Array, "B M D"], None]:
        """What is in the sequence, the groups in it; nothing is left to inject."""
        tokens, stack = super().visual_tokens(batch)
        return tokens if stack is None else tokens + stack.sum(0), None


class JoinedDeepStack(DeepStack):
    """All groups at once, joined with the sequence's tokens along channels (the paper's "channel concat") before the projector,
    whose first map is then as many times as wide.
    """

    def visual_tokens(self, batch: Batch) -> tuple[Float[Array, "B M D"], None]:
        """What is in the sequence, the groups in it; nothing is left to inject."""
        (features,) = self.encode(batch.pixels)
        source = jnp.concatenate([batch.token_source[:, None], batch.stack_source], axis=1)
        rows, _, visual = source.shape
        source = jnp.pad(source, ((0, 0), (0, 0), (0, -visual % self.crop_shards[1])), constant_values=ZERO)
        chosen = take_rows(features, source.reshape(rows, -1))
        chosen = jnp.where((source.reshape(rows, -1) >= 0)[..., None], chosen, 0).reshape(*source.shape, -1)
        chosen = jnp.moveaxis(chosen, 1, 2).reshape(rows, source.shape[2], -1)
        tokens = self.projector(nn.with_logical_constraint(chosen, TOKEN_AXES))
        tokens = nn.with_logical_constraint(tokens, TOKEN_AXES)
        return nn.with_logical_constraint(tokens, STACK_AXES[1:])[:, :visual], None


class PooledDeepStack(DeepStack):
    """Upstream's `2d_scaledown`: squares of projected tokens are averaged before they are dealt into groups."""

    pool: int = 1  # side of the squares

    def gather_project(
        self, features: Float[HostOrDevice, "B CP E"], source: Int[HostOrDevice, "B Q"], merger: int | None = None
    ) -> Float[Array, "B Q D"]:
        """Visual tokens by index into the averaged ones; a row or column that fills no square is dropped, as upstream."""
        rows, side = features.shape[0], self.image.size // self.vision.patch_size
        tokens = self.project_by(merger)(features).reshape(-1, side, side, self.decoder.width).astype(jnp.float32)
        tokens = nn.avg_pool(tokens, (self.pool, self.pool), (self.pool, self.pool)).astype(self.dtype)
        tokens = tokens.reshape(rows, -1, self.decoder.width)
        return jnp.where((source >= 0)[..., None], take_rows(tokens, source), 0)


class HighResDeepStack(DeepStack):
    """Upstream's `hires_local`: an image's crops are joined to one large picture that the tower sees as a whole."""

    views: int = 1  # crop slots of an image, its global view included
    cells: int = 1  # crops along a side

    def encode(self, pixels: Num[HostOrDevice, "B C y x 3"]) -> tuple[Float[Array, "B CP E"], ...]:
        """Features in the order of the crops, as if each had been encoded alone."""
        rows, cells, size = pixels.shape[0], self.cells, pixels.shape[2]
        images = pixels.reshape(-1, self.views, *pixels.shape[2:])
        large = images[:, 1:].reshape(-1, cells, cells, size, size, 3).transpose(0, 1, 3, 2, 4, 5)
        whole = super().encode(images[:, 0].reshape(rows, -1, *pixels.shape[2:]))
        parts = super().encode(large.reshape(rows, -1, cells * size, cells * size, 3))
        side = size // self.vision.patch_size

        def joined(whole: Array, parts: Array) -> Array:
            width = whole.shape[-1]
            parts = parts.reshape(-1, cells, side, cells, side, width).transpose(0, 1, 3, 2, 4, 5)
            views = [whole.reshape(-1, 1, side**2, width), parts.reshape(-1, cells**2, side**2, width)]
            return jnp.concatenate(views, axis=1).reshape(rows, -1, width)

        return tuple(map(joined, whole, parts))
