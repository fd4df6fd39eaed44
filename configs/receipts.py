"""A small DeepStack-L on real images in LLaVA JSON, from nothing: `:deepstack` (default) or `:baseline`, which sees 1 view.

  python -m deepstack_jax.train --config=configs/receipts.py --config.data.root=DIR --workdir=runs/receipts

DIR holds train.json, val.json and the images that they name. Text is read byte by byte, so nothing has to be downloaded;
`--config.data.tokenizer=DIR` takes a tokenizer, together with `--config.decoder.vocab_size` as large as it needs.
Sized for two CPU cores: it shows that the real path learns; reading receipts takes pretrained weights (`configs/llava15.py`).
"""

from deepstack_jax.config import ConfigError, default_config

VARIANTS = {"deepstack": ("deepstack", "crops"), "baseline": ("pad", "none")}


def get_config(argument: str = "deepstack"):
    if argument not in VARIANTS:
        raise ConfigError(f"configs/receipts.py:{argument}: expected one of {', '.join(VARIANTS)}")
    config = default_config()
    config.name = f"receipts-{argument}"

    config.image.mode, config.deepstack.stack = VARIANTS[argument]
    config.image.size = 128
    config.image.num_crops = 4
    config.vision.patch_size = 16
    config.vision.width = 128
    config.vision.layers = 4
    config.vision.heads = 4
    config.vision.mlp = 384
    config.vision.position_std = 0.5  # as in the demo: learnt from nothing, small positions stay unused for long
    config.decoder.vocab_size = 259  # 256 bytes and 3 special tokens
    config.decoder.width = 192
    config.decoder.layers = 5
    # Two wide heads: at this length on a CPU the attention scores, one set per head, take most of the time.
    config.decoder.heads = config.decoder.kv_heads = 2
    config.decoder.head_dim = 96
    config.decoder.mlp = 512
    config.decoder.remat = "none"
    config.decoder.embed_std = 0.5
    config.decoder.head_std = 0.5 / 192**0.5
    config.deepstack.start = 1  # groups 0..3 at layers 1..4 of 0..4

    config.data.train = "train.json"
    config.data.validation = "val.json"
    config.data.template = "v1"
    config.data.tokenizer = "bytes"
    # The longest of the receipts has 790 bytes and 64 visual tokens: none is left out. Half of the rows (four questions each;
    # the others transcribe, in half the length) come close to it, so nearly every batch is as long: buckets gain nothing.
    config.data.max_length = 864

    config.optimizer.table = ((r"(?<!head)/kernel$", "matrices"), (r".*", "rest"))
    config.optimizer.groups = {
        "matrices": {"algorithm": "muon", "lr": 0.02, "b1": 0.95, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.05},
        "rest": {"algorithm": "adamw", "lr": 2e-3, "b1": 0.9, "b2": 0.98, "eps": 1e-8, "weight_decay": 0.0},
    }
    config.optimizer.schedule.kind = "linear_tail"
    config.optimizer.schedule.warmup = 0.1
    config.optimizer.schedule.final = 0.02

    config.train.epochs = 1.0
    config.train.batch_size = 4
    config.train.checkpoint_every = 50
    config.train.compute_dtype = "float32"
    config.evaluation.every = 50
    config.evaluation.examples = 16
    config.evaluation.batch_size = 8
    config.evaluation.max_new_tokens = 96  # room for an address; a transcription, up to 273 bytes, is shown cut
    return config
