"""DeepStack-L on the LLaVA-1.5 recipe: `:pretrain` trains the projector, `:finetune` projector and language model.

  python -m deepstack_jax.train --config=configs/llava15.py:pretrain --config.data.root=DIR --workdir=runs/llava15-7b-pretrain
  python -m deepstack_jax.train --config=configs/llava15.py:finetune --config.data.root=DIR --workdir=runs/llava15-7b-finetune

Further words: `13b` or `phi3` instead of Vicuna-7B v1.5, and `tiny`, which shrinks widths, depth and data. Data: LLaVA's
published 558k (stage 1) and 665k (stage 2) under `--config.data.root`, as `configs/mixtures/` lists them;
`--config.data.train=FILE` trains on one file of your own. Docs: docs/training.md.

| | stage 1 | stage 2 | source |
|---|---|---|---|
| data | 558k, `plain` | 665k, `v1` or `phi3_instruct` | paper section 4.1, as LLaVA-1.5 |
| trains | projector | projector and language model | paper section 4.1 |
| lr, batch | 1e-3, 256 | 2e-5, 128 | paper table 10, as LLaVA-1.5 |
| AdamW, weight decay 0, cosine to 0, warmup 3 %, clip 1.0, 1 epoch, length 2048, bfloat16 | both | both | LLaVA-1.5 |
| 4 crops stretched to the grid, 2d sampling, layers 1 to 4 | both | both | paper sections 3.1 and 3.2, upstream's defaults |
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

recipe = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("recipe.py"))))


def get_config(argument: str = ""):
    chosen = recipe.arguments(__file__, argument, stage=("finetune", "pretrain"), model=("7b", "13b", "phi3"))
    config = recipe.begin(f"llava15-{chosen.model}-{chosen.stage}", chosen.model)

    config.image.mode = "deepstack"
    config.image.size = 336
    config.image.num_crops = 4
    config.deepstack.sampling = "2d"
    config.deepstack.start = 1
    config.deepstack.interval = 1

    config.data.max_length = 2048
    if chosen.stage == "pretrain":
        config.data.sets = recipe.mixture("llava_558k")
        config.data.template = "plain"
        recipe.train_projector(config, lr=1e-3)
        config.train.batch_size = 256
    else:
        config.data.sets = recipe.mixture("llava_665k")
        config.data.template = recipe.template(chosen.model)
        recipe.train_language(config, lr=2e-5)
        config.train.batch_size = 128
        config.train.projector = f"runs/llava15-{chosen.model}-pretrain"  # workdir of stage 1
    if chosen.tiny:
        recipe.shrink(config)
    return config
