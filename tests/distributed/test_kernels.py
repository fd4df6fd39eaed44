"""Attention kernels: which one a mesh gets, and that they compute the same as XLA's."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # its check of cuDNN's version has no public name
from jax.sharding import Mesh

from deepstack_jax.config import MeshConfig
from deepstack_jax.model.attention import Segments, causal_segment_mask, dot_product
from deepstack_jax.parallel.kernels import CudnnAttention, SplashAttention, attention_for, kernel_for
from deepstack_jax.parallel.mesh import AXES, make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core import program as program_module
from tests.e2e.verb import REPOSITORY
from tests.unit.tiny import tiny_config

B, T, N, K, H = 2, 200, 4, 2, 64  # T is not a multiple of the 128 that a TPU's block holds


@dataclass(frozen=True)
class Chip:
    """As much of a device as a kernel is chosen by."""

    platform: str
    compute_capability: str = ""


def kernel_of(platform, config):
    return kernel_for(platform, config.train.compute_dtype, config.decoder.head_dim)


@pytest.mark.quick
def test_the_kernel_follows_the_devices_of_the_mesh_not_those_of_this_machine():
    def chosen(platform, **changes):
        mesh = Mesh(np.array([Chip(platform)]).reshape(1, 1, 1), AXES)
        config = tiny_config({key.replace("__", "."): value for key, value in changes.items()})
        return attention_for(kernel_of(mesh.devices.flat[0].platform, config), mesh, packed=config.data.packing.enabled)

    assert chosen("cpu") is dot_product
    assert isinstance(chosen("tpu"), SplashAttention)
    packed = {"data__packing__enabled": True, "data__packing__max_images": 3}
    for changes in ({}, packed):
        attention = chosen("gpu", train__compute_dtype="bfloat16", **changes)
        assert isinstance(attention, CudnnAttention)
        assert attention.packed == bool(changes)
    assert chosen("gpu") is dot_product, "cuDNN has no float32"


@pytest.fixture(scope="module")
def inputs():
    """q, k, v and segments: two and padding in row 0, one and padding in row 1."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    segments, positions = np.zeros((2, B, T), np.int32)
    for row, (first, last, number) in ((0, (0, 90, 1)), (0, (90, 180, 2)), (1, (0, 130, 1))):
        segments[row, first:last] = number
        positions[row, first:last] = range(last - first)
    return q, k, v, segments, positions


def attended(attend, inputs, window, dtype):
    """Outputs at tokens that are not padding, and the gradients of a sum that weighs them all differently."""
    q, k, v, segments, positions = inputs
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape) * (segments > 0)[..., None, None])

    def weighed(q, k, v):
        out = attend(q, k, v, Segments(segments, positions, window)).astype(jnp.float32) * (segments > 0)[..., None, None]
        return (out * weights).sum(), out

    run = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = run(*(jnp.asarray(x, dtype) for x in (q, k, v)))
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


@pytest.mark.parametrize("window", [0, 20])
def test_splash_attention_equals_xla(window, inputs):
    """In float32 to rounding; in bf16 as near to the exact values as XLA's own, 1e-3 apart on average."""
    mesh = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        emulated = SplashAttention(mesh, interpret=True)
        ours = {dtype: attended(emulated, inputs, window, dtype) for dtype in ("float32", "bfloat16")}
    exact, rounded = (attended(dot_product, inputs, window, dtype) for dtype in ("float32", "bfloat16"))
    for mine, truth in zip(ours["float32"], exact, strict=True):
        np.testing.assert_allclose(mine, truth, rtol=1e-4, atol=1e-5)
    for mine, theirs, truth in zip(ours["bfloat16"], rounded, exact, strict=True):
        assert np.abs(mine - theirs).mean() < 1e-3
        assert np.abs(mine - truth).mean() < 1.2 * np.abs(theirs - truth).mean() + 1e-5


