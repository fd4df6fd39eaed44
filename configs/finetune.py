"""Fine-tune a checkpoint on your own rows: sizes, images, injection, template, tokenizer and tower are those of the weights.

  python -m deepstack_jax.train --config=configs/finetune.py --config.train.weights=DIR --config.data.train=mine.json \
    --config.data.root=IMAGES --workdir=runs/mine

DIR is whatever `deepstack_jax.load` reads: DeepStack, LLaVA-1.5 or LLaVA-NeXT in either naming, the workdir of a run; or a bare
language model with --config.train.tower=DIR. What is given nonetheless, as --config.image.num_crops=9, is compared with the
weights. Docs: docs/finetune.md.

| word | trains | learning rate |
|---|---|---|
| `full` (default) | projector, `image_newline` and language model | 2e-5 |
| `projector` | projector and `image_newline` | 1e-3 |
"""

from deepstack_jax.config import ConfigError, config_from_weights

PROJECTOR = r"^(projector|tap_projectors_\d+|image_newline)(/|$)"
# What trains: (pattern of the parameter's path, its group), the first match wins; and the learning rate of every group.
SETTINGS = {
    "full": (((r"^vision_tower/", "frozen"), (r".*", "language")), {"language": 2e-5}),
    "projector": (((PROJECTOR, "projector"), (r".*", "frozen")), {"projector": 1e-3}),
}


def get_config(argument: str = "full"):
    if argument not in SETTINGS:
        raise ConfigError(f"configs/finetune.py:{argument}: expected one of {', '.join(SETTINGS)}")
    config = config_from_weights()
    config.name = f"finetune-{argument}"

    config.data.packing.enabled = True  # several short examples share a row
    table, rates = SETTINGS[argument]
    config.optimizer.table = table
    config.optimizer.groups = {
        name: {"algorithm": "adamw", "lr": lr, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        for name, lr in rates.items()
    }
    config.optimizer.schedule.kind = "cosine"
    config.optimizer.schedule.warmup = 0.03
    config.optimizer.clip_norm = 1.0
    config.train.epochs = 1.0
    config.train.batch_size = 16
    config.train.frozen_dtype = "bfloat16"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
