"""Products in 8 bits: what is rounded, to what, in which arrays, and on which devices."""

import dataclasses
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh

from deepstack_jax.config import MeshConfig
from deepstack_jax.errors import ConfigError
from deepstack_jax.model.fp8 import FP8
from deepstack_jax.model.layers import PLAIN, product
from deepstack_jax.parallel.chips import CHIPS
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.mesh import AXES, make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.plan.planner import Wanted, make_plan
from deepstack_jax.plan.roofline import at_peak
from deepstack_jax.plan.topology import open_machine
from deepstack_jax.train.core.optimizer import flatten
from deepstack_jax.train.core.program import build_program, rounding_for
from deepstack_jax.train.flops import step_flops
from tests.unit.lora import ADAMW, LORA
from tests.unit.tiny import draw_params, example, make_batch, tiny_config

CODES = {"value": ml_dtypes.float8_e4m3fn, "gradient": ml_dtypes.float8_e5m2}
FEW = {"decoder.layers": 2, "decoder.vocab_size": 62, "vision.layers": 2, "data.max_images": 1}
IN_FP8 = FEW | {"train.matmul": "fp8"}


@pytest.mark.quick
@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("size", [1e-12, 1.0, 448.0, 3e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_those_of_the_8_bit_dtype_times_a_power_of_two(name, size, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 50)) * size, dtype)
    found = np.asarray(getattr(FP8, name)(x, dtype), np.float64)
    exact = np.asarray(x, np.float64)
    most = float(ml_dtypes.finfo(CODES[name]).max)
    scale = 2.0 ** (np.floor(np.log2(np.abs(exact).max())) + 1 - np.floor(np.log2(most)))
    np.testing.assert_array_equal(found, (exact / scale).astype(CODES[name]).astype(np.float64) * scale)
    assert most / 4 < np.abs(exact).max() / scale < most


@pytest.mark.quick
@pytest.mark.parametrize("name", CODES)
def test_zeros_stay_zero_and_what_is_not_finite_stays_so(name):
    narrow = getattr(FP8, name)
    np.testing.assert_array_equal(narrow(jnp.zeros(4), jnp.bfloat16), np.zeros(4))
    for bad in (np.nan, np.inf):
        assert not jnp.isfinite(narrow(jnp.asarray([1.0, bad, 2.0]), jnp.bfloat16)[1])


def gradients(rounding, x, kernel):
    def loss(x, kernel):
        return jnp.sin(product(rounding, 2, jnp.bfloat16, ("heads", "head_dim", "embed"), x, kernel).astype(jnp.float32)).sum()

    return jax.grad(loss, (0, 1))


def test_gradients_point_where_those_of_bfloat16_do_and_lower_to_the_pattern_that_gpus_rewrite():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 64, 4, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(4, 16, 32)) / 8, jnp.float32)
    ours, theirs = (jax.jit(gradients(rounding, x, kernel))(x, kernel) for rounding in (FP8, PLAIN))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        a, b = (np.asarray(array, np.float32).ravel() for array in (one, other))
        assert 0.99 < a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) < 1
    text = jax.jit(gradients(FP8, x, kernel)).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    text = text.split("func.func private")[0]  # the names of values begin anew in every function
    made = dict(re.findall(r"(%\w+) = (.*)", text))
    dots = re.findall(r"= stablehlo.dot_general (%\w+), (%\w+),.*-> tensor<[\dx]+x(\w+)>", text)

    def code(operand: str) -> str:
        """The 8-bit dtype of an operand that is its codes, widened, times a scale that is spread over them."""
        wide, scale = re.findall(r"%\w+", made[operand].removeprefix("stablehlo.multiply"))
        assert made[scale].startswith("stablehlo.broadcast_in_dim")
        assert made[wide].startswith("stablehlo.convert")
        return re.findall(r"x(f8\w+)>\) ->", made[wide])[0]

    value, gradient = "f8E4M3FN", "f8E5M2"
    assert [(code(a), code(b), out) for a, b, out in dots] == [
        (value, value, "bf16"),
        (gradient, value, "bf16"),
        (value, gradient, "f32"),
    ]


