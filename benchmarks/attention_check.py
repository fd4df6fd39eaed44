"""A device's attention kernels against the portable one: values and gradients in bfloat16, at the sizes of known models.

`python -m benchmarks.attention_check` prints a line for each case; the GPU check asks for them one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepstack_jax.config import MeshConfig
from deepstack_jax.model.attention import AttentionFn, AttentionMask, Everything, Segments, dot_product
from deepstack_jax.parallel.kernels import attention_for, kernel_for
from deepstack_jax.parallel.mesh import make_mesh

NEAR = 1e-3  # of the portable kernel in bfloat16, in the mean, where values are of the order of one
PICTURE = Everything(("crops", "vision_heads"))


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention of one model.

    Attributes:
      parts: what each segment takes of a row, in tenths; what is left is padding. () = a picture, of which all sees all.
      window: positions before its own that a token sees; 0 = all.
    """

    name: str
    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    parts: tuple[int, ...]
    window: int = 0

    @property
    def packed(self) -> bool:
        """Whether a row holds several segments."""
        return len(self.parts) > 1


CASES = (
    Case("Vicuna 7B, packed", 2, 2048, 32, 32, 128, (3, 2, 4)),
    Case("Vicuna 7B, one example", 2, 2048, 32, 32, 128, (9,)),
    Case("CLIP L/14-336", 16, 577, 16, 16, 64, ()),
    Case("grouped heads, packed", 2, 2048, 32, 8, 128, (3, 2, 4)),
    Case("grouped heads, one example", 2, 2048, 32, 8, 128, (9,)),
    Case("window, packed", 2, 2048, 32, 32, 96, (3, 2, 5), 511),
    Case("window, one example", 2, 2048, 32, 32, 96, (9,), 511),
    Case("grouped, window, packed", 2, 2047, 14, 2, 64, (1, 1, 1, 5), 300),
    Case("80 wide, packed", 2, 2048, 16, 4, 80, (6, 4)),
    Case("SigLIP so400m/14-384", 16, 729, 16, 16, 72, ()),
    Case("CLIP H/14", 16, 257, 16, 16, 80, ()),
)
TINY = tuple(
    dataclasses.replace(case, rows=1, length=30, heads=4, kv_heads=2, window=case.window and 5)
    for case in (CASES[7], CASES[8], CASES[2])
)


def check(case: Case, device: Any = None, attend: AttentionFn | None = None, repeats: int = 5) -> dict[str, Any]:
    """Figures of a case: how far outputs and gradients are apart, and the time of both directions.

    Args:
      device: where it runs; None = jax's first.
      attend: in place of what `kernel_for` chooses for the device.

    Returns:
      `kernel`; `apart`, of out, dq, dk, dv the mean distance from the portable kernel's in bfloat16; `errors` and
      `portable_errors`, the mean distances of both from float32; `seconds` and `portable_seconds`, medians of forward and
      backward; `equal`, whether all is finite, nothing further apart than NEAR (or one rounding to bfloat16, where values are
      larger), and no error above 1.25 times the portable kernel's.
    """
    device = device or jax.devices()[0]
    kernel = kernel_for(device.platform, "bfloat16", case.head_dim, packed=case.packed)
    mesh = make_mesh(MeshConfig(1, 1, 1), [device])
    attend = attend or attention_for(kernel, mesh, segments=len(case.parts) + 1 if case.packed else 1)
    with jax.default_device(device), jax.set_mesh(mesh):
        mine, seconds = both_ways(attend, case, "bfloat16", repeats)
        rounded, portable_seconds = both_ways(dot_product, case, "bfloat16", repeats)
        exact, _ = both_ways(dot_product, case, "float32", 0)
    return {"kernel": kernel, **compare(mine, rounded, exact), "seconds": seconds, "portable_seconds": portable_seconds}


def compare(mine: list[np.ndarray], rounded: list[np.ndarray], exact: list[np.ndarray]) -> dict[str, Any]:
    """`apart`, `errors`, `portable_errors` and `equal` of `check`: a kernel's, the portable one's and the exact results."""
    apart, errors, portable_errors = (
        [float(np.abs(a - b).mean()) for a, b in zip(*pair, strict=True)]
        for pair in ((mine, rounded), (mine, exact), (rounded, exact))
    )
    near = [max(NEAR, float(np.abs(truth).mean()) * 2**-8) for truth in exact]
    equal = all(a <= limit for a, limit in zip(apart, near, strict=True))
    equal &= all(a <= 1.25 * b + 1e-4 for a, b in zip(errors, portable_errors, strict=True))
    return {"apart": apart, "errors": errors, "portable_errors": portable_errors, "equal": equal}


def both_ways(attend: AttentionFn, case: Case, dtype: str, repeats: int) -> tuple[list[np.ndarray], float]:
    """Output at tokens, gradients of a sum that weighs them all differently, and the median seconds; NaN stays NaN."""
    rng = np.random.default_rng(0)
    shapes = [(case.rows, case.length, count, case.head_dim) for count in (case.heads, case.kv_heads, case.kv_heads)]
    mask, there = _mask(case)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(dtype) for shape in shapes)
    weights = jnp.asarray(rng.normal(size=shapes[0]) * there, jnp.float32)

    def weighed(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v, mask).astype(jnp.float32)
        return (out * weights).sum(), out * there

    run = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))
    times = []
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        (_, out), gradients = jax.block_until_ready(run(q, k, v))
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(run(q, k, v))
            times.append(time.perf_counter() - began)
    return [np.asarray(x, np.float32) for x in (out, *gradients)], float(np.median(times)) if times else 0.0


def _mask(case: Case) -> tuple[AttentionMask, np.ndarray]:
    """What the kernel is told, and 1 at tokens, 0 at padding."""
    segments, positions = np.zeros((2, case.rows, case.length), np.int32)
    bounds = [case.length * tenths // 10 for tenths in np.cumsum((0, *case.parts))]
    for number, (first, last) in enumerate(itertools.pairwise(bounds), 1):
        segments[:, first:last] = number
        positions[:, first:last] = range(last - first)
    if not case.parts:
        return PICTURE, np.ones((1, 1, 1, 1), np.float32)
    return Segments(jnp.asarray(segments), jnp.asarray(positions), case.window), (segments > 0)[..., None, None]


def main() -> None:
    equal = True
    for case in CASES:
        found = check(case)
        equal &= found["equal"]
        far = ", ".join(f"{one:.1e}" for one in found["apart"])
        times = f"{found['seconds'] * 1e3:.2f} ms, portable {found['portable_seconds'] * 1e3:.2f} ms"
        print(f"{case.name}: {found['kernel']}, {'equal' if found['equal'] else 'NOT EQUAL'}, apart {far}; {times}", flush=True)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
