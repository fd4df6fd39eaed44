"""Attention kernels: which one a mesh gets, and that they compute the same as XLA's."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # its check of cuDNN's version has no public name
from jax.sharding import Mesh

from benchmarks import attention_check
from deepstack_jax.config import MeshConfig
from deepstack_jax.model.attention import Everything, Segments, causal_segment_mask, dot_product
from deepstack_jax.model.decoder import REMAT
from deepstack_jax.parallel import cudnn
from deepstack_jax.parallel.kernels import CudnnAttention, Kernels, SplashAttention, attention_for, kernel_for, kernels_for
from deepstack_jax.parallel.mesh import AXES, make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core import program as program_module
from tests.distributed import emulated_cudnn
from tests.e2e.verb import REPOSITORY
from tests.unit.tiny import tiny_config

B, T, N, K, H = 2, 200, 4, 2, 64  # T is not a multiple of the 128 that a TPU's block holds


@dataclass(frozen=True)
class Chip:
    """As much of a device as a kernel is chosen by."""

    platform: str
    compute_capability: str = ""


@pytest.mark.quick
def test_the_kernel_follows_the_devices_of_the_mesh_not_those_of_this_machine():
    def chosen(platform, **changes):
        mesh = Mesh(np.array([Chip(platform)]).reshape(1, 1, 1), AXES)
        config = tiny_config({key.replace("__", "."): value for key, value in changes.items()} | {"decoder.head_dim": 8})
        kernels = kernels_for(mesh.devices.flat[0].platform, config)
        return [attention_for(kernel, mesh) for kernel in kernels]

    assert chosen("cpu") == [dot_product, dot_product]
    assert isinstance(chosen("tpu")[0], SplashAttention)
    pictures = [kernel_for("tpu", "bfloat16", 64, packed=False, picture=side**2) for side in (14, 24, 27)]
    assert pictures == ["xla", "splash", "splash"], "what is small is on the chip as it is"
    bfloat16 = {"train__compute_dtype": "bfloat16", "vision__width": 32, "vision__heads": 4}
    for packed in ({}, {"data__packing__enabled": True, "data__packing__max_images": 3}):
        decoder, tower = chosen("gpu", **bfloat16, **packed)
        assert isinstance(decoder, CudnnAttention)
        assert not decoder.masked
        assert isinstance(tower, CudnnAttention)
    assert chosen("gpu") == [dot_product, dot_product], "cuDNN has no float32"


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


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_the_towers_attention_equals_xla(kernel, inputs):
    """77 tokens of four pictures, one on each device: padded to a TPU's lanes, or to an even number."""
    mesh = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    attend = SplashAttention(mesh, interpret=True) if kernel == "splash" else CudnnAttention(mesh, implementation="xla")
    q, k, v = (jnp.asarray(x.reshape(4, 100, -1, H)[:, :77, :K], jnp.bfloat16) for x in inputs[:3])
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape))

    def run(attend):
        def weighed(q, k, v):
            out = attend(q, k, v, Everything(("crops", "vision_heads")))
            return (out * weights).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    for mine, theirs in zip(run(attend), run(dot_product), strict=True):
        assert np.abs(mine - theirs).mean() < 1e-3


FORMS = {"causal": {}, "packed": {"segments": 3}, "mask": {"segments": 3, "masked": True}}


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(("form", "length"), [("causal", T - 1), ("mask", T), ("mask", T - 1)])
def test_what_cudnn_is_told_means_the_same_to_xla(form, length, window, inputs, single):
    rows = [x[:, :length] for x in (single if form == "causal" else inputs)]
    mesh = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        told = attended(CudnnAttention(mesh, **FORMS[form], implementation="xla"), rows, window, "float32")
    for mine, truth in zip(told, attended(dot_product, rows, window, "float32"), strict=True):
        np.testing.assert_allclose(mine, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 20])
def test_packed_rows_as_cudnn_reads_them_equal_xla(window, inputs, monkeypatch):
    """Values and gradients in bf16, heads grouped, over four devices; offsets, lengths and strides are jax's own code's."""
    emulated_cudnn.install(monkeypatch)
    mesh = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    q, k, v, segments, positions = inputs
    wide = np.concatenate([q, -q], axis=2)  # four heads to a pair of keys and values, two on each device
    with jax.set_mesh(mesh):
        ours = attended(CudnnAttention(mesh, segments=3), (wide, k, v, segments, positions), window, "bfloat16")
    theirs = attended(dot_product, (wide, k, v, segments, positions), window, "bfloat16")
    for mine, rounded in zip(ours, theirs, strict=True):
        assert np.abs(mine - rounded).mean() < 2**-8 * np.abs(rounded).mean(), "one rounding"