def program_of(changes, mesh=(1, 1, 1)):
    sizes = MeshConfig(*mesh)
    return build_program(tiny_config(changes), make_mesh(sizes, jax.devices()[: int(np.prod(mesh))]), steps=10)


def batch_of(program):
    rows = [[example(program.config, row, [(2, 2)] if row % 2 else [])] for row in range(8)]
    made = make_batch(program.config, rows, length=20)
    return made._replace(example_id=made.example_id.astype(np.int32))


def test_only_the_kernels_of_the_decoder_s_layers_are_rounded_and_only_in_training():
    program, plain = program_of(IN_FP8), program_of(FEW)
    state, batch = plain.abstract_state(), batch_of(plain)
    text = str(jax.make_jaxpr(program.step)(state, batch))
    kernels = {tuple(map(int, found.split(","))) for found in re.findall(r"f8_e4m3fn\[([\d,]+)\]", text)}
    activations = {shape for shape in kernels if shape[:2] == (8, 20)}
    of_layers = {
        shape.shape[1:] for path, shape in flatten(plain.shapes).items() if re.search("^layers/layers/.*kernel$", path)
    }
    assert kernels - activations == of_layers
    assert activations == {(8, 20, 32), (8, 20, 4, 8), (8, 20, 40)}
    assert "f8_e5m2" in text
    assert "f8_" not in str(jax.make_jaxpr(plain.step)(state, batch))
    evaluated = [str(jax.make_jaxpr(one.loss)(state.params, batch)) for one in (program, plain)]
    assert "f8_" not in evaluated[0]
    assert re.sub(r"0x\w+", "", evaluated[0]) == re.sub(r"0x\w+", "", evaluated[1])


def stepped(changes, mesh=(1, 1, 1)):
    """(loss of the first step, parameters after it, what has moved)."""
    program = program_of(changes, mesh)
    with use_mesh(program.mesh):
        params = draw_params(program.shapes)
        state = jax.device_put(program.begin(params), program.shardings)
        before = jax.device_get(flatten(state.params))
        state, numbers = program.jit_step()(state, put_batch(program.mesh, batch_of(program)))
    after = jax.device_get(flatten(state.params))
    return float(numbers["loss"]), {path: after[path] - leaf for path, leaf in before.items()}


SLOW = ADAMW | {"lr": 100.0, "eps": 1e3, "b1": 0.0, "weight_decay": 0.0}  # steps in proportion to gradients
DESCENT = {"optimizer.groups": {"default": SLOW}}
ADAPTED = LORA | {"optimizer.groups": {"default": SLOW | {"lora": False}, "adapters": SLOW | {"lora": True}}}


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        ({}, (1, 1, 1)),
        pytest.param({"train.accumulation": 2, "decoder.remat": "dots"}, (2, 2, 2), marks=pytest.mark.slow),
        pytest.param(ADAPTED, (2, 2, 2), marks=pytest.mark.slow),
    ],
    ids=["one device", "2x2x2", "LoRA"],
)
def test_a_step_is_near_that_of_bfloat16_and_the_same_on_every_mesh(changes, mesh):
    near = DESCENT | changes
    loss, moved = stepped(IN_FP8 | near, mesh)
    plain, expected = stepped(FEW | near, mesh)
    assert 0 < abs(loss / plain - 1) < 0.02
    a, b = (np.concatenate([leaf.ravel() for leaf in one.values()]) for one in (moved, expected))
    assert 0.95 < a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) < 1
    if mesh != (1, 1, 1):
        one, _ = stepped(IN_FP8 | near)
        assert loss == pytest.approx(one, rel=1e-4)


