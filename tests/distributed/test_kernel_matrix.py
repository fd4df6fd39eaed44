"""Every kernel over every kind of row, in bfloat16: values and gradients are the portable kernel's, by emulation on a CPU."""

import itertools
from functools import cache

import jax
import pytest

from benchmarks.attention_check import Case, both_ways, compare
from deepstack_jax.config import MeshConfig
from deepstack_jax.model.attention import dot_product
from deepstack_jax.parallel.kernels import CudnnAttention, SplashAttention
from deepstack_jax.parallel.mesh import make_mesh
from tests.distributed import emulated_cudnn

LENGTH, HEADS = 37, 4  # padded to a TPU's lanes and to an even number
SEGMENTS = 4  # three and the padding
KERNELS = {
    "splash": lambda mesh: SplashAttention(mesh, interpret=True),
    "cudnn, one example": lambda mesh: CudnnAttention(mesh, implementation="xla"),
    "cudnn, packed": lambda mesh: CudnnAttention(mesh, segments=SEGMENTS),
    "cudnn, mask": lambda mesh: CudnnAttention(mesh, segments=SEGMENTS, masked=True, implementation="xla"),
}
ROWS = {"packed": (3, 2, 4), "one": (8,), "full": (10,)}
WINDOWS, KV_HEADS = (0, 6), (HEADS, 2, 1)
QUICK = {  # at least one of everything
    ("splash", "packed", 6, 2),
    ("splash", "full", 0, 4),
    ("cudnn, one example", "one", 6, 1),
    ("cudnn, packed", "packed", 6, 4),
    ("cudnn, packed", "one", 0, 2),
    ("cudnn, mask", "packed", 0, 2),
}
CASES = [
    pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow, id=", ".join(map(str, one)))
    for one in itertools.product(KERNELS, ROWS, WINDOWS, KV_HEADS)
    if one[:2] != ("cudnn, one example", "packed")  # it is for rows of one example
]


@cache
def portable(case: Case, dtype: str):
    return both_ways(dot_product, case, dtype, 0)[0]


@pytest.mark.parametrize(("kernel", "rows", "window", "kv_heads"), CASES)
def test_values_and_gradients_are_the_portable_kernels(kernel, rows, window, kv_heads, monkeypatch):
    emulated_cudnn.install(monkeypatch)
    case = Case("", 2, LENGTH, HEADS, kv_heads, 16, ROWS[rows], window)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        mine, _ = both_ways(KERNELS[kernel](mesh), case, "bfloat16", 0)
        found = compare(mine, portable(case, "bfloat16"), portable(case, "float32"))
    assert found["equal"], found