def test_the_check_of_a_devices_kernels_sees_another_segment(monkeypatch):
    emulated_cudnn.install(monkeypatch)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    packed = CudnnAttention(mesh, segments=5)
    assert attention_check.check(attention_check.TINY[0], attend=packed, repeats=1)["equal"]
    for wrong in (CudnnAttention(mesh, implementation="xla"), CudnnAttention(mesh, segments=2)):
        assert not attention_check.check(attention_check.TINY[0], attend=wrong, repeats=0)["equal"]


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(
    ("form", "length"), [("causal", T), ("causal", T - 1), ("packed", T), ("packed", T - 1), ("mask", T - 1)]
)
def test_cudnn_equals_xla(form, length, window, inputs, single):
    """On a GPU, in bf16: as near to the exact values as XLA's own."""
    try:
        gpu = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU here, or not with JAX_PLATFORMS=cpu,cuda")
    if form == "packed" and int(gpu.compute_capability.split(".")[0]) < 9:
        pytest.skip(f"a GPU of compute capability {gpu.compute_capability}; packed rows want 9.0")
    rows = [x[:, :length] for x in (single if form == "causal" else inputs)]
    with jax.default_device(gpu):
        attend = CudnnAttention(make_mesh(MeshConfig(1, 1, 1), [gpu]), **FORMS[form])
        ours = attended(attend, rows, window, "bfloat16")
        rounded, exact = (attended(dot_product, rows, window, dtype) for dtype in ("bfloat16", "float32"))
    for mine, theirs, truth in zip(ours, rounded, exact, strict=True):
        assert np.abs(mine - truth).mean() < 1.2 * np.abs(theirs - truth).mean() + 1e-4


def told(text):
    """What the calls of cuDNN in a lowered program say of masks."""
    keys = "mask_type|sliding_window_length|max_seg_per_batch"
    return set(re.findall(rf"({keys})\W+(\w+)", text.replace("\\22", '"')))


@pytest.fixture
def hopper(monkeypatch):
    """jax's own checks of shapes, for a GPU that is not here."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)


@pytest.mark.parametrize(("head_dim", "window"), [(128, 0), (96, 20)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("hopper")
def test_cudnns_attention_and_its_gradient_lower_for_cuda(form, head_dim, window):
    """Heads of LLaMA and of Phi-3, an odd length, over four devices."""
    mesh, length = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4]), T - 1
    q, k, v = (jax.ShapeDtypeStruct((B, length, heads, head_dim), jnp.bfloat16) for heads in (N, K, K))
    segments = jax.ShapeDtypeStruct((B, length), jnp.int32)

    def summed(q, k, v, segments, positions):
        attend = CudnnAttention(mesh, **FORMS[form])
        return attend(q, k, v, Segments(segments, positions, window)).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(summed, argnums=(0, 1, 2))).trace(q, k, v, segments, segments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernel = "fmhaScaleBiasSoftmax" if form == "mask" else "fmhaSoftmax"
    assert re.findall(r"custom_call @__cudnn\$(\w+)", text) == [kernel, f"{kernel}Backward"]
    inside = window + 1 if window and form != "mask" else 0  # cuDNN counts the token itself
    assert told(text) == {
        ("mask_type", "PADDING_CAUSAL" if form == "packed" else "CAUSAL"),
        ("sliding_window_length", str(inside)),
        ("max_seg_per_batch", "3" if form == "packed" else "1"),
    }
    assert (f"tensor<1x1x{T}x{T}x" in text) == (form == "mask"), "a mask of T x T for every row"


@pytest.mark.parametrize(("form", "calls"), [("causal", 2), ("packed", 2), ("mask", 2), ("splash", 3)])
@pytest.mark.usefixtures("hopper")
def test_minimal_remat_runs_attention_forward_once(form, calls):
    """Policies see what is within shard_map and custom gradients; splash attention's gradient is two kernels."""
    mesh = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    q, k, v = (jax.ShapeDtypeStruct((B, 128, heads, H), jnp.bfloat16) for heads in (N, K, K))
    segments = jax.ShapeDtypeStruct((B, 128), jnp.int32)
    attend = SplashAttention(mesh) if form == "splash" else CudnnAttention(mesh, **FORMS[form])

    def kernels(policy):
        @partial(jax.checkpoint, policy=policy)
        def block(q, k, v, segments, positions):
            return attend(jnp.sin(q), k, v, Segments(segments, positions))

        def summed(*given):
            return jnp.cos(block(*given)).astype(jnp.float32).sum()

        with jax.set_mesh(mesh):
            traced = jax.jit(jax.grad(summed, argnums=(0, 1, 2))).trace(q, k, v, segments, segments)
            text = traced.lower(lowering_platforms=("tpu" if form == "splash" else "cuda",)).as_text()
        return len(re.findall(r"custom_call @(__cudnn|tpu_custom_call)", text))

    assert (kernels(REMAT["minimal"]), kernels(REMAT["block"])) == (calls, calls + 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("hopper")
def test_the_step_lowers_for_cuda_with_the_kernels_in_it(packed, monkeypatch):
    """On each of four devices: both forward, then of the decoder and of the tower forward again in remat, and the gradient."""
    monkeypatch.setattr(program_module, "kernels_for", lambda *_: Kernels("cudnn", "cudnn"))  # the mesh is of CPUs
    changes = {"decoder.vocab_size": 64, "decoder.kv_heads": 2, "decoder.head_dim": 128, "train.compute_dtype": "bfloat16"}
    changes |= {"vision.width": 32, "vision.heads": 4}
    changes |= {"data.max_length": 64, "data.packing.enabled": packed} | ({"data.packing.max_images": 3} if packed else {})
    program = program_module.build_program(tiny_config(changes), make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4]), 10)
    with use_mesh(program.mesh):
        traced = program.jit_step().trace(program.abstract_state(), program.abstract_batch(8, 64))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = ["fmhaSoftmax"] * 2 + ["fmhaSoftmax", "fmhaSoftmaxBackward"] * 2
    assert re.findall(r"custom_call @__cudnn\$(\w+)", text) == kernels
    assert ("mask_type", "PADDING") in told(text), "the tower's five tokens, and one to make them even"
    assert ("mask_type", "PADDING_CAUSAL" if packed else "CAUSAL") in told(text)
    assert "CustomSPMDPartitioning" not in text, "rows and heads would have to lie as jax hopes"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("capability", "head_dim", "kernel", "packed"),
    [
        ("12.0", 128, "cudnn", "cudnn"),
        ("9.0", 256, "cudnn", "cudnn"),
        ("8.0", 128, "cudnn", "cudnn_mask"),
        ("8.0", 256, "xla", "xla"),
        ("7.0", 128, "xla", "xla"),
        ("gfx942", 128, "xla", "xla"),
    ],
)
def test_gpus_whose_cudnn_has_no_such_attention_take_another(capability, head_dim, kernel, packed, monkeypatch):
    changes = {"train.compute_dtype": "bfloat16", "decoder.head_dim": head_dim}
    plain, several = (
        tiny_config(changes | more) for more in ({}, {"data.packing.enabled": True, "data.packing.max_images": 3})
    )
    assert kernels_for("gpu", several).decoder == "cudnn", "planned on a machine without GPUs"
    monkeypatch.setattr(jax, "local_devices", lambda **_: [Chip("gpu", capability)])
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    assert (kernels_for("gpu", plain).decoder, kernels_for("gpu", several).decoder) == (kernel, packed)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90500)
    assert kernels_for("gpu", several).decoder != "cudnn", "an older cuDNN has no packed form"


