"""A base in 8 or 4 bits under adapters: what is quantised, how far off it is, that it stays, and is never there whole."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepstack_jax.config import MeshConfig
from deepstack_jax.model.quantised import QuantisedKernel, pack, quantise, unpack
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.train.checkpoint.init_weights import first_state
from deepstack_jax.train.core.optimizer import flatten, unflatten
from deepstack_jax.train.core.program import Program, build_program
from tests.unit.lora import LORA
from tests.unit.test_lora_runs import config_over, weights  # noqa: F401
from tests.unit.tiny import example, make_batch, shapes_in, tiny_config

pytest.importorskip("qwix", reason="qwix is not installed: the extra `quantised` has it")
KINDS = (pytest.param("int8", marks=pytest.mark.slow), "nf4")


def program_of(overrides: dict, config=None, devices=1) -> Program:
    config = tiny_config(LORA | overrides) if config is None else config
    mesh = MeshConfig(1, devices, 1)
    return build_program(dataclasses.replace(config, mesh=mesh), make_mesh(mesh, jax.devices()[:devices]), steps=10)


def test_nf4_is_that_of_the_paper():
    """Codes of the values of appendix E of arXiv 2305.14314 give those values again; a block has its own scale."""
    table = np.float32([-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0])
    table = np.concatenate([table, [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]])
    kernel = jnp.asarray(np.concatenate([np.tile(table, 4), 3 * np.tile(table[::-1], 4)]).astype(np.float32)[None, :, None])
    found = quantise(kernel, 1, "nf4", packed=True)
    assert (found.codes.dtype, found.codes.shape, found.scales.shape) == (jnp.uint8, (1, 64, 1), (1, 2, 1))
    np.testing.assert_allclose(found.scales[0, :, 0], [1, 3])
    np.testing.assert_allclose(found.astype(jnp.float32), kernel, atol=1e-6)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("nf4", 0.11)])
@pytest.mark.parametrize("inputs", [1, 2])
def test_a_quantised_kernel_is_near_the_kernel(kind, error, inputs):
    kernel = jnp.asarray(np.random.default_rng(0).normal(0, 0.3, (3, 8, 128, 16)), jnp.float32)
    found = quantise(kernel, inputs, kind, packed=True)
    assert (found.shape, found.ndim) == (kernel.shape, 4)
    assert found.scales.shape == ((3, 8 // 8, 128, 16), (3, 8, 2, 16))[inputs - 1]
    assert found.codes.nbytes == kernel.size // (2 if kind == "nf4" else 1)
    again = found.astype(jnp.float32)
    assert 0 < jnp.linalg.norm(again - kernel) / jnp.linalg.norm(kernel) < error


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_two_codes_share_a_byte_and_come_apart_again(axis):
    codes = np.random.default_rng(0).integers(0, 16, (6, 4, 10)).astype(np.uint8)
    packed = pack(jnp.asarray(codes), axis)
    even, odd = (np.take(codes, range(start, codes.shape[axis], 2), axis) for start in (0, 1))
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, even + 16 * odd)
    np.testing.assert_array_equal(unpack(packed, axis), codes)


@pytest.mark.parametrize("inputs", [1, 2])
def test_a_packed_kernel_is_the_one_with_a_byte_for_each_code(inputs):
    kernel = jnp.asarray(np.random.default_rng(0).normal(0, 0.3, (2, 4, 6, 8)), jnp.float32)
    packed, apart = (quantise(kernel, inputs, "nf4", packed=flag) for flag in (True, False))
    assert (packed.codes.nbytes, apart.codes.nbytes) == (kernel.size // 2, kernel.size)
    np.testing.assert_array_equal(packed.astype(jnp.float32), apart.astype(jnp.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_gradient_are_those_of_the_kernel_as_an_array(kind):
    from deepstack_jax.model.layers import PLAIN, product

    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in ((2, 5, 64), (1, 64, 4, 8)))
    stack = quantise(kernel, 1, kind, packed=True)
    one = jax.tree.map(lambda leaf: leaf[0], stack)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(product(PLAIN, 1, jnp.float32, ("embed", "heads", "head_dim"), x, kernel)))

    for ours, theirs in zip(
        jax.value_and_grad(loss)(x, one), jax.value_and_grad(loss)(x, one.astype(jnp.float32)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    """(program, state before, state after two steps) of the tiny model."""
    program = program_of({"lora.base_dtype": request.param})
    batch = make_batch(program.config, [[example(program.config, 0, [(2, 2)])], [example(program.config, 1)]])
    before = first_state(program)
    state, step = before, jax.jit(program.step)
    for _ in range(2):
        state, metrics = step(state, batch)
        assert metrics["good"]
    return program, before, state


def test_the_kernels_of_the_decoder_are_quantised_and_stay_to_the_byte(trained):
    program, before, after = trained
    start, end = flatten(before.params), flatten(after.params)
    quantised = {path for path, leaf in start.items() if isinstance(leaf, QuantisedKernel)}
    assert quantised == {path for path in start if path.startswith("layers/layers/") and path.endswith("/kernel")}
    for path in program.base:
        assert path in quantised or start[path].dtype == jnp.bfloat16, path
        for ours, theirs in zip(jax.tree.leaves(start[path]), jax.tree.leaves(end[path]), strict=True):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), path
    moved = [path for path in start if path.endswith("lora_b") and np.any(np.asarray(end[path]))]
    assert len(moved) == len(program.adapted)
    abstract = program.abstract_state()
    described, real = ([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(one)] for one in (abstract, after))
    assert described == real


def test_adapters_learn_over_the_quantised_base_what_they_learn_over_the_same_numbers(trained):
    """The same step with the base dequantised beforehand."""
    program, before, after = trained
    plain = program_of({"lora.base_dtype": "float32"})
    batch = make_batch(program.config, [[example(program.config, 0, [(2, 2)])], [example(program.config, 1)]])
    params = {path: leaf.astype(jnp.float32) if path in program.base else leaf for path, leaf in flatten(before.params).items()}
    state, step = jax.jit(plain.begin)(unflatten(params)), jax.jit(plain.step)
    for _ in range(2):
        state, _ = step(state, batch)
    for path, leaf in flatten(state.params).items():
        if path not in program.base:
            np.testing.assert_allclose(flatten(after.params)[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("remat", ["block", "none"])
def test_no_kernel_is_there_for_all_layers_at_once(remat):
    """Of the whole step: nothing of a stacked kernel's shape is computed, or kept for the backward pass, in any float."""
    program = program_of({"lora.base_dtype": "nf4", "decoder.remat": remat, "decoder.mlp": 48})
    traced = program.jit_step().trace(program.abstract_state(), program.abstract_batch(8, 32)).jaxpr
    made = set(shapes_in(traced))
    for path, leaf in flatten(program.shapes).items():
        if path.startswith("layers/layers/") and path.endswith("/kernel"):
            assert tuple(leaf.shape[1:]) in made, path
            assert tuple(leaf.shape) not in made, path


