"""The laboratory on real images: read lines of receipts (benchmarks/study/lines.py writes the files), learnt with drawn ones.

  python -m deepstack_jax.train --config=configs/study_lines.py:cpu --workdir=runs/study/cpu/lines_deepstack-0

The argument is the size: `cpu`, minutes on two cores, which shows that everything runs; `slice`, its first steps; or `gpu`,
minutes on one card. A picture is 256x64 pixels, four crops of 64x64 side by side; the low-res view has a quarter of its width.
"""

from deepstack_jax.config import ConfigError, default_config

ROOT = "runs/study/lines-data"
# tower and decoder: width, layers, heads, mlp; steps and examples of a step
SIZES = {
    "cpu": {"vision": (96, 5, 4, 288), "decoder": (128, 8, 4, 256), "steps": 300, "batch_size": 16},
    "slice": {"vision": (96, 5, 4, 288), "decoder": (128, 8, 4, 256), "steps": 30, "batch_size": 16},
    "gpu": {"vision": (384, 7, 6, 1152), "decoder": (512, 12, 8, 1408), "steps": 6000, "batch_size": 128},
}
TURNS = 3 * (6 + 32 + 2)  # a line's question, its text, and their ends, in bytes


def get_config(size: str = "cpu"):
    if size not in SIZES:
        raise ConfigError(f"configs/study_lines.py:{size}: expected one of {', '.join(SIZES)}")
    sizes, config = SIZES[size], default_config()
    config.name = f"lines-{size}"

    config.image.mode = "deepstack"
    config.image.size = 64
    config.vision.patch_size = 8
    config.vision.width, config.vision.layers, config.vision.heads, config.vision.mlp = sizes["vision"]
    config.vision.position_std = 0.5
    width, layers, heads, mlp = sizes["decoder"]
    config.decoder.vocab_size = 259  # 256 bytes and 3 special tokens
    config.decoder.width, config.decoder.layers, config.decoder.mlp = width, layers, mlp
    config.decoder.heads = config.decoder.kv_heads = heads
    config.decoder.head_dim = width // heads
    config.decoder.remat = "none" if size == "gpu" else "block"
    config.decoder.embed_std = 0.5
    config.decoder.head_std = 0.5 / width**0.5

    config.data.root = ROOT
    config.data.sets = {"drawn": {"file": "drawn.json"}, "receipts": {"file": "receipts.json", "repeat": 3.0}}
    config.data.validation = "held_out.json"
    config.data.template = "direct"
    config.data.tokenizer = "bytes"
    config.data.max_length = (config.image.size // config.vision.patch_size) ** 2 + TURNS + 8

    config.optimizer.table = ((r"(?<!head)/kernel$", "matrices"), (r".*", "rest"))
    config.optimizer.groups = {
        "matrices": {"algorithm": "muon", "lr": 0.02, "b1": 0.95, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.05},
        "rest": {"algorithm": "adamw", "lr": 2e-3, "b1": 0.9, "b2": 0.98, "eps": 1e-8, "weight_decay": 0.0},
    }
    config.optimizer.schedule.kind = "linear_tail"
    config.optimizer.schedule.warmup = 0.05
    config.optimizer.schedule.final = 0.02

    config.train.steps = sizes["steps"]
    config.train.batch_size = sizes["batch_size"]
    config.train.checkpoint_every = 500
    config.train.compute_dtype = "bfloat16" if size == "gpu" else "float32"
    config.evaluation.every = sizes["steps"] // 6
    config.evaluation.examples = 64
    config.evaluation.batch_size = 64
    config.evaluation.max_new_tokens = 34
    return config