@pytest.mark.quick
def test_a_jax_that_has_moved_the_packed_form_is_not_asked_for_it(monkeypatch):
    assert cudnn.has_packed_form(91000)
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", lambda q, k, v, mask_type, offsets: q)
    assert not cudnn.has_packed_form(91000)
    monkeypatch.setitem(sys.modules, "jax._src.cudnn.fused_attention_stablehlo", None)
    assert not cudnn.has_packed_form(91000)
    assert cudnn.installed_cudnn() == 0


@pytest.mark.quick
def test_segments_begin_where_ids_change_and_padding_is_one():
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0], [0, 0, 7, 7, 1, 0]])
    starts, lengths = cudnn.spans(ids, 4)
    assert starts.tolist() == [[0, 2, 5, -1], [0, -1, -1, -1], [0, -1, -1, -1], [0, 1, 2, 3], [0, 2, 4, 5]]
    assert lengths.tolist() == [[2, 3, 1, -1], [6, -1, -1, -1], [6, -1, -1, -1], [1, 1, 1, 3], [2, 2, 1, 1]]


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
    np.testing.assert_array_equal(CudnnAttention(attend.mesh, segments=3)(q, k, v, mask), expected)
    np.testing.assert_array_equal(attend(q, k, v, Everything(("crops", "vision_heads"))), dot_product(q, k, v, None))


STEP = """
from jax.experimental import topologies
from deepstack_jax.config import MeshConfig
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core.program import build_program
from tests.unit.tiny import tiny_config

devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
sizes = {"vocab_size": 64, "kv_heads": 2, "head_dim": HEAD_DIM, "sliding_window": WINDOW, "remat": "REMAT"}
config = tiny_config(
    {f"decoder.{key}": size for key, size in sizes.items()} | {"train.compute_dtype": "bfloat16", "data.max_length": 320}
)
program = build_program(config, make_mesh(MeshConfig(2, 1, 2), devices), 10)
with use_mesh(program.mesh):
    compiled = program.jit_step().lower(program.abstract_state(), program.abstract_batch(8, 320)).compile()
print("kernels", compiled.as_text().count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "window", "remat", "kernels"), [(128, 0, "block", 4), (96, 64, "minimal", 3)])
def test_the_step_compiles_for_a_tpu_with_the_kernels_in_it(head_dim, window, remat, kernels):
    """Heads of LLaMA and of Phi-3. Forward, forward again in remat, and two kernels of the gradient."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the package libtpu, the compiler for TPUs, is not installed: pip install -e '.[plan]'")
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    code = STEP.replace("HEAD_DIM", str(head_dim)).replace("WINDOW", str(window)).replace("REMAT", remat)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"kernels {kernels}" in done.stdout
