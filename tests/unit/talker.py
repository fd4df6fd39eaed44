"""A tiny model that talks in readable bytes, and pictures for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from PIL import Image

from deepstack_jax.api import LMM
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.families.build import build_model
from deepstack_jax.serve.engine import Engine, Limits
from tests.unit.tiny import make_batch, model_params, tiny_config

CONFIG = tiny_config({"decoder.vocab_size": 259, "data.template": "direct", "decoder.max_positions": 256, "data.max_images": 1})
LIMITS = Limits(slots=3, waiting=40, context=64, images=2, answer=20)


def talker(vocabulary: int = 259) -> LMM:
    """The model; a token is a byte, and only some of ASCII are ever said."""
    config = replace(CONFIG, decoder=replace(CONFIG.decoder, vocab_size=vocabulary))
    params = model_params(build_model(config), make_batch(config, [[]]), seed=3)
    params["head"]["kernel"] = params["head"]["kernel"].at[:, [*range(36), *range(130, vocabulary)]].set(0)
    return LMM(config, params, load_tokenizer("bytes"), "direct")


@contextmanager
def started(lmm: LMM) -> Iterator[Engine]:
    """An engine that answers, all its programs compiled."""
    engine = Engine(lmm.answerer, LIMITS)
    assert list(engine.warm_up()) == list(engine.shapes)
    engine.start()
    yield engine
    engine.close()


def picture(seed: int, width: int = 20, height: int = 12) -> Image.Image:
    """Noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
