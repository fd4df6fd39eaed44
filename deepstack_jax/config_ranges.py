"""The range of every number of a configuration, for `config_checks.py`: what lies outside is a slip, or cannot be computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from deepstack_jax.config import Config

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
    """From `least` to `most`, both included unless `below` says that `most` is not."""

    least: float
    most: float
    expected: str
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value lies inside; NaN lies nowhere."""
        return self.least <= value and (value < self.most if self.below else value <= self.most)


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


def out_of_range(config: Config) -> Iterator[str]:
    """A message for every number outside of its range."""
    numbers = [(key, attrgetter(key)(config), None) for key in POSITIVE]
    numbers += [(key, attrgetter(key)(config), valid) for key, valid in RANGES.items()]
    for name, group in config.optimizer.groups.items():
        numbers += [(f"optimizer.groups.{name}.{key}", attrgetter(key)(group), valid) for key, valid in GROUP_RANGES.items()]
    numbers += [(f"data.buckets[{i}]", bucket, None) for i, bucket in enumerate(config.data.buckets)]
    numbers += [(f"image.std[{i}]", std, None) for i, std in enumerate(config.image.std)]
    for key, value, valid in numbers:
        if not (value > 0 if valid is None else valid.holds(value)):  # so that NaN is outside too
            yield f"config.{key} got {value}, expected {'a number above 0' if valid is None else valid.expected}"