def test_what_cannot_be_halved_on_the_mesh_is_not_packed():
    """The inputs of `down` lie along tensor, 21 on each of two devices."""
    config = tiny_config(LORA | {"lora.base_dtype": "nf4", "decoder.mlp": 42, "decoder.vocab_size": 64})
    mesh = MeshConfig(1, 1, 2)
    program = build_program(config, make_mesh(mesh, jax.devices()[:2]), steps=10)
    kernels = flatten(program.abstract_state().params)
    apart = {path for path, leaf in kernels.items() if isinstance(leaf, QuantisedKernel) and leaf.packed is None}
    assert apart == {path for path in kernels if path.endswith("/down/kernel")} != set()
    assert all(leaf.shape == flatten(program.shapes)[path].shape for path, leaf in kernels.items())


@pytest.mark.parametrize("devices", [1, 4])
def test_weights_are_quantised_as_they_are_read(weights, devices):  # noqa: F811
    config = config_over(weights, "nf4")
    program = program_of({}, config, devices)
    state = first_state(program)
    other = first_state(program_of({}, config_over(weights, "bfloat16")))
    assert int(state.base) == int(other.base)
    for path, leaf in flatten(state.params).items():
        if isinstance(leaf, QuantisedKernel):
            inputs = 2 if path.endswith("/o/kernel") else 1
            expected = jax.jit(partial(quantise, inputs=inputs, kind="nf4", packed=True))(flatten(other.params)[path])
            np.testing.assert_array_equal(leaf.codes, expected.codes, err_msg=path)
            np.testing.assert_array_equal(leaf.scales, expected.scales, err_msg=path)
            assert leaf.codes.sharding == flatten(program.shardings.params)[path].codes
        elif path in program.base:
            np.testing.assert_array_equal(leaf, flatten(other.params)[path], err_msg=path)
