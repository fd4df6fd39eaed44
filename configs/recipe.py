"""What the recipes in this folder share: their arguments, language models, optimizer groups and mixtures, and `tiny`.

No recipe itself. The others load it with `runpy`, so that `--config=configs/NAME.py` works from any folder.
"""

import dataclasses
import runpy
from pathlib import Path
from types import SimpleNamespace

from deepstack_jax.config import ConfigError, default_config

# Folders end like the names of the Hugging Face hub, which the message that one is missing tells to fetch.
CLIP = "checkpoints/openai/clip-vit-large-patch14-336"
VICUNA = {"heads": 32, "kv_heads": 32, "head_dim": 128, "vocab_size": 32000, "norm_eps": 1e-5, "max_positions": 4096}
MODELS = {
    "7b": {
        "weights": "checkpoints/lmsys/vicuna-7b-v1.5",
        "template": "v1",
        "decoder": VICUNA | {"width": 4096, "layers": 32, "mlp": 11008},
    },
    "13b": {
        "weights": "checkpoints/lmsys/vicuna-13b-v1.5",
        "template": "v1",
        "decoder": VICUNA | {"width": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "mlp": 13824},
    },
    "phi3": {
        "weights": "checkpoints/microsoft/Phi-3-mini-4k-instruct",
        "template": "phi3_instruct",
        "decoder": VICUNA
        | {"architecture": "phi3", "width": 3072, "layers": 32, "head_dim": 96, "mlp": 8192}
        | {"vocab_size": 32064, "sliding_window": 2047},
    },
}

# `tiny`: sizes and data, and nothing else. 16 patches a view instead of hundreds; the rest in proportion.
TINY_SIDE = 4  # patches along a side of a view, instead of 24
TINY_VISION = {"width": 32, "layers": 6, "heads": 2, "mlp": 64}
TINY_DECODER = {"width": 48, "layers": 6, "heads": 4, "kv_heads": 4, "head_dim": 12, "mlp": 96, "vocab_size": 576}
TINY_BATCH = 32  # 256 becomes 8, 128 becomes 4
TINY_LENGTH = 4  # 2048 becomes 512


def arguments(file: str, argument: str, **choices: tuple[str, ...]) -> SimpleNamespace:
    """The words of `--config=FILE:WORD,WORD`, in any order: at most one of every choice, whose first word is the default.

    `tiny` (bool) is a choice of every recipe.

    Raises:
      ConfigError: a word that is none of them, or two of one choice; lists all that are valid.
    """
    chosen = {name: words[0] for name, words in choices.items()} | {"tiny": False}
    given = [word for word in argument.split(",") if word]
    open_choices = dict(choices) | {"tiny": ("tiny",)}
    for word in given:
        name = next((name for name, words in open_choices.items() if word in words), None)
        if name is None:
            valid = "; ".join(f"{name}: {', '.join(words)}" for name, words in choices.items())
            again = any(word in words for words in choices.values()) or word == "tiny"
            problem = "is one too many of its kind" if again else "is not known"
            raise ConfigError(
                f"configs/{Path(file).name}:{argument}: {word!r} {problem}; expected words with commas between, at most one of "
                f"each kind, the first is the default: {valid}; and tiny"
            )
        chosen[name] = True if name == "tiny" else word
        del open_choices[name]
    return SimpleNamespace(**chosen)


def begin(name: str, model: str):
    """A config with the sizes of a language model and of CLIP ViT-L/14-336, and what all recipes have in common."""
    return begin_with(name, MODELS[model], {"weights": CLIP, "vision": {}})


