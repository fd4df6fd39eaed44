"""The ideal that a compiled step's traffic is compared with, and what is kept beside it."""

import jax
import pytest

from benchmarks.collectives_table import ideal, numbers, row
from deepstack_jax.parallel.chips import CHIPS
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.plan.planner import Wanted, make_plan
from deepstack_jax.plan.topology import Machine
from deepstack_jax.train.core.program import build_program
from tests.unit.tiny import tiny_config

FROZEN_TOWER = {"optimizer.table": (("^vision_tower/", "frozen"), (".*", "default"))}


@pytest.mark.parametrize(("changes", "in_tower"), [({}, 2 * 2 + 4), (FROZEN_TOWER, 2)])
def test_the_ideal_gathers_twice_what_trains_and_scatters_it_once(changes, in_tower):
    config = tiny_config({"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "decoder.vocab_size": 64} | changes)
    program = build_program(config, make_mesh(config.mesh), 1)
    tower = sum(size for path, size in program.sizes.items() if path.startswith("vision_tower/"))
    others = sum(program.sizes.values()) - tower
    assert ideal(program) == 3 / 4 / 2 * (in_tower * tower + (2 * 2 + 4) * others)


def test_a_row_has_the_traffic_along_fsdp_apart_from_that_along_tensor():
    config = tiny_config({"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "decoder.vocab_size": 64})
    machine = Machine("test", tuple(jax.devices()), 1, "here", CHIPS["TPU v5"], 0.0)
    plan = make_plan(config, machine, Wanted(), compiled=False)
    found = numbers(plan, machine, config)
    assert found["bytes"] == sum(one.total for one in plan.collectives if one.source != "hidden states, estimated")
    assert found["others"] == sum(one.total for one in plan.collectives if one.source == "hidden states, estimated") > 0
    assert 0 < found["apart"] < found["bytes"]
    cells = row("L", "v5p:2x2x2", found).split("|")
    assert [cell.strip() for cell in cells[1:4]] == ["L", "v5p:2x2x2", "fsdp 4 x tensor 2"]
    assert len(cells) == 14
