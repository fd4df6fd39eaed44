"""The range of every number of a configuration, for `checks.py`: what lies outside is a slip, or cannot be computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from deepstack_jax.config.schema import Config
from deepstack_jax.printing import label, quote

POSITIVE = (
    "image.size",
    "image.num_crops",
    "vision.patch_size",
    "vision.width",
    "vision.layers",
    "vision.heads",
    "vision.mlp",
    "vision.norm_eps",
    "projector.layers",
    "decoder.vocab_size",
    "decoder.width",
    "decoder.layers",
    "decoder.heads",
    "decoder.kv_heads",
    "decoder.head_dim",
    "decoder.mlp",
    "decoder.norm_eps",
    "decoder.max_positions",
    "decoder.rope.theta",
    "deepstack.interval",
    "deepstack.pool",
    "data.max_length",
    "data.max_images",
    "data.prefetch",
    "data.limits.text_bytes",
    "data.limits.row_bytes",
    "data.limits.group_bytes",
    "data.packing.window",
    "data.packing.max_examples",
    "data.packing.max_images",
    "data.synthetic.length",
    "data.synthetic.questions",
    "train.batch_size",
    "train.accumulation",
    "train.loss_chunk",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.max_bad_steps",
    "evaluation.examples",
    "evaluation.batch_size",
    "evaluation.max_new_tokens",
    "optimizer.clip_norm",
)


class Range(NamedTuple):
    """From `least` to `most`, both included unless `below` says that `most` is not, or `above` that `least` is not."""

    least: float
    most: float
    expected: str
    below: bool = False
    above: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value lies inside; NaN lies nowhere."""
        least = self.least < value if self.above else self.least <= value
        return least and (value < self.most if self.below else value <= self.most)


_POSITIVE = Range(0, math.inf, "a number above 0", above=True)
_SEED = Range(0, 2**32 - 1, "a whole number from 0 to 4294967295")  # jax drops higher bits: two seeds would be one
_COUNT_OR_NONE = Range(0, math.inf, "0 (none) or more", below=True)
_SPREAD = Range(0, math.inf, "a number from 0 on", below=True)
_SHARE_OF_STEPS = Range(0, 1, "a share of the steps, 0 to 1, as 0.03")
RANGES = {
    "seed": _SEED,
    "vision.post_layers": _COUNT_OR_NONE,
    "vision.position_std": _SPREAD,
    "decoder.sliding_window": Range(0, math.inf, "0 (all tokens before) or more"),
    "decoder.embed_std": _SPREAD,
    "decoder.head_std": _SPREAD,
    "decoder.rope.original_positions": _COUNT_OR_NONE,
    "deepstack.vision_start": Range(-1, math.inf, "-1 (half of the tower's layers) or a layer from 0 on"),
    "data.seed": _SEED,
    "data.synthetic.seed": _SEED,
    "data.workers": Range(0, math.inf, "0 (a thread of this process) or a number of processes"),
    "data.max_pixels": Range(1, 178_956_970, "1 to 178956970 pixels, the most that Pillow decodes"),
    "data.max_bad_fraction": Range(0, 1, "a share of the examples, 0 to 1, as 0.01"),
    "optimizer.schedule.warmup": _SHARE_OF_STEPS,
    "optimizer.schedule.tail": _SHARE_OF_STEPS,
    "optimizer.schedule.final": Range(0, 1, "a share of the learning rate, 0 to 1"),
    "train.keep_every": _COUNT_OR_NONE,
    "train.keep_best": _COUNT_OR_NONE,
    "evaluation.every": Range(0, math.inf, "0 (at the end only) or a number of steps"),
    "evaluation.samples": _COUNT_OR_NONE,
}
_DECAY = Range(0, 1, "a number from 0 on and below 1", below=True)
GROUP_RANGES = {
    "lr": _SPREAD,
    "b1": _DECAY,
    "b2": _DECAY,
    "eps": _SPREAD,
    "weight_decay": _SPREAD,
}


