"""Tokens per second of greedy decoding by the package, in bfloat16, against the bandwidth of the memory and transformers' own.

A token reads every parameter of the layers and the head once, and every row its keys and values: bytes over the bandwidth that
reading an array reaches here is the floor. Prefill is taken out: runs of many tokens less runs of one. Transformers' `generate`
decodes a bare language model of the same sizes, since it knows no stack, which only prefill reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.decode import llama_config
from benchmarks.gpu_check.programs import WORDS, config_of
from benchmarks.gpu_check.record import Record, target
from benchmarks.gpu_check.step import timed
from benchmarks.gpu_check.torch_step import torch_or_absent
from deepstack_jax.config import Config
from deepstack_jax.data.encode.labels import IMAGE_TOKEN
from deepstack_jax.families.build import build_model
from deepstack_jax.generate.decoding import answer_ids
from deepstack_jax.generate.prompts import CutImage, bucket, example, pad_prompts
from deepstack_jax.generate.sampling import greedy_sampling
from deepstack_jax.parallel.chips import CHIPS

FLOOR = 0.70  # of the floor, to reach
REPEATS = 3
BYTES = 2  # of a number in bfloat16


def decoder_config(record: Record) -> Config:
    """Of the whole model: decoding holds no gradients."""
    return config_of(record.size, {"decoder.layers": record.size.decode_layers})


def bandwidth(record: Record) -> float:
    """Bytes per second of summing a large array."""
    array = jnp.ones(record.size.square**2 * 8, jnp.float32)
    total = jax.jit(jnp.sum)
    jax.block_until_ready(total(array))
    seconds = timed(lambda: jax.block_until_ready(total(array)), 7)
    speed = array.nbytes / min(seconds)
    chip = CHIPS.get(jax.devices()[0].device_kind)
    record.add("memory", {"GB/s": speed / 1e9, "of the data sheet": speed / chip.hbm_bandwidth if chip else None})
    return speed


def ours(record: Record) -> None:
    """Every batch by the package."""
    size, config, speed = record.size, decoder_config(record), bandwidth(record)
    model = build_model(config)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), prompts(config, size.prompt, 1)))["params"]
    params = _drawn(shapes)
    read = sum(leaf.nbytes for leaf in jax.tree.leaves([params["layers"], params["head"]]))
    cfg = config.decoder
    for rows in size.batches:
        batch = prompts(config, size.prompt, rows)

        def answer(tokens: int, batch: Any = batch, rows: int = rows) -> None:
            made = answer_ids(
                model, params, batch, greedy_sampling(rows), stop_ids=[], max_new_tokens=tokens, room=bucket(size.new)
            )
            assert sum(ids.shape[1] for ids in made) == tokens

        taken, raw = seconds_per_token(answer, size.new)
        cached = 2 * cfg.layers * rows * (size.prompt + size.new / 2) * cfg.kv_heads * cfg.head_dim * BYTES
        floor = (read + cached) / speed
        figures = {"tokens/s": rows / taken, "s/token": taken, "floor, s/token": floor, "GB read": (read + cached) / 1e9}
        record.add(f"batch {rows}", figures | {"prompt": size.prompt, "new": size.new, "layers": cfg.layers, "seconds": raw})
        record.add(f"goal: share of the floor, batch {rows}", target(floor / taken, FLOOR))


def _drawn(shapes: Any) -> Any:
    """bfloat16 numbers for every parameter, in one program: to compile one for each takes longer than to draw."""
    leaves, tree = jax.tree.flatten(shapes)

    @jax.jit
    def draw() -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return [0.02 * jax.random.normal(key, leaf.shape, jnp.bfloat16) for key, leaf in zip(keys, leaves, strict=True)]

    return jax.tree.unflatten(tree, draw())


def prompts(config: Config, length: int, rows: int) -> Any:
    """A picture and words, `length` tokens in all, in every row."""
    rng, layout, side = np.random.default_rng(0), config.layout, config.image.size
    image = layout.layout(max(layout.grids, key=lambda grid: grid[0] * grid[1]), (640, 640))
    made = []
    for _ in range(rows):
        ids = rng.integers(WORDS, config.decoder.vocab_size, length - image.tokens.size + 1)
        ids[1] = IMAGE_TOKEN
        made.append(example(ids, [CutImage(rng.integers(0, 256, (image.views, side, side, 3), np.uint8), image)]))
    return pad_prompts(made, config)


def seconds_per_token(answer: Callable[[int], Any], new: int) -> tuple[float, list[float]]:
    """(median, all) of the time of `new` tokens less that of one, per token."""

    def taken(tokens: int) -> float:
        began = time.perf_counter()
        answer(tokens)
        return time.perf_counter() - began

    for tokens in (new, 1):
        taken(tokens)
    raw = [(taken(new) - taken(1)) / (new - 1) for _ in range(REPEATS)]
    return float(np.median(raw)), raw


def theirs(record: Record) -> None:
    """The same batches by transformers' `generate`, in a process whose GPU belongs to torch."""
    torch = torch_or_absent()
    from transformers import LlamaForCausalLM

    device, size, config = "cuda" if torch.cuda.is_available() else "cpu", record.size, decoder_config(record)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(llama_config(config.decoder)).eval()
    torch.set_default_dtype(before)
    for rows in size.batches:
        mine = record.figures_of("decode", f"batch {rows}")["s/token"]
        ids = torch.arange(WORDS, WORDS + size.prompt, device=device).remainder(config.decoder.vocab_size)[None].repeat(rows, 1)

        def answer(tokens: int, ids: Any = ids) -> None:
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    pad_token_id=0,
                )
            assert out[0, -1].item() >= 0  # waits for the device

        taken, raw = seconds_per_token(answer, size.new)
        record.add(
            f"batch {rows}",
            {"tokens/s": rows / taken, "ours / theirs": taken / mine, "torch": torch.__version__, "seconds": raw},
        )
