"""DeepStack over small language models of today, for one card: LLaVA-1.5's two stages, with every part a word.

  python -m deepstack_jax.train --config=configs/nano.py:pretrain --config.data.root=DIR --workdir=runs/nano-pretrain
  python -m deepstack_jax.train --config=configs/nano.py:finetune --config.data.root=DIR --workdir=runs/nano \
    --config.train.projector=runs/nano-pretrain

| words | first is the default |
|---|---|
| stage | `finetune`, `lora` (stage 2 by adapters), `pretrain` |
| language model | `smollm2-135m`, `smollm2-360m`, `smollm2-1.7b`, `qwen3-0.6b`, `qwen3-1.7b`, `qwen3-4b` |
| vision tower | `siglip2-b16-256`, `siglip2-so400m-384`, `clip-l` |
| what is injected | `l` (crops into the decoder), `v` (crops into the tower), `taps`, `baseline` (nothing) |

and `tiny`. Stage 2 looks for stage 1 under the same words: runs/nano-MODEL-TOWER-FORM-pretrain. Data are the published 558k and
665k, as in llava15.py. What fits on which card: docs/training.md. No run of these has been done here.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

recipe = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("recipe.py"))))
# Sizes are those of the published config.json of each. `lr` of stage 2: 2e-5 as LLaVA-1.5 has for 7B; twice and more for models
# under 1B, whose best rates are higher: nanoVLM trains SmolLM2-135M at 5e-5.
SMOLLM2 = {"vocab_size": 49152, "head_dim": 64, "norm_eps": 1e-5, "max_positions": 8192, "tied_head": True}
QWEN3 = {"architecture": "qwen3", "vocab_size": 151936, "head_dim": 128, "norm_eps": 1e-6, "max_positions": 40960}
QWEN3 |= {"tied_head": True, "kv_heads": 8, "rope": {"theta": 1e6}}
MODELS = {
    "smollm2-135m": {
        "weights": "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct",
        "lr": 5e-5,
        "decoder": SMOLLM2 | {"width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "mlp": 1536, "rope": {"theta": 1e5}},
    },
    "smollm2-360m": {
        "weights": "checkpoints/HuggingFaceTB/SmolLM2-360M-Instruct",
        "lr": 5e-5,
        "decoder": SMOLLM2 | {"width": 960, "layers": 32, "heads": 15, "kv_heads": 5, "mlp": 2560, "rope": {"theta": 1e5}},
    },
    "smollm2-1.7b": {
        "weights": "checkpoints/HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "lr": 2e-5,
        "decoder": SMOLLM2 | {"width": 2048, "layers": 24, "heads": 32, "kv_heads": 32, "mlp": 8192, "rope": {"theta": 1.3e5}},
    },
    "qwen3-0.6b": {
        "weights": "checkpoints/Qwen/Qwen3-0.6B",
        "lr": 5e-5,
        "decoder": QWEN3 | {"width": 1024, "layers": 28, "heads": 16, "mlp": 3072},
    },
    "qwen3-1.7b": {
        "weights": "checkpoints/Qwen/Qwen3-1.7B",
        "lr": 2e-5,
        "decoder": QWEN3 | {"width": 2048, "layers": 28, "heads": 16, "mlp": 6144},
    },
    "qwen3-4b": {
        "weights": "checkpoints/Qwen/Qwen3-4B",
        "lr": 2e-5,
        "decoder": QWEN3 | {"width": 2560, "layers": 36, "heads": 32, "mlp": 9728},
    },
}
# The feature is hidden state -2 as in the paper: the last layer of a tower is made for what pools it, and LLaVA-OneVision drops
# SigLIP's too. `taps`: hidden states into layers 1, 2, 3, as Qwen3-VL has them: after layers 9, 17, 25 of so400m's 27, and in
# proportion for the others, none of them the feature itself.
SIGLIP2 = {"architecture": "siglip", "patch_size": 16}
TOWERS = {
    "siglip2-b16-256": {  # 16 x 16 tokens: an image takes 256 positions, and 1280 tokens are seen
        "weights": "checkpoints/google/siglip2-base-patch16-256",
        "vision": SIGLIP2 | {"width": 768, "layers": 12, "heads": 12, "mlp": 3072},
        "size": 256,
        "taps": ((4, 1), (7, 2), (10, 3)),
    },
    "siglip2-so400m-384": {  # patches of 16, not of 14: 24 x 24 tokens as CLIP-L at 336 has, and none cut at the edge
        "weights": "checkpoints/google/siglip2-so400m-patch16-384",
        "vision": SIGLIP2 | {"width": 1152, "layers": 27, "heads": 16, "mlp": 4304},
        "size": 384,
        "taps": ((9, 1), (17, 2), (25, 3)),
    },
    "clip-l": {  # the paper's; 24 x 24 tokens
        "weights": recipe.CLIP,
        "vision": {},
        "size": 336,
        "taps": ((8, 1), (15, 2), (22, 3)),
    },
}
FORMS = ("l", "v", "taps", "baseline")


def get_config(argument: str = ""):
    stages = ("finetune", "lora", "pretrain")
    chosen = recipe.arguments(__file__, argument, stage=stages, model=tuple(MODELS), tower=tuple(TOWERS), form=FORMS)
    model, tower = MODELS[chosen.model], TOWERS[chosen.tower]
    run = f"nano-{chosen.model}-{chosen.tower}-{chosen.form}"
    config = recipe.begin_with(f"{run}-{chosen.stage}", model, tower)
    inject(config, chosen.form, tower)

    config.data.max_length = 2048  # as LLaVA's trainer
    config.data.packing.enabled = True  # a caption and its image are 300 to 650 tokens: the rest of a row would be padding
    side = tower["size"] // config.vision.patch_size
    config.data.packing.max_images = 2048 // (side**2 + 64)  # with a caption of 64 tokens each; an empty slot is encoded too
    config.train.frozen_dtype = "bfloat16"  # half the memory of what does not train
    if chosen.stage == "pretrain":
        config.data.sets = recipe.mixture("llava_558k")
        config.data.template = "plain"  # image, then caption
        recipe.train_projector(config, lr=1e-3)  # LLaVA-1.5's
        config.train.batch_size = 256  # LLaVA-1.5's
    else:
        config.data.sets = recipe.mixture("llava_665k")
        config.data.template = "model"  # the language model's own, which its answers came from before
        if chosen.stage == "lora":
            config.lora.rank, config.lora.alpha = 64, 128.0  # as configs/finetune.py
            recipe.train_adapters(config, lr=2e-4, projector_lr=2e-5)  # LLaVA-1.5's own LoRA recipe has these two
        else:
            # The tower learns in `v` alone, at a tenth, as in the paper (its table 10).
            recipe.train_language(config, lr=model["lr"], vision_lr=model["lr"] / 10 if chosen.form == "v" else 0.0)
        config.train.batch_size = 128  # LLaVA-1.5's
        config.train.projector = f"runs/{run}-pretrain"  # workdir of stage 1
    # A step in as many parts: about eight examples at a time, which fits 24 GB where the state does.
    config.train.accumulation = config.train.batch_size // 8
    if chosen.tiny:
        recipe.shrink(config)
        config.data.packing.max_images = config.train.accumulation = 2  # of a batch of four
    return config


def inject(config, form: str, tower: dict) -> None:
    """Image and DeepStack keys; the global view is the same in all forms, so that they can be compared."""
    config.image.size = tower["size"]
    if config.vision.architecture == "siglip":
        # SigLIP's own normalisation, and the filter that it resizes with
        config.image.mean = config.image.std = (0.5, 0.5, 0.5)
        config.image.crop_filter = config.image.global_filter = "bilinear"
    config.image.mode = "deepstack" if form in ("l", "v") else "stretch"
    config.image.num_crops = 4  # the paper's
    if form == "l":
        config.deepstack.stack = "crops"
        config.deepstack.start = config.deepstack.interval = 1  # layers 1 to 4, upstream's defaults
    elif form == "v":
        config.image.grid = "square"  # V needs exactly 2 x 2
        config.deepstack.into = "vision"
        config.deepstack.vision_start = (
            config.vision.layers - 4
        )  # the paper's best: 20 of 24; the fourth map enters the feature
    elif form == "taps":
        config.deepstack.stack = "taps"
        config.deepstack.taps = tower["taps"]
    else:
        config.deepstack.stack = "none"
