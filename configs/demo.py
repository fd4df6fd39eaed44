"""The demo: read digits that exist only in the high-resolution view. `:baseline`, `:dummy`, `:deepstack` (default), `:string`.

A page of 4x4 boxes, one digit each. In the low-resolution view every box is exactly uniform, so the digits ("fine" questions)
can be read from the crops alone; the gray shades of the boxes ("coarse" questions) from either view.
A second argument, as in `:baseline,legible`, draws the digits large enough for the low-resolution view: the control that
shows that the baseline fails for want of pixels and nothing else.
"""

from deepstack_jax.config import ConfigError, default_config
from deepstack_jax.data.synthetic import VOCABULARY

STACKS = {"baseline": "none", "dummy": "dummy", "deepstack": "crops", "string": "none"}


def get_config(argument: str = "deepstack"):
    variant, _, style = argument.partition(",")
    if variant not in STACKS or style not in ("", "legible"):
        raise ConfigError(f"configs/demo.py:{argument}: expected one of {', '.join(STACKS)}, optionally followed by ',legible'")
    config = default_config()
    config.name = argument

    config.image.mode = "deepstack" if variant in ("deepstack", "string") else "pad"  # pages are square: nothing is padded
    config.image.size = 64  # a page is 128x128: the global view halves it, the 2x2 crops keep every pixel
    config.image.global_filter = "box"  # the area mean, to which the digits are invisible
    config.vision.patch_size = 16
    config.vision.width = 64
    config.vision.layers = 3
    config.vision.heads = 4
    config.vision.mlp = 192
    config.vision.position_std = 0.5  # 0.1 and below hardly learn where a patch lies within 300 steps
    config.decoder.vocab_size = 3 + len(VOCABULARY)
    config.decoder.width = 128
    config.decoder.layers = 5
    config.decoder.heads = config.decoder.kv_heads = 4
    config.decoder.head_dim = 32
    config.decoder.mlp = 256
    config.decoder.remat = "block"  # recomputing is faster here than moving the residuals
    config.decoder.embed_std = 0.5
    config.decoder.head_std = 0.5 / 128**0.5
    config.deepstack.stack = STACKS[variant]
    config.deepstack.sequence = "global_crops" if variant == "string" else "global"

    config.data.source = "pages"
    config.data.template = "direct"
    config.data.tokenizer = "words:" + " ".join(VOCABULARY)
    turns = 2 * config.data.synthetic.questions  # one word asks, one word answers
    config.data.max_length = 16 + turns + 16 * config.image.num_crops * (variant == "string")
    config.data.synthetic.style = style or "checker"

    # Muon on every matrix, the patch embedding among them: under AdamW alone the digits stay unread at any budget tried.
    config.optimizer.table = ((r"(?<!head)/kernel$", "matrices"), (r".*", "rest"))
    config.optimizer.groups = {
        "matrices": {"algorithm": "muon", "lr": 0.02, "b1": 0.95, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.05},
        "rest": {"algorithm": "adamw", "lr": 2e-3, "b1": 0.9, "b2": 0.98, "eps": 1e-8, "weight_decay": 0.0},
    }
    config.optimizer.schedule.kind = "linear_tail"
    config.optimizer.schedule.warmup = 20 / 300
    config.optimizer.schedule.final = 0.02

    config.train.steps = 450 if style else 300  # drawn plainly, digits and shades are learned one after the other
    config.train.batch_size = 32
    config.train.checkpoint_every = 50
    config.train.compute_dtype = "float32"
    config.evaluation.examples = 128
    config.evaluation.batch_size = 128
    config.evaluation.max_new_tokens = 1
    return config
