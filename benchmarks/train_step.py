"""Seconds per training step of DeepStack-L on this CPU, beside the same model in PyTorch: `python -m benchmarks.train_step`.

Same parameters, batch, float32 and threads on both sides: a frozen tower, a projector and a LLaMA that train, cross entropy,
clipping, AdamW. PyTorch's side is made of transformers' modules (SDPA attention, fused AdamW) without the tower's last layer,
which is not used; the stack is added by a hook of each layer. The losses of three steps are compared first; then the two take
turns, so that what else the machine does slows both. Without torch its columns stay empty.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from benchmarks.decode import llama_config
from deepstack_jax.batch import Batch
from deepstack_jax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    ImageConfig,
    OptimizerConfig,
    OptimizerGroup,
    ScheduleConfig,
    TrainConfig,
    VisionConfig,
)
from deepstack_jax.data.encode.labels import IMAGE_TOKEN
from deepstack_jax.families.base import TOWER
from deepstack_jax.generate.prompts import CutImage, example, pad_prompts
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.checkpoint.init_weights import first_state
from deepstack_jax.train.core.optimizer import flatten
from deepstack_jax.train.core.program import build_program
from deepstack_jax.weights.save import save_checkpoint

LENGTH, STEPS, CHECKED, VOCABULARY = 256, 12, 3, 8000
SIZES = {"10M": (256, 8, 4, 8), "40M": (512, 10, 8, 4), "110M": (768, 14, 12, 2)}  # width, layers, heads; rows of the batch
LR, TRAINS = 1e-4, (("vision_tower", "frozen"), (".*", "default"))


def config_of(width: int, layers: int, heads: int, rows: int) -> Config:
    """A DeepStack-L of 4 crops with 64 tokens each."""
    decoder = DecoderConfig(
        "llama", VOCABULARY, width, layers, heads, heads, width // heads, 8 * width // 3 // 16 * 16, remat="dots"
    )
    return Config(
        image=ImageConfig(size=112),
        vision=VisionConfig(width=256, layers=7, heads=4, mlp=1024),
        decoder=decoder,
        data=DataConfig(max_length=LENGTH),
        optimizer=OptimizerConfig(TRAINS, {"default": OptimizerGroup(lr=LR)}, ScheduleConfig(warmup=0.0)),
        train=TrainConfig(batch_size=rows, compute_dtype="float32"),
    )


def batch_of(config: Config) -> Batch:
    """Rows without padding: random pixels and words, all of which are predicted."""
    rng, layout = np.random.default_rng(0), config.layout
    image = layout.layout(layout.grids[-1], (224, 224))
    pixels = rng.integers(0, 256, (layout.max_views, config.image.size, config.image.size, 3), np.uint8)
    words = LENGTH - layout.max_tokens
    rows = []
    for _ in range(config.train.batch_size):
        ids = rng.integers(3, VOCABULARY, words + 1)
        ids[1] = IMAGE_TOKEN
        rows.append(example(ids, [CutImage(pixels, image)]))
    batch = pad_prompts(rows, config)
    targets = np.roll(batch.tokens, -1, axis=1)
    weights = ((np.roll(batch.visual_index, -1, axis=1) < 0) & (np.arange(LENGTH) < LENGTH - 1)).astype(np.float32)
    return batch._replace(targets=targets, loss_weights=weights)


def measure(sides: list[Callable[[], float]]) -> list[tuple[list[float], np.ndarray]]:
    """(losses of the first steps, seconds of those after them) of every side; they take turns, each first in half of them."""
    losses: list[list[float]] = [[] for _ in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(CHECKED + STEPS):
        for side in range(len(sides))[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            losses[side].append(sides[side]())
            seconds[side].append(time.perf_counter() - began)
    return [(one[:CHECKED], np.array(spent[CHECKED:])) for one, spent in zip(losses, seconds, strict=True)]


def ours(config: Config, batch: Batch, folder: Path) -> Callable[[], float]:
    """One step, which gives its loss; the first parameters are left in `folder`."""
    program = build_program(config, make_mesh(config.mesh), steps=10**6)
    with use_mesh(program.mesh):
        state, placed = first_state(program), put_batch(program.mesh, batch)
        save_checkpoint(flatten(jax.device_get(state.params)), config, folder)
        jitted = program.jit_step()

    def step() -> float:
        nonlocal state
        with use_mesh(program.mesh):
            state, metrics = jitted(state, placed)
            return float(metrics["loss"])

    return step


def theirs(config: Config, batch: Batch, folder: Path) -> Callable[[], float] | None:
    """The same of PyTorch, from the parameters in `folder`; None without torch."""
    try:
        import torch  # pyright: ignore[reportMissingImports] (not a requirement)
        from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM
    except ImportError:
        return None
    cfg, tower_cfg = config.decoder, config.vision
    decoder = LlamaForCausalLM(llama_config(cfg))
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=tower_cfg.width,
            intermediate_size=tower_cfg.mlp,
            num_hidden_layers=tower_cfg.layers_run,
            num_attention_heads=tower_cfg.heads,
            image_size=config.image.size,
            patch_size=tower_cfg.patch_size,
        )
    )
    projector = torch.nn.Sequential(
        torch.nn.Linear(tower_cfg.width, cfg.width), torch.nn.GELU(), torch.nn.Linear(cfg.width, cfg.width)
    )
    stored = {}
    for file in folder.rglob("*.safetensors"):
        stored |= {name: torch.from_numpy(array) for name, array in load_file(file).items()}
    for module, prefix in ((decoder, ""), (projector, "model.mm_projector."), (tower, f"{TOWER}vision_model.")):
        module.load_state_dict({name: stored[f"{prefix}{name}"] for name in module.state_dict()})
    tower.requires_grad_(False)
    trained = [*decoder.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    given = {name: torch.from_numpy(np.asarray(value).astype(np.int64)) for name, value in batch._asdict().items()}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image.mean, config.image.std))
    weights, rows = torch.from_numpy(batch.loss_weights), torch.arange(config.train.batch_size)[:, None]
    visual = given["visual_index"] >= 0
    groups: list[torch.Tensor] = []

    def add_group(number: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = args[0].clone()
            hidden[visual] += groups[number].flatten(0, 1)
            return hidden, *args[1:]

        return hook

    for layer, number in enumerate(config.deepstack.decoder_schedule(config.decoder.layers, config.layout.groups)):
        if number >= 0:
            decoder.model.layers[layer].register_forward_pre_hook(add_group(number))

    def loss_of() -> torch.Tensor:
        pixels = torch.from_numpy(batch.pixels).flatten(0, 1).permute(0, 3, 1, 2)
        with torch.no_grad():
            features = tower((pixels / 255 - mean) / std, output_hidden_states=True).hidden_states[-1][:, 1:]
        tokens = projector(features).reshape(len(rows), -1, cfg.width)
        groups[:] = [tokens[rows, given["stack_source"][:, number]] for number in range(config.layout.groups)]
        embeds = decoder.model.embed_tokens(given["tokens"]).clone()
        embeds[visual] = tokens[rows, given["token_source"]].flatten(0, 1)
        logits = decoder(inputs_embeds=embeds, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["targets"].flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm)
        optimizer.step()
        return loss.item()

    return step


def table() -> Iterator[str]:
    """The lines of the table, one by one as they are known."""
    yield "| parameters of the decoder | rows | ours, s/step | PyTorch, s/step | PyTorch / ours | of the least | losses apart |"
    yield "|---|---|---|---|---|---|---|"
    for name, (width, layers, heads, rows) in SIZES.items():
        config = config_of(width, layers, heads, rows)
        batch = batch_of(config)
        with tempfile.TemporaryDirectory() as folder:
            mine = ours(config, batch, Path(folder))
            other = theirs(config, batch, Path(folder))
        (losses, seconds), *rest = measure([mine, other] if other else [mine])
        against = "| | | |"
        for other_losses, spent in rest:
            apart = max(abs(a - b) for a, b in zip(losses, other_losses, strict=True))
            ratio, least = np.median(spent) / np.median(seconds), spent.min() / seconds.min()
            against = f"| {np.median(spent):.3f} | {ratio:.2f}x | {least:.2f}x | {apart:.0e} |"
        yield f"| {name} | {rows} | {np.median(seconds):.3f} {against}"


def main() -> None:
    print(f"medians of {STEPS} steps, {LENGTH} positions a row, 64 of them visual, 4 groups injected")
    for line in table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
