"""DeepStack-V: the crops' tokens enter the vision tower, whose output is 576 tokens. `:pretrain`, then `:finetune`.

  python -m deepstack_jax.train --config=configs/deepstack_v.py:pretrain --config.data.root=DIR \
    --workdir=runs/deepstack_v-7b-pretrain

Further words: `13b` or `phi3` instead of Vicuna-7B v1.5, and `tiny`, which shrinks widths, depth and data.

Stage 1 and the rest of stage 2 as in llava15.py. Of V's own: a 2x2 grid of crops always; 4 maps from tower layer 20 of 24 on,
the best of the start layers that the paper tries; the tower is fine-tuned (section 4.1). Its rate is 2e-6 in the paper's
table 10 and 1e-6 in the text; the table counts, as a tenth of the language model's 2e-5.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

recipe = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("recipe.py"))))


def get_config(argument: str = ""):
    chosen = recipe.arguments(__file__, argument, stage=("finetune", "pretrain"), model=("7b", "13b", "phi3"))
    config = recipe.begin(f"deepstack_v-{chosen.model}-{chosen.stage}", chosen.model)

    config.image.mode = "deepstack"
    config.image.size = 336
    config.image.num_crops = 4
    config.image.grid = "square"
    config.deepstack.into = "vision"
    config.deepstack.vision_start = 20
    config.deepstack.sampling = "2d"

    config.data.max_length = 2048
    if chosen.stage == "pretrain":
        config.data.sets = recipe.mixture("llava_558k")
        config.data.template = "plain"
        recipe.train_projector(config, lr=1e-3)
        config.train.batch_size = 256
    else:
        config.data.sets = recipe.mixture("llava_665k")
        config.data.template = recipe.template(chosen.model)
        recipe.train_language(config, lr=2e-5, vision_lr=2e-6)
        config.train.batch_size = 128
        config.train.projector = f"runs/deepstack_v-{chosen.model}-pretrain"  # workdir of stage 1
    if chosen.tiny:
        recipe.shrink(config)
    return config
