"""What a plan says of adapters and of a quantised base: the compiled step's bytes, and that a 7B fits one card."""

import importlib.util
import re
from typing import Any

import jax
import pytest

from deepstack_jax.config import MeshConfig, build_config
from deepstack_jax.parallel.chips import GIB
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.plan.compile import Compiled, compile_step
from deepstack_jax.plan.memory import state_memory
from deepstack_jax.plan.planner import Wanted, make_plan
from deepstack_jax.plan.topology import open_machine
from deepstack_jax.train.core.optimizer import FROZEN
from deepstack_jax.train.core.program import Program, build_program
from tests.unit.lora import LORA
from tests.unit.tiny import tiny_config

NO_QWIX = importlib.util.find_spec("qwix") is None
quantised = pytest.mark.skipif(NO_QWIX, reason="qwix is not installed: the extra `quantised` has it")
KINDS = ["bfloat16", pytest.param("int8", marks=quantised), pytest.param("nf4", marks=quantised)]
ROWS, LENGTH = 8, 16


def compiled(overrides: dict[str, Any]) -> tuple[Program, Compiled]:
    config = tiny_config(LORA | overrides)
    program = build_program(config, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), steps=10)
    result = compile_step(program, ROWS, LENGTH)
    assert isinstance(result, Compiled)
    return program, result


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_has_the_bytes_of_the_compiled_step(kind):
    program, result = compiled({"lora.base_dtype": kind})
    own = state_memory(program, ROWS, LENGTH)
    counters = 4 * 4  # step, bad_steps, bad_in_a_row and the base's checksum
    unread = program.abstract_batch(ROWS, LENGTH).example_id
    assert result.arguments == sum(own) + counters - unread.size * 4
    elements = {path: size for path, size in program.sizes.items() if program.groups[path] != FROZEN}
    assert own.optimizer == pytest.approx(2 * 4 * sum(elements.values()), abs=64), "moments of what trains, and counts"


@quantised
def test_the_compiled_step_never_has_the_decoders_kernels_whole():
    deep = {"decoder.layers": 24, "decoder.mlp": 256, "lora.rank": 1}
    program, ours = compiled(deep | {"lora.base_dtype": "nf4"})
    _, theirs = compiled(deep | {"lora.base_dtype": "bfloat16"})
    kernels = re.compile(r"layers/layers/.*/kernel$")
    whole = sum(2 * size for path, size in program.sizes.items() if kernels.match(path))
    assert ours.temporaries - theirs.temporaries < whole / 4


@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 40), pytest.param("nf4", 22, marks=quantised)])
def test_7b_fits_one_card(kind, most):
    """Rank 64, rows of 2048 positions, packed, the batch by accumulation."""
    values = importlib.import_module("configs.llava15").get_config("finetune")
    values.optimizer.table = ((r"^layers/.*/kernel$", "lora"), (r"^projector/", "projector"), (r".*", FROZEN))
    values.optimizer.groups = {"lora": {"lora": True, "lr": 2e-4}, "projector": {"lr": 2e-5}}
    values.lora.rank, values.lora.base_dtype = 64, kind
    values.data.packing.enabled = True
    values.train.batch_size = values.train.accumulation = 16
    values.mesh.data, values.mesh.fsdp = 1, 1
    config = build_config(values)
    assert (config.data.max_length, config.decoder.width, config.decoder.layers) == (2048, 4096, 32)
    plan = make_plan(config, open_machine("gpu:1xH100"), Wanted(per_row=1.0), compiled=False)
    assert plan.used <= most * GIB
    assert plan.accumulation == plan.load.rows == 16
