"""The paper's ablations, which have Phi-3-mini as their language model: `:pretrain`, then `:finetune`, of one variant.

  python -m deepstack_jax.train --config=configs/phi3.py:pretrain,dummy --config.data.root=DIR \
    --workdir=runs/phi3-dummy-pretrain

| variant | what | mean of 7 benchmarks (the paper's ablations) |
|---|---|---|
| `deepstack` | DeepStack-L, the default | 51.1 |
| `encoder` | the same, the vision tower fine-tuned in stage 2 | 52.4 |
| `baseline` | one view, nothing injected | 49.1 |
| `dummy` | the global view's tokens injected in place of the crops' | 49.1 |
| `sampling1d`, `samplinggrid` | other ways to sample the groups | 49.3, 49.0 |
| `letterbox` | crops that keep the image's aspect | 49.9 |
| `string` | all 2880 tokens in the sequence | 51.0 |

`tiny` shrinks widths, depth and data. Numbers of both stages as in llava15.py (paper table 10), with the template
`phi3_instruct`; `string` needs 4096 positions, all that the model has. The tower's 2e-6 is table 10's.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

recipe = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("recipe.py"))))
VARIANTS = {
    "deepstack": {},
    "encoder": {},
    "baseline": {"image.mode": "pad", "deepstack.stack": "none"},
    "dummy": {"deepstack.stack": "dummy"},
    "sampling1d": {"deepstack.sampling": "1d"},
    "samplinggrid": {"deepstack.sampling": "grid"},
    "letterbox": {"image.fit": "letterbox"},
    "string": {"deepstack.sequence": "global_crops", "deepstack.stack": "none", "data.max_length": 4096},
}


def get_config(argument: str = ""):
    chosen = recipe.arguments(__file__, argument, stage=("finetune", "pretrain"), variant=tuple(VARIANTS))
    config = recipe.begin(f"phi3-{chosen.variant}-{chosen.stage}", "phi3")

    config.image.mode = "deepstack"
    config.image.size = 336
    config.image.num_crops = 4
    config.deepstack.sampling = "2d"
    config.deepstack.start = 1
    config.deepstack.interval = 1
    config.data.max_length = 2048
    config.update_from_flattened_dict(VARIANTS[chosen.variant])

    if chosen.stage == "pretrain":
        if chosen.variant == "baseline":
            config.image.mode = "square"  # as in LLaVA-1.5, which pads in stage 2 only
        config.data.sets = recipe.mixture("llava_558k")
        config.data.template = "plain"
        recipe.train_projector(config, lr=1e-3)
        config.train.batch_size = 256
    else:
        config.data.sets = recipe.mixture("llava_665k")
        config.data.template = "phi3_instruct"
        recipe.train_language(config, lr=2e-5, vision_lr=2e-6 if chosen.variant == "encoder" else 0.0)
        config.train.batch_size = 128
        config.train.projector = f"runs/phi3-{chosen.variant}-pretrain"  # workdir of stage 1
    if chosen.tiny:
        recipe.shrink(config)
    return config
