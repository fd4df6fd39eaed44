"""LLaVA-1.5, the paper's baseline: one view of 576 tokens, nothing injected. `:pretrain`, then `:finetune`.

  python -m deepstack_jax.train --config=configs/llava15_baseline.py:pretrain --config.data.root=DIR \
    --workdir=runs/llava15_baseline-7b-pretrain

Further words: `13b` or `phi3` instead of Vicuna-7B v1.5, and `tiny`, which shrinks widths, depth and data.

Numbers: LLaVA-1.5's (arXiv 2310.03744, and scripts/v1_5/ of its repository), which DeepStack-L takes over. Stage 1 has no
image_aspect_ratio there, so an image is resized by its shorter side and cropped to the middle; stage 2 has `pad`.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

recipe = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("recipe.py"))))


def get_config(argument: str = ""):
    chosen = recipe.arguments(__file__, argument, stage=("finetune", "pretrain"), model=("7b", "13b", "phi3"))
    config = recipe.begin(f"llava15_baseline-{chosen.model}-{chosen.stage}", chosen.model)

    config.image.size = 336
    config.deepstack.stack = "none"

    config.data.max_length = 2048
    if chosen.stage == "pretrain":
        config.image.mode = "square"
        config.data.sets = recipe.mixture("llava_558k")
        config.data.template = "plain"
        recipe.train_projector(config, lr=1e-3)
        config.train.batch_size = 256
    else:
        config.image.mode = "pad"
        config.data.sets = recipe.mixture("llava_665k")
        config.data.template = recipe.template(chosen.model)
        recipe.train_language(config, lr=2e-5)
        config.train.batch_size = 128
        config.train.projector = f"runs/llava15_baseline-{chosen.model}-pretrain"  # workdir of stage 1
    if chosen.tiny:
        recipe.shrink(config)
    return config
