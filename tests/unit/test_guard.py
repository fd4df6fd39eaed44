"""What the main recipes' steps cost is what benchmarks/results/guard.json keeps, and what makes them cost more is seen."""

import json

import jax
import pytest

from benchmarks import guard
from deepstack_jax.model import attention
from deepstack_jax.parallel import kernels
from deepstack_jax.parallel.fsdp import ExplicitFsdp

KEPT = json.loads(guard.FILE.read_text())
HOW = "if it is meant to: python -m benchmarks.guard --write, and say why in the commit"


def moved(name: str) -> list[str]:
    now = {"jax": jax.__version__, "traced": {name: guard.traced(guard.program_of(guard.recipe(name)))}}
    return guard.moved(KEPT | {"traced": {name: KEPT["traced"][name]}}, now)


@pytest.mark.parametrize("name", guard.RECIPES)
def test_the_full_size_step_costs_what_it_did(name):
    assert moved(name) == [], HOW


def test_a_step_that_costs_more_is_seen(monkeypatch):
    """The same result with attention computed twice, and gradients added up whole; one program, as each takes seconds."""

    def whole(self, gradient, at):
        summed, size = jax.lax.psum(gradient, "fsdp"), gradient.shape[at] // guard.DEVICES
        return jax.lax.dynamic_slice_in_dim(summed, jax.lax.axis_index("fsdp") * size, size, at)

    once = attention.dot_product
    monkeypatch.setattr(kernels, "dot_product", lambda *args: (once(*args) + once(*args)) / 2)
    monkeypatch.setattr(ExplicitFsdp, "_scatter", whole)
    lines = moved("L")
    assert any("/flops" in line for line in lines), lines
    assert any("all-reduce/bytes: 0 ->" in line for line in lines), lines
    assert any("reduce-scatter/bytes" in line and "-> 0" in line for line in lines), lines


def test_numbers_of_operations_and_collectives_are_compared_under_the_jax_that_wrote_them():
    one = {"jax": "1", "operations": 10, "collectives": {"all-gather": {"count": 10, "bytes": 100.0}}}
    more = {"jax": "1", "operations": 20, "collectives": {"all-gather": {"count": 20, "bytes": 200.0}}}
    assert len(guard.moved(one, more)) == 3
    assert guard.moved(one, more | {"jax": "2"}) == ["collectives/all-gather/bytes: 100 -> 200 (+100.0%)"]
