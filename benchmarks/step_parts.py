"""Two ways to write a part of the step, beside each other: `python -m benchmarks.step_parts`.

On this CPU they take turns, forward and backward, and what they compute is compared; the seconds are those of the process on
all cores, of which the median is shown: other work on the machine disturbs them less than a clock on the wall.
`python -m benchmarks.step_parts v5p:2x2x1` compiles both at 7B width for one chip of a TPU instead, and shows what its compiler
counts (needs libtpu).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from deepstack_jax.model.layers import ACTIVATIONS, Linear
from deepstack_jax.plan.topology import open_machine
from deepstack_jax.train.core.step import LossSums, add_up, loss_sums, no_sums, token_loss

TURNS = 15


class Sizes(NamedTuple):
    """Of a layer, its head, and a batch."""

    rows: int
    length: int
    width: int
    heads: int
    mlp: int
    vocabulary: int
    dtype: str


SMALL = Sizes(8, 256, 512, 8, 1360, 8000, "float32")
LARGE = Sizes(4, 2048, 4096, 32, 11008, 32000, "bfloat16")
Params = dict[str, Array]
Way = Callable[[Params, Array], Array]  # (parameters, hidden states) -> a sum, whose gradients are taken


def product(x: Array, kernel: Array) -> Array:
    """As the model multiplies."""
    layer = Linear(kernel.shape[1:], ("a",) * kernel.ndim, x.dtype)
    return layer.apply({"params": {"kernel": kernel}}, x)  # pyright: ignore[reportReturnType]


def apart(params: Params, x: Array) -> list[Array]:
    return [product(x, kernel) for kernel in params.values()]


def fused(params: Params, x: Array) -> list[Array]:
    """One product with the kernels side by side, which are separate parameters."""
    flat = [kernel.reshape(kernel.shape[0], -1) for kernel in params.values()]
    made = product(x, jnp.concatenate(flat, axis=1))
    ends = np.cumsum([kernel.shape[1] for kernel in flat])[:-1]
    parts = zip(jnp.split(made, ends, axis=-1), params.values(), strict=True)
    return [part.reshape(*x.shape[:-1], *kernel.shape[1:]) for part, kernel in parts]


def queries(multiply: Callable[[Params, Array], list[Array]], params: Params, x: Array) -> Array:
    q, k, v = multiply(params, x)
    return (jnp.sin(q) * k + v).astype(jnp.float32).sum()


def gated(multiply: Callable[[Params, Array], list[Array]], params: Params, x: Array) -> Array:
    gate, up = multiply(params, x)
    return (ACTIVATIONS["silu"](gate) * up).astype(jnp.float32).sum()


def once(sizes: Sizes, params: Params, x: Array) -> Array:
    targets, weights = jnp.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]), jnp.ones(x.shape[:2])
    return token_loss(logits, params, x, targets % sizes.vocabulary, weights, chunk=512).loss


def again(sizes: Sizes, params: Params, x: Array) -> Array:
    """The loss whose logits are computed again in the backward pass."""
    chunk = min(512, x.shape[1])
    parts = jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, x.shape[2]), 1, 0)
    targets = jnp.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]) % sizes.vocabulary
    targets = jnp.moveaxis(targets.reshape(x.shape[0], -1, chunk), 1, 0)

    @jax.checkpoint
    def one(sums: LossSums, part: tuple[Array, Array]) -> tuple[LossSums, None]:
        hidden, targets = part
        return add_up(sums, loss_sums(logits(params, hidden), targets, jnp.ones(targets.shape))), None

    return jax.lax.scan(one, no_sums(), (parts, targets))[0].loss


def logits(params: Params, x: Array) -> Array:
    (kernel,) = params.values()
    layer = Linear(kernel.shape[1:], ("a", "b"), x.dtype, out=jnp.float32)
    return layer.apply({"params": {"kernel": kernel}}, x)  # pyright: ignore[reportReturnType]


def cases(sizes: Sizes) -> Iterator[tuple[str, dict[str, tuple[int, ...]], dict[str, Way]]]:
    """(part, its kernels, two ways by name)."""
    head = (sizes.width, sizes.heads, sizes.width // sizes.heads)
    ways = {"apart": apart, "fused": fused}
    yield "q, k, v", dict.fromkeys("qkv", head), {name: partial(queries, way) for name, way in ways.items()}
    wide: dict[str, tuple[int, ...]] = dict.fromkeys(("gate", "up"), (sizes.width, sizes.mlp))
    yield "gate, up", wide, {name: partial(gated, way) for name, way in ways.items()}
    kernel = {"head": (sizes.width, sizes.vocabulary)}
    yield "head and loss", kernel, {"logits twice": partial(again, sizes), "once": partial(once, sizes)}


def measure(ways: tuple[Way, Way], params: Params, x: Array) -> tuple[list[float], float]:
    """(median seconds of each, how far their gradients are apart as a share of the largest)."""
    steps = [jax.jit(jax.value_and_grad(way, argnums=(0, 1))) for way in ways]
    first, second = (jax.tree.leaves(jax.device_get(step(params, x))) for step in steps)
    apart = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(first, second, strict=True))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for step, taken in zip(steps, seconds, strict=True):
            began = time.process_time()
            jax.block_until_ready(step(params, x))
            taken.append(time.process_time() - began)
    return [float(np.median(taken)) for taken in seconds], apart


def on_this_machine() -> None:
    rng = np.random.default_rng(0)
    print("| part | one way | s | other way | s | first / second | gradients apart |\n|---|---|---|---|---|---|---|")
    x = jnp.asarray(rng.normal(size=(SMALL.rows, SMALL.length, SMALL.width)), SMALL.dtype)
    for part, shapes, ways in cases(SMALL):
        (one, first), (other, second) = ways.items()
        params = {name: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32) for name, shape in shapes.items()}
        (a, b), apart = measure((first, second), params, x)
        print(f"| {part} | {one} | {a:.3f} | {other} | {b:.3f} | {a / b:.2f}x | {apart:.0e} |", flush=True)


def compiled(topology: str) -> None:
    machine = open_machine(topology)
    place = SingleDeviceSharding(machine.devices[0])
    print("| part | way | TFLOPs | GB accessed | compiler's own seconds | temporaries, GiB |\n|---|---|---|---|---|---|")
    x = jax.ShapeDtypeStruct((LARGE.rows, LARGE.length, LARGE.width), LARGE.dtype, sharding=place)
    for part, shapes, ways in cases(LARGE):
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for name, shape in shapes.items()}
        for name, way in ways.items():
            made = jax.jit(jax.value_and_grad(way, argnums=(0, 1))).lower(params, x).compile()
            cost, memory = made.cost_analysis(), made.memory_analysis()
            if not cost:
                raise SystemExit(f"the compiler of {topology} counts nothing")
            numbers = cost["flops"] / 1e12, cost["bytes accessed"] / 1e9, cost.get("optimal_seconds", float("nan"))
            temporaries = memory.temp_size_in_bytes / 2**30 if memory else 0.0
            print(
                f"| {part} | {name} | {numbers[0]:.2f} | {numbers[1]:.2f} | {numbers[2]:.4f} | {temporaries:.2f} |", flush=True
            )


if __name__ == "__main__":
    compiled(sys.argv[1]) if sys.argv[1:] else on_this_machine()
