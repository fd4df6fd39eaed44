"""The laboratory on real images over a real language model: SmolLM2-135M-Instruct reads the lines of configs/study_lines.py.

  python -m deepstack_jax.train --config=configs/study_smollm2.py:cpu --workdir=runs/study/cpu/smollm2_deepstack-0

The argument is the size: `cpu`, minutes on one core, which shows that everything runs; `slice`, its first steps; or `gpu`,
minutes on one card. Under PARTS are `language`, the model as a Hugging Face folder, and for each size the export of a run of
configs/study_lines.py, whose tower is taken. The decoder learns by adapters; the projector, drawn, and the tower learn whole.
"""

import runpy
from pathlib import Path

from deepstack_jax.config import ConfigError

PARTS = "runs/study/pretrained"
# steps and examples of a step; steps from one evaluation to the next, and examples and questions at once of each
SIZES = {
    "cpu": {"steps": 100, "batch_size": 4, "every": 20, "examples": 24, "questions": 6},
    "slice": {"steps": 10, "batch_size": 2, "every": 5, "examples": 2, "questions": 6},
    "gpu": {"steps": 2500, "batch_size": 64, "every": 250, "examples": 256, "questions": 64},
}
TEXT = 160  # tokens of an example's words: the template's own, three questions, three lines
LINES = runpy.run_path(str(Path(__file__).with_name("study_lines.py")))


def get_config(size: str = "cpu"):
    if size not in SIZES:
        raise ConfigError(f"configs/study_smollm2.py:{size}: expected one of {', '.join(SIZES)}")
    sizes, config = SIZES[size], LINES["get_config"](size)
    config.name = f"smollm2-{size}"

    config.train.weights = f"{PARTS}/language"
    config.train.tower = f"{PARTS}/{size}/clip"
    config.decoder.vocab_size = 49152
    config.decoder.width, config.decoder.layers, config.decoder.mlp = 576, 30, 1536
    config.decoder.heads, config.decoder.kv_heads, config.decoder.head_dim = 9, 3, 64
    config.decoder.rope.theta = 100000.0
    config.decoder.max_positions = 8192
    config.decoder.tied_head = True
    config.decoder.remat = "none"

    config.data.template = "model"
    config.data.tokenizer = f"{PARTS}/language"
    config.data.max_length = (config.image.size // config.vision.patch_size) ** 2 + TEXT

    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.base_dtype = config.train.compute_dtype
    config.optimizer.table = (
        (r"^layers/.*/kernel$", "lora"),
        (r"^projector/", "projector"),
        (r"^vision_tower/", "tower"),
        (r".*", "frozen"),
    )
    adamw = {"algorithm": "adamw", "b1": 0.9, "b2": 0.98, "eps": 1e-8, "weight_decay": 0.0}
    rates = {"lora": 5e-4, "projector": 2e-3, "tower": 2e-4}
    config.optimizer.groups = {name: adamw | {"lr": lr, "lora": name == "lora"} for name, lr in rates.items()}

    config.train.steps = sizes["steps"]
    config.train.batch_size = sizes["batch_size"]
    config.train.checkpoint_every = sizes["every"]
    config.evaluation.every = sizes["every"]
    config.evaluation.examples = sizes["examples"]
    config.evaluation.batch_size = sizes["questions"]
    return config
