"""DeepStack-L-HD: LLaVA-NeXT's cells in the sequence, each with 4 crops of its own stacked on it. One stage, from trained
weights.

  python -m deepstack_jax.train --config=configs/deepstack_hd.py --config.data.root=DIR --workdir=runs/deepstack_hd-7b

It starts from LLaVA-NeXT's weights, `image_newline` included; `:llava15` starts from LLaVA-1.5's, which have none: then it is
drawn at 1/sqrt(width). A run of configs/llava_next.py serves as well: `--config.train.weights=WORKDIR`. Further words: `13b`;
`published`, which takes the released part of the mixture instead of the paper's list; and `tiny`, which shrinks widths, depth
and data.

| | | source |
|---|---|---|
| data | 748k: the 665k without TextCaps, and seven sets more | paper table 9; configs/mixtures/deepstack_748k.py |
| trains | everything; the vision tower at 2e-6, the rest at 2e-5, image_newline in its own group | paper 4.1, table 10 |
| batch, length | 128, 4096 | paper table 10; a 2x2 grid takes 2904 tokens, 4x1 takes 2976 |
| 4 cells, 4 crops each, 2d sampling, layers 1 to 4 | | paper section 4.1, upstream's defaults |
| AdamW, weight decay 0, cosine to 0, warmup 3 %, clip 1.0, 1 epoch, bfloat16 | | as LLaVA-1.5 |
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

recipe = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("recipe.py"))))
FOLDERS = {"next": "checkpoints/liuhaotian/llava-v1.6-vicuna-{}", "llava15": "checkpoints/liuhaotian/llava-v1.5-{}"}


def get_config(argument: str = ""):
    kinds = {"model": ("7b", "13b"), "weights": tuple(FOLDERS), "data": ("rebuilt", "published")}
    chosen = recipe.arguments(__file__, argument, **kinds)
    config = recipe.begin(f"deepstack_hd-{chosen.model}", chosen.model)
    config.train.weights = FOLDERS[chosen.weights].format(chosen.model)
    if chosen.weights == "next":
        config.train.tower = ""  # it is among those weights

    config.image.mode = "hd"
    config.image.merge = "spatial_unpad"
    config.image.size = 336
    config.image.num_crops = 4
    config.deepstack.sampling = "2d"
    config.deepstack.start = 1
    config.deepstack.interval = 1

    config.data.sets = recipe.mixture("deepstack_748k", "SETS" if chosen.data == "rebuilt" else "PUBLISHED")
    config.data.template = recipe.template(chosen.model)
    config.data.max_length = 4096
    recipe.train_language(config, lr=2e-5, vision_lr=2e-6, newline=True)
    config.train.batch_size = 128
    if chosen.tiny:
        recipe.shrink(config)
    return config