@pytest.fixture(scope="module")
def single(inputs):
    """The same q, k, v, in rows of one segment: the first padded on the right, the second full."""
    q, k, v, _, _ = inputs
    places = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    segments = (places < [[130], [T]]).astype(np.int32)
    return q, k, v, segments, places * segments


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(("packed", "length"), [(False, T), (False, T - 1), (True, T), (True, T - 1)])
def test_what_cudnn_is_told_means_the_same_to_xla(packed, length, window, inputs, single):
    rows = [x[:, :length] for x in (inputs if packed else single)]
    mesh = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        told = attended(CudnnAttention(mesh, packed, implementation="xla"), rows, window, "float32")
    for mine, truth in zip(told, attended(dot_product, rows, window, "float32"), strict=True):
        np.testing.assert_allclose(mine, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(("packed", "length"), [(False, T), (False, T - 1), (True, T), (True, T - 1)])
def test_cudnn_equals_xla(packed, length, window, inputs, single):
    """On a GPU, in bf16: as near to the exact values as XLA's own."""
    try:
        gpu = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU here, or not with JAX_PLATFORMS=cpu,cuda")
    rows = [x[:, :length] for x in (inputs if packed else single)]
    with jax.default_device(gpu):
        ours = attended(CudnnAttention(make_mesh(MeshConfig(1, 1, 1), [gpu]), packed), rows, window, "bfloat16")
        rounded, exact = (attended(dot_product, rows, window, dtype) for dtype in ("bfloat16", "float32"))
    for mine, theirs, truth in zip(ours, rounded, exact, strict=True):
        assert np.abs(mine - truth).mean() < 1.2 * np.abs(theirs - truth).mean() + 1e-4


@pytest.mark.parametrize(("head_dim", "window"), [(128, 0), (96, 20)])
@pytest.mark.parametrize(("packed", "length"), [(False, T), (False, T - 1), (True, T), (True, T - 1)])
def test_cudnns_attention_and_its_gradient_lower_for_cuda(packed, length, head_dim, window, monkeypatch):
    """Heads of LLaMA and of Phi-3, over four devices; jax's own checks of shapes, without a GPU."""
    mesh = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k, v = (jax.ShapeDtypeStruct((B, length, heads, head_dim), jnp.bfloat16) for heads in (N, K, K))
    segments = jax.ShapeDtypeStruct((B, length), jnp.int32)

    def summed(q, k, v, segments, positions):
        return CudnnAttention(mesh, packed)(q, k, v, Segments(segments, positions, window)).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(summed, argnums=(0, 1, 2))).trace(q, k, v, segments, segments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernel = "fmhaScaleBiasSoftmax" if packed else "fmhaSoftmax"
    assert re.findall(r"custom_call @__cudnn\$(\w+)", text) == [kernel, f"{kernel}Backward"]
    told = set(re.findall(r"(mask_type|sliding_window_length)\W+(\w+)", text.replace("\\22", '"')))
    if packed:
        assert told == {("mask_type", "NO_MASK"), ("sliding_window_length", "0")}
    else:  # cuDNN counts the token itself
        assert told == {("mask_type", "CAUSAL"), ("sliding_window_length", str(window + 1 if window else 0))}


@pytest.mark.parametrize("packed", [False, True])
def test_the_step_lowers_for_cuda_with_the_kernel_in_it(packed, monkeypatch):
    """Forward, forward again in remat, and the gradient, on each of four devices."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(program_module, "kernel_for", lambda *_: "cudnn")  # the mesh is of CPUs
    changes = {"decoder.vocab_size": 64, "decoder.kv_heads": 2, "decoder.head_dim": 128, "train.compute_dtype": "bfloat16"}
    changes |= {"data.max_length": 64, "data.packing.enabled": packed} | ({"data.packing.max_images": 3} if packed else {})
    program = program_module.build_program(tiny_config(changes), make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4]), 10)
    with use_mesh(program.mesh):
        traced = program.jit_step().trace(program.abstract_state(), program.abstract_batch(8, 64))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernel = "fmhaScaleBiasSoftmax" if packed else "fmhaSoftmax"
    assert re.findall(r"custom_call @__cudnn\$(\w+)", text) == [kernel, kernel, f"{kernel}Backward"]
    assert "CustomSPMDPartitioning" not in text, "rows and heads would have to lie as jax hopes"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("capability", "head_dim", "kernel"),
    [("9.0", 256, "cudnn"), ("8.0", 128, "cudnn"), ("8.0", 256, "xla"), ("7.0", 128, "xla"), ("gfx942", 128, "xla")],
)
def test_gpus_whose_cudnn_has_no_such_attention_take_xlas(capability, head_dim, kernel, monkeypatch):
    config = tiny_config({"train.compute_dtype": "bfloat16", "decoder.head_dim": head_dim})
    assert kernel_of("gpu", config) == "cudnn", "planned on a machine without GPUs"
    monkeypatch.setattr(jax, "local_devices", lambda **_: [Chip("gpu", capability)])
    assert kernel_of("gpu", config) == kernel


def test_a_window_and_a_second_segment_change_something(inputs):
    """Or the comparison above would not see them."""
    q, k, v, segments, positions = inputs
    plain = attended(dot_product, inputs, 0, "float32")[0]
    assert np.abs(attended(dot_product, inputs, 20, "float32")[0] - plain).max() > 0.1
    joined = attended(dot_product, (q, k, v, np.minimum(segments, 1), positions), 0, "float32")[0]
    assert np.abs(joined - plain).max() > 0.1


@pytest.mark.quick
def test_masks_and_rows_that_do_not_lie_over_the_mesh_go_to_xla(inputs):
    """Decoding with a cache, and the single row that parameters are drawn with."""
    q, k, v, segments, positions = map(jnp.asarray, inputs)
    attend = SplashAttention(make_mesh(MeshConfig(8, 1, 1)))
    mask = causal_segment_mask(segments, positions)
    expected = dot_product(q, k, v, mask)
    np.testing.assert_array_equal(attend(q, k, v, mask), expected)
    np.testing.assert_array_equal(attend(q, k, v, Segments(segments, positions)), expected)
    np.testing.assert_array_equal(CudnnAttention(attend.mesh, packed=True)(q, k, v, mask), expected)


STEP = """
from jax.experimental import topologies
from deepstack_jax.config import MeshConfig
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core.program import build_program
from tests.unit.tiny import tiny_config

devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
sizes = {"vocab_size": 64, "kv_heads": 2, "head_dim": HEAD_DIM, "sliding_window": WINDOW}
config = tiny_config(
    {f"decoder.{key}": size for key, size in sizes.items()} | {"train.compute_dtype": "bfloat16", "data.max_length": 320}
)
program = build_program(config, make_mesh(MeshConfig(2, 1, 2), devices), 10)
with use_mesh(program.mesh):
    compiled = program.jit_step().lower(program.abstract_state(), program.abstract_batch(8, 320)).compile()
print("kernels", compiled.as_text().count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "window"), [(128, 0), (96, 64)])
def test_the_step_compiles_for_a_tpu_with_the_kernel_in_it(head_dim, window):
    """Heads of LLaMA and of Phi-3. Forward, forward again in remat, and two kernels of the gradient."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the package libtpu, the compiler for TPUs, is not installed: pip install -e '.[plan]'")
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    code = STEP.replace("HEAD_DIM", str(head_dim)).replace("WINDOW", str(window))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernels 4" in done.stdout
