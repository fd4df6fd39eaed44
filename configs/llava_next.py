"""LLaVA-NeXT, the baseline of DeepStack-HD: up to 4 cells of the image after the global view, as a longer sequence.

  python -m deepstack_jax.train --config=configs/llava_next.py:pretrain --config.data.root=DIR \
    --workdir=runs/llava_next-7b-pretrain

`:pretrain`, then `:finetune`. Further words: `13b` instead of Vicuna-7B v1.5, and `tiny`, which shrinks widths, depth and
data.

Sources: LLaVA-NeXT's post of January 2024 (558k for the projector; then the full model, vision tower included) and the first
training scripts that its authors published (scripts/train/pretrain_clip.sh and finetune_clip.sh: the five grids,
`spatial_unpad`, tower at 2e-6; stage 1 without an image_aspect_ratio, as LLaVA-1.5's). Language model at 2e-5 and batch 128
as in the paper's table 10 for HD, so that the two can be compared. The data is what was released of theirs: `PUBLISHED` in
configs/mixtures/deepstack_748k.py.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

recipe = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("recipe.py"))))


def get_config(argument: str = ""):
    chosen = recipe.arguments(__file__, argument, stage=("finetune", "pretrain"), model=("7b", "13b"))
    config = recipe.begin(f"llava_next-{chosen.model}-{chosen.stage}", chosen.model)

    config.image.size = 336
    config.deepstack.stack = "none"

    if chosen.stage == "pretrain":
        config.image.mode = "square"
        config.data.sets = recipe.mixture("llava_558k")
        config.data.template = "plain"
        config.data.max_length = 2048
        recipe.train_projector(config, lr=1e-3)
        config.train.batch_size = 256
    else:
        config.image.mode = "anyres"
        config.image.merge = "spatial_unpad"
        config.image.pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
        config.data.sets = recipe.mixture("deepstack_748k", "PUBLISHED")
        config.data.template = recipe.template(chosen.model)
        config.data.max_length = 4096
        recipe.train_language(config, lr=2e-5, vision_lr=2e-6, newline=True)
        config.train.batch_size = 128
        config.train.projector = f"runs/llava_next-{chosen.model}-pretrain"  # workdir of stage 1
    if chosen.tiny:
        recipe.shrink(config)
    return config
