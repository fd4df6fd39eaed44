"""How a step grows, on a small model: orders are slopes, and those of the parts are what they should be."""

import jax
import pytest

from benchmarks.growth import CURVES, Curve, Expected, Point, draw, measure, order, orders_table, points_table
from deepstack_jax.parallel.chips import CHIPS
from deepstack_jax.plan.topology import Machine
from tests.unit.tiny import tiny_config

BASE = {"mesh.data": 1, "mesh.fsdp": -1, "decoder.vocab_size": 64, "data.max_images": 1, "data.max_length": 64}


def simulated(chips: int) -> Machine:
    return Machine("test", tuple(jax.devices()[:chips]), 1, "here", CHIPS["TPU v5"], 0.0)


def points(curve: Curve) -> list[Point]:
    return measure(curve, lambda changes: tiny_config(BASE | changes), simulated)


def test_an_order_is_a_slope():
    like = Point(1, 3.0, 3.0, 0.0, 0.0, 5.0, 7.0)
    grown = [like._replace(at=at, step=3.0 * at**2, traffic=7.0 / at) for at in (1, 2, 8)]
    found = [order(grown, quantity) for quantity in ("step", "memory", "traffic", "exposed")]
    assert found == pytest.approx([2, 0, -1, 0], abs=1e-9)


def test_parts_of_a_small_step_grow_as_they_should(tmp_path):
    expected = {"part": Expected(2, "because")}
    length = Curve("length", "positions", (64, 128), lambda n: {"data.max_length": n}, expected, lambda _: 8, "attention")
    chips = Curve("chips", "chips", (2, 8), lambda n: {"train.batch_size": n}, {}, lambda n: n)
    curves = {"length": length, "chips": chips}
    found = {name: points(curve) for name, curve in curves.items()}
    assert order(found["length"], "part") == pytest.approx(2)
    weak = found["chips"]
    assert order(weak, "compute") == pytest.approx(0, abs=1e-9)
    assert weak[1].traffic / weak[0].traffic == pytest.approx((7 / 8) / (1 / 2))
    assert weak[1].memory < weak[0].memory
    assert "| length | s of the part attention | 2 | 2.00 | 2.00 | because |" in orders_table(curves, found)
    kept = {"chips": {"8": weak[1]._asdict()}}
    last = points_table(curves, found, kept).splitlines()[-1]
    assert last.startswith("| chips | 8 | ")
    assert " GiB, " in last
    draw(curves, found, kept).savefig(tmp_path / "growth.png", dpi=20)
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_compiled_points_are_among_those_that_are_estimated():
    assert all(set(curve.compiled) <= set(curve.values) for curve in CURVES.values())
