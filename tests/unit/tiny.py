"""The smallest model that still has every part, batches for it, and a walk over all shapes of a traced program.

Crops are 8x8 pixels with patches of 4, so P = 4; up to 4 crops per image; J = 4 groups enter layers 1..4 of 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from deepstack_jax.batch import Batch, BatchShape, empty_batch
from deepstack_jax.config import Config, build_config, default_config
from deepstack_jax.data.encode.batch_rows import Cursor, EncodedExample, place_example
from deepstack_jax.data.encode.labels import IMAGE_TOKEN
from deepstack_jax.model.deepstack import DeepStack

TINY = {
    "image.size": 8,
    "image.num_crops": 4,
    "vision.patch_size": 4,
    "vision.width": 16,
    "vision.layers": 3,
    "vision.heads": 2,
    "vision.mlp": 24,
    "vision.position_std": 0.5,
    "decoder.vocab_size": 61,
    "decoder.width": 32,
    "decoder.layers": 5,
    "decoder.heads": 4,
    "decoder.kv_heads": 2,
    "decoder.head_dim": 8,
    "decoder.mlp": 40,
    "decoder.embed_std": 0.5,
    "decoder.head_std": 0.5,
    "data.max_images": 3,
    "data.max_length": 32,
    "train.compute_dtype": "float32",
    "train.batch_size": 8,
    "train.loss_chunk": 8,
}
# Other families than those of the defaults; pictures of 9 pixels have an edge that fills no patch of 4.
_SIGLIP = {"vision.architecture": "siglip", "image.size": 9}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3, tied, over SigLIP": _SIGLIP | {"decoder.architecture": "qwen3", "decoder.tied_head": True},
    "SmolLM2 (LLaMA, tied) over SigLIP": _SIGLIP | {"decoder.tied_head": True},
    "Granite, tied": {"decoder.architecture": "granite", "decoder.tied_head": True, "decoder.embedding_multiplier": 2.0},
    "V, Qwen2 over SigLIP": _SIGLIP
    | {
        "decoder.architecture": "qwen2",
        "vision.feature_norm": True,
        "image.grid": "square",
        "deepstack.into": "vision",
        "deepstack.vision_start": 1,
    },
}
BOS, FIRST_WORD = 1, 3


def decoder_schedule(config: Config) -> tuple[int, ...]:
    """The group that enters each layer of the decoder, or -1."""
    return config.deepstack.decoder_schedule(config.decoder.layers, config.layout.groups)


def tower_schedule(config: Config) -> tuple[int, ...]:
    """The same of the vision tower; empty where nothing enters it."""
    return config.deepstack.tower_schedule(config.vision, config.layout.groups)


def tiny_config(overrides: dict[str, Any] | None = None) -> Config:
    """The tiny model, with dotted keys changed."""
    overrides = overrides or {}
    families = {key.partition(".")[0]: name for key, name in overrides.items() if key.endswith(".architecture")}
    config = default_config(**families)
    config.update_from_flattened_dict(TINY | overrides)
    return build_config(config)


def example(
    config: Config, seed: int, grids: Sequence[tuple[int, int] | None] = (), words: int = 3, answer: int = 3
) -> EncodedExample:
    """BOS, a word before each image, `words` of question, `answer` supervised words; noise for pixels."""
    rng = np.random.default_rng(seed)

    def draw(count: int) -> list[int]:
        return rng.integers(FIRST_WORD, config.decoder.vocab_size, count).tolist()

    ids = [BOS]
    for _ in grids:
        ids += [*draw(1), IMAGE_TOKEN]
    ids += draw(words + answer)
    supervised = np.arange(len(ids)) >= len(ids) - answer
    layouts = tuple(config.layout.layout(grid, (64, 48)) for grid in grids)
    size = config.image.size
    pixels = tuple(rng.integers(0, 256, (layout.views, size, size, 3), dtype=np.uint8) for layout in layouts)
    return EncodedExample(100 + seed, np.array(ids, np.int32), supervised, pixels, layouts)


def make_batch(config: Config, rows: Sequence[Sequence[EncodedExample]], length: int = 32, pad_left: int = 0) -> Batch:
    """Every row's examples as segments of that row, with `pad_left` positions of padding before the first."""
    shape: BatchShape = config.data_spec.batch_shape(len(rows), length)._replace(examples=2)
    batch = empty_batch(shape)
    for row, examples in enumerate(rows):
        cursor = Cursor(token=pad_left)
        for one in examples:
            cursor = place_example(batch, row, one, cursor, config.layout.patches)
    return batch


def only_rows(batch: Batch, *keep: int) -> Batch:
    """The same shapes with every row blank but those named."""
    rows, length = batch.tokens.shape
    crops, size = batch.pixels.shape[1:3]
    groups, visual = batch.stack_source.shape[1:]
    blank = empty_batch(BatchShape(rows, length, crops, size, visual, groups, batch.example_id.shape[1]))
    for ours, theirs in zip(blank, batch, strict=True):
        ours[list(keep)] = theirs[list(keep)]
    return blank


def draw_params(shapes: Any, seed: int = 0) -> Any:
    """Noise for every leaf of an abstract tree, drawn in numpy: compiling `init` would take longer than most tests.

    Biases and norms lie off 0 and 1, where a mistake would not show; kernels keep activations near 1 at widths near 30.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: Any) -> jax.Array:
        name = path[-1].key
        spread = 0.5 if name in ("embedding", "cls", "positions") else 0.2
        return jnp.asarray((name == "scale") + rng.normal(0, spread, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))


def model_params(model: DeepStack, batch: Batch, seed: int = 0) -> Any:
    """`draw_params` for a whole model."""
    return draw_params(jax.eval_shape(model.init, jax.random.key(0), batch)["params"], seed)


def shapes_in(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shape of everything that an equation of a closed or open jaxpr puts out, at any depth."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield from (tuple(var.aval.shape) for var in equation.outvars if hasattr(var.aval, "shape"))
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from shapes_in(inner)
