"""A small DeepStack-L that learns 16 receipts by heart: `:pretrain`, then `:finetune`. `python -m
benchmarks.overfit_receipts` runs it.

The whole real path on real files: LLaVA JSON, JPEG, templates, packed rows, both stages, greedy generation. Nothing in it is
trained beforehand, so stage 2 trains everything; stage 1 trains the projector alone, on the transcriptions.
"""

import runpy
from pathlib import Path

from deepstack_jax.config import ConfigError

STAGES = ("finetune", "pretrain")


def get_config(argument: str = "finetune"):
    if argument not in STAGES:
        raise ConfigError(f"configs/overfit.py:{argument}: expected one of {', '.join(STAGES)}")
    config = runpy.run_path(str(Path(__file__).with_name("receipts.py")))["get_config"]("deepstack")
    config.name = f"overfit-{argument}"

    config.image.size = 64
    config.vision.width = 64
    config.vision.layers = 3
    config.vision.heads = 2
    config.vision.mlp = 128
    config.decoder.vocab_size = 1024
    config.decoder.width = 128
    config.decoder.heads = config.decoder.kv_heads = 2
    config.decoder.head_dim = 64
    config.decoder.mlp = 320
    config.decoder.head_std = 0.5 / 128**0.5

    config.data.validation = ""
    config.data.tokenizer = ""  # with 1024 ids at the most: --config.data.tokenizer=DIR
    config.data.max_length = 512
    config.data.packing.enabled = True
    config.data.packing.window = 16
    config.data.packing.max_images = 3
    config.train.batch_size = 16
    config.train.epochs = 0.0
    config.train.log_every = 10
    config.train.checkpoint_every = 100
    config.optimizer.schedule.warmup = 0.05
    if argument == "pretrain":
        config.data.template = "plain"
        config.train.steps = 20
        config.optimizer.table = ((r"^projector/", "rest"), (r".*", "frozen"))
    else:
        config.data.template = "v1"
        config.train.steps = 80
    return config
