"""The laboratory's base: DeepStack-L on cards (`deepstack_jax/data/cards.py`); each row of
benchmarks/study/table.py changes some of its keys.

  python -m deepstack_jax.train --config=configs/study.py:cpu --workdir=runs/study/cpu/deepstack-0

The argument is the size: `cpu`, minutes on two cores; `slice`, its first steps alone; or `gpu`. Twelve layers, so that every
start and interval of the table has room for all four groups.
"""

from deepstack_jax.config import ConfigError, default_config
from deepstack_jax.data.cards import BOXES, PATCH, SIDE, VOCABULARY

# tower and decoder: width, layers, heads, mlp; steps and cards of a step
SIZES = {
    "cpu": {"vision": (64, 6, 4, 192), "decoder": (64, 12, 2, 160), "steps": 800, "batch_size": 48},
    "slice": {"vision": (64, 6, 4, 192), "decoder": (64, 12, 2, 160), "steps": 300, "batch_size": 48},
    "gpu": {"vision": (256, 9, 4, 768), "decoder": (512, 12, 8, 1408), "steps": 4000, "batch_size": 256},
}


def get_config(size: str = "cpu"):
    if size not in SIZES:
        raise ConfigError(f"configs/study.py:{size}: expected one of {', '.join(SIZES)}")
    sizes, config = SIZES[size], default_config()
    config.name = f"cards-{size}"

    config.image.mode = "deepstack"
    config.image.size = SIDE * PATCH
    config.image.global_filter = "box"  # the area mean, to which digits are invisible
    # A crop of a card is never enlarged but where a row asks for it; then every pixel stays what it is.
    config.image.crop_filter = "nearest"
    config.vision.patch_size = PATCH
    config.vision.width, config.vision.layers, config.vision.heads, config.vision.mlp = sizes["vision"]
    config.vision.position_std = 1.0  # smaller ones stay unused for long
    width, layers, heads, mlp = sizes["decoder"]
    config.decoder.vocab_size = 3 + len(VOCABULARY)
    config.decoder.width, config.decoder.layers, config.decoder.mlp = width, layers, mlp
    config.decoder.heads = config.decoder.kv_heads = heads
    config.decoder.head_dim = width // heads
    config.decoder.remat = "none" if size == "gpu" else "block"  # on a CPU recomputing is faster than moving the residuals
    config.decoder.embed_std = 0.5
    config.decoder.head_std = 0.5 / width**0.5

    config.data.source = "cards"
    config.data.template = "direct"
    config.data.tokenizer = "words:" + " ".join(VOCABULARY)
    config.data.max_length = BOXES + 2 * BOXES + 8  # the low-res view, a word that asks and one that answers for each box

    config.optimizer.table = ((r"(?<!head)/kernel$", "matrices"), (r".*", "rest"))
    config.optimizer.groups = {
        "matrices": {"algorithm": "muon", "lr": 0.012, "b1": 0.95, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.05},
        "rest": {"algorithm": "adamw", "lr": 2e-3, "b1": 0.9, "b2": 0.98, "eps": 1e-8, "weight_decay": 0.0},
    }
    config.optimizer.schedule.kind = "linear_tail"
    config.optimizer.schedule.warmup = 0.05
    config.optimizer.schedule.final = 0.02

    config.train.steps = sizes["steps"]
    config.train.batch_size = sizes["batch_size"]
    config.train.checkpoint_every = 200
    config.train.compute_dtype = "bfloat16" if size == "gpu" else "float32"
    config.evaluation.examples = 128
    config.evaluation.batch_size = 128
    config.evaluation.max_new_tokens = 1
    return config