_WHOLE, _REAL = 2**31 - 1, 1e30  # the most of whole numbers and of others, where nothing below says more: i32 and f32
# What is beyond any machine, though each may be a slip of a zero or two: it would take the memory, or hours, before it failed.
MOST = {
    "image.size": 16_384,
    "image.num_crops": 1_024,
    "vision.layers": 4_096,
    "vision.post_layers": 4_096,
    "projector.layers": 64,
    "decoder.layers": 4_096,
    "decoder.vocab_size": 2**24,
    "data.max_length": 2**24,
    "data.max_images": 4_096,
    "data.prefetch": 4_096,
    "data.workers": 4_096,
    "data.packing.window": 2**24,
    "data.packing.max_examples": 2**16,
    "data.packing.max_images": 4_096,
    "data.synthetic.questions": 16,
    "train.batch_size": 2**24,
    "optimizer.clip_norm": math.inf,
}
_WIDTHS = ("vision.width", "vision.heads", "vision.mlp", "decoder.width", "decoder.heads", "decoder.kv_heads", "decoder.mlp")
MOST |= dict.fromkeys((*_WIDTHS, "vision.patch_size", "decoder.head_dim"), 2**20)
PARAMETERS, TOKENS, BYTES = 10**13, 2**24, 2**40  # of a model, of the visual tokens of a row, of the pixels of a batch


def out_of_range(config: Config) -> Iterator[str]:
    """A message for every number outside of its range, and for every NaN."""
    valid = dict.fromkeys((*POSITIVE, "data.buckets.*", "image.std.*", "image.pinpoints.*.*"), _POSITIVE) | RANGES
    valid |= {f"optimizer.groups.*.{key}": bounds for key, bounds in GROUP_RANGES.items()}
    for key, rule, value in _numbers(config):
        any_number = _WHOLE if isinstance(value, int) else _REAL
        bounds = valid.get(rule, Range(-any_number, any_number, "a number"))
        most = bounds.most if bounds.most < math.inf else MOST.get(rule, any_number)
        if not (bounds.holds(value) and value <= most):
            at_most = f", at most {most:,}" if value > most else ""
            yield f"config.{key} got {quote(value)}, expected {bounds.expected}{at_most}"


def _numbers(value: Any, key: str = "", rule: str = "") -> Iterator[tuple[str, str, float]]:
    """Every number as (dotted key, the same with a star for each name or index that the configuration gives, value)."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            dot = "." if key else ""
            yield from _numbers(getattr(value, field.name), f"{key}{dot}{field.name}", f"{rule}{dot}{field.name}")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{label(name)}", f"{rule}.*")
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _numbers(item, f"{key}[{number}]", f"{rule}.*")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, rule, value


def too_large(config: Config) -> Iterator[str]:
    """A message for every product of sizes, each possible by itself, that no machine could hold."""
    image, vision, decoder = config.image, config.vision, config.decoder
    heads = 2 * (decoder.heads + decoder.kv_heads) * decoder.head_dim
    layers = vision.layers + vision.post_layers
    sizes = {
        "decoder": decoder.layers * decoder.width * (heads + 3 * decoder.mlp) + 2 * decoder.vocab_size * decoder.width,
        "vision": layers * vision.width * (4 * vision.width + 2 * vision.mlp) + 3 * vision.width * vision.patch_size**2,
        "projector": config.projector.layers * decoder.width * max(decoder.width, vision.width),
    }
    for section, size in sizes.items():
        if size > PARAMETERS:
            yield f"config.{section} has {size:.1e} parameters, expected at most {PARAMETERS:.0e}; lower its layers or widths"
    views = config.views_per_image
    tokens = views * config.patch_side**2 * (1 + config.groups)
    pixels = config.train.batch_size * config.data.max_images * views * image.size**2 * 3
    if tokens > TOKENS:
        yield (
            f"config.image (size {image.size}, num_crops {image.num_crops}) with config.vision.patch_size {vision.patch_size} "
            f"gives an image {tokens:,} visual tokens in its {1 + config.groups} groups, expected at most {TOKENS:,}; lower "
            "image.size or num_crops"
        )
    if image.mode == "anyres" and views > 1 + MOST["image.num_crops"]:
        yield f"config.image.pinpoints give an image {views:,} crops, expected at most {1 + MOST['image.num_crops']:,}"
    if pixels > BYTES:
        yield (
            f"config.train.batch_size {config.train.batch_size} with {config.data.max_images * views:,} crops of "
            f"{image.size} x {image.size} for each example are {pixels / 1e9:,.0f} GB of pixels, expected at most "
            f"{BYTES / 1e9:,.0f}; lower batch_size, data.max_images, image.size or num_crops"
        )
