"""Fine-tune a checkpoint on your own rows: sizes, images, injection, template, tokenizer and tower are those of the weights.

  python -m deepstack_jax.train --config=configs/finetune.py --config.train.weights=DIR --config.data.train=mine.json \
    --config.data.root=IMAGES --workdir=runs/mine
  python -m deepstack_jax.train --config=configs/finetune.py:full ...

DIR is whatever `deepstack_jax.load` reads: DeepStack, LLaVA-1.5 or LLaVA-NeXT in either naming, the workdir of a run; or a bare
language model with --config.train.tower=DIR. What is given nonetheless, as --config.image.num_crops=9, is compared with the
weights. Docs: docs/finetune.md.

| word | trains | learning rate |
|---|---|---|
| `lora` (default) | adapters of the language model's linear maps, rank 64; projector and `image_newline` whole | 2e-4, 2e-5 |
| `full` | language model, projector and `image_newline` | 2e-5 |
| `projector` | projector and `image_newline` | 1e-3 |
"""

from deepstack_jax.config import ConfigError, config_from_weights

PROJECTOR = r"^(projector|deepstack_mergers_\d+|image_newline)(/|$)"
# What trains: (pattern of the parameter's path, its group), the first match wins; and the learning rate of every group.
SETTINGS = {
    "lora": (((r"^layers/.*/kernel$", "lora"), (PROJECTOR, "projector"), (r".*", "frozen")), {"lora": 2e-4, "projector": 2e-5}),
    "full": (((r"^vision_tower/", "frozen"), (r".*", "language")), {"language": 2e-5}),
    "projector": (((PROJECTOR, "projector"), (r".*", "frozen")), {"projector": 1e-3}),
}


def get_config(argument: str = "lora"):
    if argument not in SETTINGS:
        raise ConfigError(f"configs/finetune.py:{argument}: expected one of {', '.join(SETTINGS)}")
    config = config_from_weights()
    config.name = f"finetune-{argument}"

    config.data.packing.enabled = True  # several short examples share a row
    table, rates = SETTINGS[argument]
    config.optimizer.table = table
    adamw = {"algorithm": "adamw", "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    config.optimizer.groups = {name: adamw | {"lr": lr, "lora": name == "lora"} for name, lr in rates.items()}
    config.lora.rank = 64
    config.lora.alpha = 128.0
    config.optimizer.schedule.kind = "cosine"
    config.optimizer.schedule.warmup = 0.03
    config.optimizer.clip_norm = 1.0
    config.train.epochs = 1.0
    config.train.batch_size = 16
    config.train.frozen_dtype = "bfloat16"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