@dataclass(frozen=True)
class Device:
    """As much of one as the choice depends on."""

    platform: str
    device_kind: str
    compute_capability: str = ""


@pytest.mark.quick
@pytest.mark.parametrize(
    ("device", "able"),
    [
        (Device("cpu", "cpu"), True),
        (Device("gpu", "NVIDIA H100 80GB HBM3", "9.0"), True),
        (Device("gpu", "NVIDIA L4", "8.9"), True),
        (Device("gpu", "NVIDIA Thing", "12.1"), True),
        (Device("gpu", "NVIDIA A100-SXM4-80GB", "8.0"), False),
        (Device("gpu", "AMD Instinct MI300X", "gfx942"), False),
        (Device("tpu", "TPU v5"), False),
        (Device("tpu", "TPU7x"), False),
    ],
    ids=lambda value: getattr(value, "device_kind", ""),
)
def test_devices_without_such_products_are_told_at_once(device, able):
    config, mesh = tiny_config(IN_FP8), Mesh(np.array([device]).reshape(1, 1, 1), AXES)
    if able:
        assert rounding_for(config, mesh) is FP8
    else:
        with pytest.raises(
            ConfigError, match=f"^config.train.matmul='fp8': {device.device_kind} has no products in fp8; these"
        ):
            rounding_for(config, mesh)
    assert rounding_for(tiny_config(FEW), mesh) is PLAIN


def test_a_plan_counts_fp8_against_its_own_peak():
    config, chip = tiny_config(IN_FP8), CHIPS["NVIDIA H100 80GB HBM3"]
    assert chip.fp8 == pytest.approx(2 * chip.flops, rel=0.01)
    flops = {"decoder": 3e15, "head": 1e15}
    assert at_peak(config, chip, flops) == pytest.approx(3e15 / chip.fp8 + 1e15 / chip.flops)
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, matmul="compute_dtype"))
    assert at_peak(plain, chip, flops) == pytest.approx(4e15 / chip.flops)
    with pytest.raises(ConfigError, match=r"^config.train.matmul='fp8': gpu:1xA100 has no products in fp8; these have: .*H100"):
        make_plan(config, open_machine("gpu:1xA100"), Wanted(), compiled=False)


def test_a_plan_counts_adapters_as_they_are_multiplied():
    """By the sizes of the kernels: gradients flow through frozen ones to their inputs, and to both matrices of an adapter."""
    config, chip = tiny_config(IN_FP8 | LORA | {"decoder.remat": "none"}), CHIPS["NVIDIA H100 80GB HBM3"]
    cfg, tokens = config.decoder, 8 * 16
    program = build_program(config, make_mesh(MeshConfig(), jax.devices()[:1]), 10)
    flops = {part.name: part for part in step_flops(config, program.groups, 8, 16).parts}
    queries, keys = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    kernels = [(cfg.width, queries), (cfg.width, keys), (cfg.width, keys), (queries, cfg.width)]
    kernels += [(cfg.width, cfg.mlp)] * 2 + [(cfg.mlp, cfg.width)]
    in_fp8 = 2 * (2 * tokens * cfg.layers * sum(a * b for a, b in kernels))
    assert flops["decoder"].executed == pytest.approx(in_fp8)
    tower = config.vision
    views = 8 * config.data_spec.crop_slots * (config.patch_side**2 + 1) * tower.layers_run
    beside = tokens * cfg.layers * sum(a + b for a, b in kernels)
    in_tower = views * (4 * 2 * tower.width + 2 * (tower.width + tower.mlp))
    assert flops["adapters"].executed == pytest.approx(3 * 2 * config.lora.rank * (beside + in_tower))
    executed = {name: part.executed for name, part in flops.items()}
    rest = sum(executed.values()) - in_fp8
    assert at_peak(config, chip, executed) == pytest.approx(in_fp8 / chip.fp8 + rest / chip.flops)
