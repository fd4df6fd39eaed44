"""DeepStack-L on the LLaVA-1.5 recipe: `:pretrain` trains the projector, `:finetune` projector and LLM.

Numbers: paper table 10 and section 4.1; LLaVA-1.5 for what the paper takes over. Sizes are Vicuna-7B v1.5 and CLIP
ViT-L/14-336. Data: LLaVA's published 558k (stage 1) and 665k (stage 2) under `--config.data.root`, as
`configs/mixtures/` lists them; `--config.data.train=FILE` trains on one file of your own.
"""

import dataclasses
import runpy
from pathlib import Path

from deepstack_jax.config import default_config

STAGES = ("pretrain", "finetune")


def get_config(argument: str = "finetune"):
    if argument not in STAGES:
        raise ValueError(f"configs/llava15.py:{argument}: expected one of {', '.join(STAGES)}")
    config = default_config()
    config.name = f"deepstack-l-7b-{argument}"

    config.image.mode = "deepstack"
    config.image.size = 336
    config.image.num_crops = 4
    config.deepstack.start = 1
    config.deepstack.interval = 1
    config.deepstack.sampling = "2d"

    config.data.max_length = 2048
    config.data.workers = 8
    if argument == "pretrain":
        config.data.sets = mixture("llava_558k")
        config.data.template = "plain"
        config.optimizer.table = ((r"^projector/", "projector"), (r".*", "frozen"))
        config.optimizer.groups = {"projector": adamw(1e-3)}
        config.train.batch_size = 256
    else:
        config.data.sets = mixture("llava_665k")
        config.data.template = "v1"
        config.optimizer.table = ((r"^vision_tower/", "frozen"), (r".*", "language"))
        config.optimizer.groups = {"language": adamw(2e-5)}
        config.train.batch_size = 128
    config.optimizer.schedule.kind = "cosine"
    config.optimizer.schedule.warmup = 0.03
    config.optimizer.schedule.final = 0.0
    config.optimizer.clip_norm = 1.0

    config.train.weights = "checkpoints/llava-v1.5-7b"
    config.train.epochs = 1.0
    config.train.compute_dtype = "bfloat16"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config


def adamw(lr: float) -> dict:
    """AdamW without weight decay, as in both stages of the recipe."""
    return {"algorithm": "adamw", "lr": lr, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


def mixture(name: str, table: str = "SETS") -> dict[str, dict]:
    """A table of configs/mixtures/, found beside this file, whatever folder the run starts from."""
    sets = runpy.run_path(str(Path(__file__).parent / "mixtures" / f"{name}.py"))[table]
    return {name: dataclasses.asdict(entry) for name, entry in sets.items()}
