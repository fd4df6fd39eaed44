"""Adapters over every family: a step trains them and nothing else, in the bytes that a plan says; PEFT's files out and in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepstack_jax.config import MeshConfig
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.plan.memory import state_memory
from deepstack_jax.train.core.optimizer import FROZEN, flatten, unflatten
from deepstack_jax.train.core.program import build_program
from deepstack_jax.weights.adapters import adapter_paths
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.peft import read_peft, write_peft
from tests.unit.lora import LORA
from tests.unit.test_peft import draw_adapter
from tests.unit.tiny import FAMILIES, draw_params, example, make_batch, tiny_config

# One in the short suite.
CASES = [pytest.param(name, marks=[pytest.mark.slow] * (at > 0)) for at, name in enumerate(FAMILIES)]


@pytest.mark.parametrize("name", CASES)
def test_steps_train_the_adapters_alone_in_the_planned_bytes(name):
    config = tiny_config(FAMILIES[name] | LORA)
    program = build_program(config, make_mesh(MeshConfig(), jax.devices()[:1]), steps=10)
    batch = jax.tree.map(jnp.asarray, make_batch(config, [[example(config, 0, [(2, 2)])], [example(config, 1)]]))
    base = {path: leaf for path, leaf in flatten(draw_params(program.shapes)).items() if "/lora_" not in path}
    state = jax.jit(program.begin)(unflatten(base | program.draw_adapters(jax.random.key(0))))
    before = {path: np.asarray(leaf) for path, leaf in flatten(state.params).items()}
    with use_mesh(program.mesh):
        step = program.jit_step().lower(state, batch).compile()
    given = step.memory_analysis()
    counters = 4 * 4  # step, bad_steps, bad_in_a_row and the base's checksum
    planned = (
        sum(state_memory(program, 2, 32)) + counters - program.abstract_batch(2, 32).example_id.size * 4
    )  # which nothing reads
    assert given is not None
    assert given.argument_size_in_bytes == planned
    for _ in range(2):  # the first moves lora_b alone: it was zero
        state, metrics = step(state, batch)
        assert metrics["good"]
    after = flatten(state.params)
    moved = {path for path, leaf in before.items() if leaf.tobytes() != np.asarray(after[path]).tobytes()}
    kernels = {
        path for path in before if path.startswith(("layers/layers/", "vision_tower/layers/")) and path.endswith("/kernel")
    }
    assert set(program.adapted) == kernels
    assert moved <= {path for path, group in program.groups.items() if group != FROZEN}
    for kernel in kernels:
        assert set(adapter_paths(kernel)[:2]) <= moved, kernel


@pytest.mark.parametrize("form", ["peft", "peft-llava-hf"])
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_out_and_in(name, form, tmp_path):
    """Of every linear map of decoder and tower, under the module names of transformers."""
    config = tiny_config(FAMILIES[name])
    adapter = draw_adapter(config, base=0x1234ABCD)
    adapted = {path.removesuffix("/lora_a") for path in adapter.leaves}
    kernels = {path.removesuffix("/kernel") for path in NameTable(config).leaves if path.endswith("/kernel")}
    assert kernels - adapted == {"projector/fc1", "projector/fc2"}, "which are whole"
    assert ("head/lora_a" in adapter.leaves) is not config.decoder.tied_head
    write_peft(tmp_path, adapter, config, form)
    found = read_peft(tmp_path, config)
    assert found.base == adapter.base
    assert found.leaves.keys() == adapter.leaves.keys()
    for path, leaf in adapter.leaves.items():
        np.testing.assert_array_equal(found.leaves[path], leaf, err_msg=path)
