"""The paper's figure 2 as code: encode, gather, project, merge, decode with injection."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from deepstack_jax.batch import NEWLINE, ZERO, Batch
from deepstack_jax.config import DecoderConfig, ImageConfig, ProjectorConfig, VisionConfig
from deepstack_jax.model.attention import Segments, within_window
from deepstack_jax.model.decoder import ACTIVATION_AXES, Decoder
from deepstack_jax.model.layers import Linear, by_rows, scaled, take_rows
from deepstack_jax.model.merge import STACK_AXES, VisualIndex, invert_visual_index, merge
from deepstack_jax.model.projector import Merger, Projector
from deepstack_jax.model.vision import VisionTower, return_crops, spread_crops
from deepstack_jax.types import DecoderOutput, HostOrDevice, KVCache

# Visual tokens on their way through the projector: cut over the batch and, along the tensor axis, over the tokens of a row.
TOKEN_AXES = ("batch", "visual_tokens", None)


class DeepStack(nn.Module):
    """DeepStack-L, and by other index arrays DeepStack-HD, LLaVA-1.5, LLaVA-NeXT and most ablations; see `variants.py`.

    Tower and decoder are modules that their families build; embeddings, head and projectors are here.
    """

    vision_tower: VisionTower  # or a module of the same interface, and so the decoder
    layers: Decoder
    image: ImageConfig
    vision: VisionConfig
    project: ProjectorConfig
    decoder: DecoderConfig
    dtype: DTypeLike = jnp.float32  # of activations; parameters are float32
    newline: bool = False  # whether there is an `image_newline`
    crop_shards: tuple[int, int] = (1, 1)  # shards of the batch, and devices that each of them spreads its crops over
    taps: int = 0  # last groups of the stack, made of a further feature of the tower each, by a merger of its own

    def setup(self) -> None:
        cfg = self.decoder
        # Run again in the backward pass: what it keeps for it would be half as much again as the stack.
        make = nn.remat(Projector) if cfg.remat != "none" else Projector
        self.projector = make(self.project, cfg.width, self.dtype)
        make_merger = nn.remat(Merger) if cfg.remat != "none" else Merger
        self.deepstack_mergers = [make_merger(cfg.width, self.dtype) for _ in range(self.taps)]
        embed_init = nn.with_logical_partitioning(nn.initializers.normal(cfg.embed_std), ("vocab", "embed"))
        self.embed = nn.Embed(cfg.vocab_size, cfg.width, dtype=self.dtype, embedding_init=embed_init)
        if not cfg.tied_head:
            axes = ("embed", "vocab")
            self.head = Linear((cfg.vocab_size,), axes, self.dtype, std=cfg.head_std, out=jnp.float32)
        if self.newline:
            newline_init = nn.with_logical_partitioning(nn.initializers.normal(cfg.width**-0.5), ("embed",))
            self.image_newline = self.param("image_newline", newline_init, (cfg.width,))

    def encode(self, pixels: Num[HostOrDevice, "B C y x 3"]) -> tuple[Float[Array, "B CP E"], ...]:
        """Features of every crop, of one layer of the tower or of several.

        Pixels are u8, or floats in 0..255 where a gradient with respect to them is wanted. All crops of the batch run as one
        flat list, spread over all devices.
        """
        rows, slots = pixels.shape[:2]
        features = self.vision_tower(self.normalise(spread_crops(jnp.asarray(pixels), self.crop_shards)))
        return tuple(return_crops(one, rows, slots, self.crop_shards).reshape(rows, -1, one.shape[-1]) for one in features)

    def normalise(self, pixels: Num[HostOrDevice, "*Z y x 3"]) -> Float[Array, "*Z y x 3"]:
        """Pixels as the tower was trained on them."""
        scaled = jnp.asarray(pixels).astype(jnp.float32) * (1 / 255)
        return ((scaled - jnp.asarray(self.image.mean)) / jnp.asarray(self.image.std)).astype(self.dtype)

    def gather_project(
        self, features: Float[HostOrDevice, "B CP E"], source: Int[HostOrDevice, "B Q"], merger: int | None = None
    ) -> Float[Array, "B Q D"]:
        """Visual tokens by index, gathered in the narrow vision width; sentinels become exact zero and the newline.

        Args:
          merger: which of the mergers brings them to the decoder's width; None = the projector.
        """
        count = source.shape[1]
        source = jnp.pad(jnp.asarray(source), ((0, 0), (0, -count % self.crop_shards[1])), constant_values=ZERO)
        chosen = nn.with_logical_constraint(take_rows(features, source), TOKEN_AXES)
        tokens = jnp.where((source >= 0)[..., None], self.project_by(merger)(chosen), 0)
        if self.newline:
            # Chosen in float32, so that the newline's gradient is added up in it.
            newline = jnp.where((source == NEWLINE)[..., None], self.image_newline, tokens.astype(jnp.float32))
            tokens = newline.astype(tokens.dtype)
        tokens = nn.with_logical_constraint(tokens, TOKEN_AXES)
        # From tokens to width while all of them are one axis: each device then sends and keeps its part of the stack only.
        return nn.with_logical_constraint(tokens, STACK_AXES[1:])[:, :count]

    def project_by(self, merger: int | None) -> Projector | Merger:
        """A merger by its number, or the projector."""
        return self.projector if merger is None else self.deepstack_mergers[merger]

    def embed_tokens(self, tokens: Int[HostOrDevice, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of text tokens."""
        table = self.embed.embedding[None]
        return take_rows(table, tokens.reshape(1, -1), self.dtype, (None, "vocab", "embed")).reshape(*tokens.shape, -1)

    def visual_tokens(self, batch: Batch) -> tuple[Float[Array, "B M D"], Float[Array, "J B M D"] | None]:
        """What is in the sequence, and the stack of groups that is injected (None if the batch has no group)."""
        features, *tapped = self.encode(batch.pixels)
        rows, groups, visual = batch.stack_source.shape
        source = jnp.concatenate([batch.token_source[:, None], batch.stack_source], axis=1)
        views = 1 + groups - self.taps  # what one projector makes: the sequence, and the groups of the views
        made = [self.gather_project(features, source[:, :views].reshape(rows, -1))]
        made += [self.gather_project(one, source[:, views + merger], merger) for merger, one in enumerate(tapped)]
        tokens = jnp.concatenate(made, axis=1).reshape(rows, 1 + groups, visual, -1)
        stack = jnp.moveaxis(tokens[:, 1:], 1, 0)
        stack = nn.with_logical_constraint(stack, STACK_AXES)
        return tokens[:, 0], stack if groups else None

    def inputs(self, batch: Batch) -> tuple[Float[Array, "B T D"], Float[Array, "J B M D"] | None, VisualIndex | None]:
        """Input embeddings with the visual tokens in place, the stack, and where its tokens are (None in a batch of text)."""
        text = self.embed_tokens(batch.tokens)
        if batch.token_source.shape[1] == 0:
            return text, None, None
        visual, stack = self.visual_tokens(batch)
        index = invert_visual_index(batch.visual_index, visual.shape[1])
        visual = nn.with_logical_constraint(visual, ("batch", None, "embed"))
        merged = nn.with_logical_constraint(merge(text, visual, index), ACTIVATION_AXES)
        return merged, stack, index

    def __call__(self, batch: Batch) -> DecoderOutput:
        """Hidden states of a training batch; `logits` turns them into scores, in chunks."""
        x, stack, index = self.inputs(batch)
        mask = Segments(batch.segment_ids, batch.positions, self.decoder.sliding_window)
        output = self.layers(x, self.layers.rotary(batch.positions, batch.segment_ids), mask, stack, index)
        if self.is_initializing():
            self.logits(output.hidden[:, :1])
        return output

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of the next token, float32 as the product leaves its sum: rounded to bf16, every 30th argmax is another."""
        tied = self.decoder.tied_head
        scores = by_rows(hidden.astype(self.dtype), self.embed.embedding) if tied else self.head(hidden)
        return scaled(scores, 1 / self.decoder.logits_scaling)

    def prefill(self, batch: Batch, cache: KVCache) -> DecoderOutput:
        """Fill the cache with the prompts, the stack injected. The cache is empty and has room for T slots or more.

        Nothing is in the cache but what is put there now, so attention is that of training, by its kernel.
        """
        x, stack, index = self.inputs(batch)
        length = batch.tokens.shape[1]
        mask = Segments(batch.segment_ids, batch.positions, self.decoder.sliding_window)
        cache = cache._replace(
            positions=cache.positions.at[:, :length].set(batch.positions),
            valid=cache.valid.at[:, :length].set(batch.segment_ids > 0),
        )
        return self.layers(x, self.layers.rotary(batch.positions, batch.segment_ids), mask, stack, index, cache)

    def decode(self, tokens: Int[Array, "B 1"], positions: Int[Array, "B 1"], cache: KVCache) -> DecoderOutput:
        """One more token per row. Nothing is injected: the new token is text, and what the stack added sits in the cache."""
        cache = cache._replace(
            positions=cache.positions.at[:, cache.filled].set(positions[:, 0]), valid=cache.valid.at[:, cache.filled].set(True)
        )
        mask = cache.valid[:, None] & within_window(positions, cache.positions, self.decoder.sliding_window)
        rotary = self.layers.rotary(positions, jnp.ones_like(positions))
        return self.layers(self.embed_tokens(tokens), rotary, mask[:, None], None, None, cache)
