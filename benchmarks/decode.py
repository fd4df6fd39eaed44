"""Tokens per second of cached greedy decoding at batch 1, against transformers' `generate` and against reading the weights.

`python -m benchmarks.decode` prints a table. The same LLaMA sizes, random weights, float32 and number of threads on both sides;
without torch the second column stays empty. The floor is the time to read every parameter that a token needs once, at the
bandwidth that a sum over an array reaches here; a model that fits into the processor's cache may be faster than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from transformers import LlamaConfig

from deepstack_jax.config import Config, DataConfig, DecoderConfig, DeepStackConfig, ImageConfig, TrainConfig, VisionConfig
from deepstack_jax.families.build import build_model
from deepstack_jax.generate.decoding import answer_ids
from deepstack_jax.generate.prompts import example, pad_prompts
from deepstack_jax.generate.sampling import greedy_sampling

PROMPT, NEW, REPEATS = 60, 129, 5
VOCABULARY = 8000
SIZES = {"4M": (192, 4, 4), "17M": (384, 6, 6), "48M": (640, 8, 10), "110M": (768, 14, 12)}  # width, layers, heads


def config_of(width: int, layers: int, heads: int) -> Config:
    """A LLaVA-1.5 whose tower is next to nothing."""
    decoder = DecoderConfig("llama", VOCABULARY, width, layers, heads, heads, width // heads, 8 * width // 3 // 16 * 16)
    return Config(
        image=ImageConfig(mode="pad", size=28),
        vision=VisionConfig(patch_size=14, width=16, layers=2, heads=2, mlp=32),
        decoder=decoder,
        deepstack=DeepStackConfig(stack="none"),
        data=DataConfig(max_length=512),
        train=TrainConfig(compute_dtype="float32"),
    )


Run = Callable[[int], Any]  # makes so many tokens


def seconds_per_token(sides: list[Run]) -> list[np.ndarray]:
    """f64[REPEATS] of every side: the time of NEW tokens less that of one, prefill with it, per token. They take turns."""

    def timed(run: Run, tokens: int) -> float:
        start = time.perf_counter()
        run(tokens)
        return time.perf_counter() - start

    for run in sides:
        for tokens in (NEW, 1):
            timed(run, tokens)
    spent = [[(timed(run, NEW) - timed(run, 1)) / (NEW - 1) for run in sides] for _ in range(REPEATS)]
    return list(np.array(spent).T)


def ours(config: Config) -> tuple[Run, int]:
    """(what decodes, bytes of the parameters that a token reads)."""
    model = build_model(config)
    batch = pad_prompts([example(np.arange(3, 3 + PROMPT, dtype=np.int32), [])], config)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.02, leaf.shape), jnp.float32), shapes)

    def run(tokens: int) -> None:
        made = answer_ids(model, params, batch, greedy_sampling(1), stop_ids=[], max_new_tokens=tokens, room=192)
        assert sum(ids.shape[1] for ids in made) == tokens

    read = jax.tree.leaves([params["layers"], params["head"]])
    return run, sum(leaf.nbytes for leaf in read)


def llama_config(decoder: DecoderConfig) -> LlamaConfig:
    """The same LLaMA as transformers describes it."""
    return LlamaConfig(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.width,
        intermediate_size=decoder.mlp,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        max_position_embeddings=decoder.max_positions,
        rms_norm_eps=decoder.norm_eps,
    )


def theirs(config: Config) -> Run | None:
    """What decodes by transformers, None without torch."""
    try:
        import torch  # pyright: ignore[reportMissingImports] (not a requirement)
        from transformers import LlamaForCausalLM
    except ImportError:
        return None
    model = LlamaForCausalLM(llama_config(config.decoder)).eval()
    ids = torch.arange(3, 3 + PROMPT)[None]

    def run(tokens: int) -> None:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
            )
        assert out.shape[1] == PROMPT + tokens

    return run


def bandwidth() -> float:
    """Bytes per second of summing an array that no cache holds."""
    array, total = jnp.ones(2**27, jnp.float32), jax.jit(jnp.sum)
    total(array).block_until_ready()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        total(array).block_until_ready()
        times.append(time.perf_counter() - start)
    return array.nbytes / min(times)


def table(speed: float) -> Iterator[str]:
    """The lines of the table, one by one as they are known; `speed` is that of `bandwidth`."""
    yield "| parameters read per token | ours, tokens/s | transformers, tokens/s | ratio | of the least | share of the floor |"
    yield "|---|---|---|---|---|---|"
    for name, sizes in SIZES.items():
        config = config_of(*sizes)
        mine, nbytes = ours(config)
        other = theirs(config)
        seconds, *rest = seconds_per_token([mine, other] if other else [mine])
        taken, against = float(np.median(seconds)), "| | | |"
        for spent in rest:
            ratios = np.median(spent) / taken, spent.min() / seconds.min()
            against = f"| {1 / np.median(spent):.0f} | {ratios[0]:.2f}x | {ratios[1]:.2f}x |"
        yield f"| {name} ({nbytes / 1e6:.0f} MB) | {1 / taken:.0f} {against} {nbytes / speed / taken:.0%} |"


def main() -> None:
    speed = bandwidth()
    print(f"memory: {speed / 1e9:.1f} GB/s; prompt {PROMPT}, {NEW} tokens, medians of {REPEATS}")
    for line in table(speed):
        print(line, flush=True)


if __name__ == "__main__":
    main()
