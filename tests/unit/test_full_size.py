"""The published sizes, traced without a byte of memory: parameter counts as published, shapes of one training batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config, build_config, default_config
from deepstack_jax.families.build import build_model

LLAMA_7B = {"decoder.width": 4096, "decoder.layers": 32, "decoder.heads": 32, "decoder.kv_heads": 32, "decoder.mlp": 11008}
LLAMA_13B = {"decoder.width": 5120, "decoder.layers": 40, "decoder.heads": 40, "decoder.kv_heads": 40, "decoder.mlp": 13824}
PHI_3_MINI = {
    "decoder.architecture": "phi3",
    "decoder.vocab_size": 32064,
    "decoder.width": 3072,
    "decoder.layers": 32,
    "decoder.heads": 32,
    "decoder.kv_heads": 32,
    "decoder.head_dim": 96,
    "decoder.mlp": 8192,
    "decoder.sliding_window": 2047,
}
HD = {"image.mode": "hd", "image.merge": "spatial_unpad", "data.max_length": 4096}
V = {"image.grid": "square", "deepstack.into": "vision", "deepstack.vision_start": 20}
TOWER = 303_507_456  # CLIP ViT-L/14-336, as transformers counts CLIPVisionModel


@pytest.mark.parametrize(
    ("changes", "decoder"),
    [
        (LLAMA_7B, 6_738_415_616),
        (LLAMA_13B, 13_015_864_320),
        (PHI_3_MINI, 3_821_079_552),
        (LLAMA_7B | HD, 6_738_415_616),
        (LLAMA_7B | V, 6_738_415_616),
    ],
)
def test_full_size(changes, decoder):
    source = default_config()
    source.update_from_flattened_dict(changes)
    config = build_config(source)
    model = build_model(config)
    shape = config.data_spec.batch_shape(2, config.data.max_length)
    b, t, c, size, m, j, g = shape
    assert (c, j) == ((25, 4) if config.image.mode == "hd" else (5, 4))
    assert m == (2976 if config.image.mode == "hd" else 576)
    kinds = {"loss_weights": np.float32, "pixels": np.uint8, "example_id": np.int32}
    shapes = [(b, t)] * 5 + [(b, c, size, size, 3), (b, m), (b, j, m), (b, t), (b, g)]
    fields = zip(Batch._fields, shapes, strict=True)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, kinds.get(name, np.int32)) for name, shape in fields))
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))
    width = config.decoder.width
    projector = (1024 + 1) * width + (width + 1) * width
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in variables["params"].items()}
    assert counts.pop("vision_tower") == TOWER
    assert counts.pop("projector") == projector
    assert counts.pop("image_newline", 0) == (width if config.image.newline else 0)
    assert sum(counts.values()) == decoder

    output = jax.eval_shape(model.apply, variables, batch)
    assert (output.hidden.shape, output.hidden.dtype) == ((b, t, width), jnp.bfloat16)
    logits = jax.eval_shape(lambda v, hidden: model.apply(v, hidden, method="logits"), variables, output.hidden)
    assert logits.shape == (b, t, config.decoder.vocab_size)


def test_the_default_configuration_is_vicuna_7b_with_clip_l():
    config = build_config(default_config())
    assert config == Config()
    assert config.deepstack.decoder_schedule(32, config.layout.groups) == (-1, 0, 1, 2, 3) + (-1,) * 27
    assert config.layout.max_tokens == 576