def begin_with(name: str, model: dict, tower: dict):
    """The same of any parts, each the folder of its weights and its sizes; the rest as LLaVA-1.5 (paper section 4.1)."""
    decoder, vision = model["decoder"], tower["vision"]
    config = default_config(vision.get("architecture", "clip"), decoder.get("architecture", "llama"))
    config.name = name
    config.decoder.update(decoder)
    config.vision.update(vision)
    config.train.weights = model["weights"]
    config.train.tower = tower["weights"]
    config.data.tokenizer = config.train.get_oneway_ref("weights")  # beside the weights, wherever a flag puts them
    config.data.workers = 8
    config.optimizer.schedule.kind = "cosine"
    config.optimizer.schedule.warmup = 0.03
    config.optimizer.schedule.final = 0.0
    config.optimizer.clip_norm = 1.0
    config.train.epochs = 1.0
    config.train.compute_dtype = "bfloat16"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config


def template(model: str) -> str:
    """The conversation template of stage 2; stage 1 has `plain`."""
    return MODELS[model]["template"]


def train_projector(config, *, lr: float) -> None:
    """Stage 1: all but the projector is frozen, and the mergers of taps if any."""
    config.optimizer.table = ((r"^projector/", "projector"), (r"^(vision_tower|embed|layers|head)/", "frozen"))
    config.optimizer.groups = {"projector": adamw(lr)}
    _train_mergers(config, lr)


def train_language(config, *, lr: float, vision_lr: float = 0.0, newline: bool = False) -> None:
    """Stage 2: projector and language model, the vision tower at a rate of its own (0 = frozen), `image_newline` if any."""
    vision = "vision" if vision_lr else "frozen"
    table = ((r"^vision_tower/", vision), (r"^(projector|embed|layers|head)/", "language"))
    config.optimizer.table = (*table, (r"^image_newline$", "newline")) if newline else table
    groups = {"language": adamw(lr)} | ({"vision": adamw(vision_lr)} if vision_lr else {})
    config.optimizer.groups = groups | ({"newline": adamw(lr)} if newline else {})
    _train_mergers(config, lr)


def train_adapters(config, *, lr: float, projector_lr: float) -> None:
    """Stage 2 by LoRA: adapters of the language model's linear maps; the projector whole, and the mergers of taps if any."""
    config.optimizer.table = ((r"^layers/.*/kernel$", "lora"), (r"^projector/", "projector"))
    config.optimizer.table += ((r"^(vision_tower|embed|layers|head)/", "frozen"),)
    config.optimizer.groups = {"lora": adamw(lr) | {"lora": True}, "projector": adamw(projector_lr)}
    _train_mergers(config, projector_lr)


def _train_mergers(config, lr: float) -> None:
    if config.deepstack.taps:
        config.optimizer.table += ((r"^deepstack_mergers_\d+/", "mergers"),)
        config.optimizer.groups.mergers = adamw(lr)


def adamw(lr: float) -> dict:
    """AdamW without weight decay, as in all recipes."""
    return {"algorithm": "adamw", "lr": lr, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


def mixture(name: str, table: str = "SETS") -> dict[str, dict]:
    """A table of configs/mixtures/, found beside this file, whatever folder the run starts from."""
    sets = runpy.run_path(str(Path(__file__).parent / "mixtures" / f"{name}.py"))[table]
    return {name: dataclasses.asdict(entry) for name, entry in sets.items()}


def shrink(config) -> None:
    """Make a recipe `tiny`: widths, depth and data. What trains, how, and where crops go, stays as it is."""
    side = TINY_SIDE * config.vision.patch_size
    scale = side / config.image.size
    config.image.pinpoints = tuple((int(w * scale), int(h * scale)) for w, h in config.image.pinpoints)
    config.image.size = side
    if config.deepstack.vision_start >= 0:  # as far from the tower's end
        config.deepstack.vision_start -= config.vision.layers - TINY_VISION["layers"]
    share = TINY_VISION["layers"] / config.vision.layers
    config.deepstack.taps = tuple((round(state * share), layer) for state, layer in config.deepstack.taps)
    config.vision.update(TINY_VISION)
    config.decoder.update(TINY_DECODER)
    config.data.max_length //= TINY_LENGTH
    config.data.workers = 0
    for entry in config.data.sets.values():
        entry.rows = entry.paper = 0  # of the published data
    config.train.batch_size //= TINY_BATCH
