"""Weights gathered and gradients scattered in stages over the dimensions of a torus, beside what they should come to."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepstack_jax.config import MeshConfig
from deepstack_jax.parallel.fsdp import ExplicitFsdp, explicit_fsdp, stage_sizes, stages_of_sizes, torus_of
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import computed_spec, cut_axis, param_shardings
from deepstack_jax.train.core.optimizer import flatten, unflatten
from deepstack_jax.weights.adapters import boxed_adapters
from tests.distributed.cases import config_of, program_of


def chips(shape, order=None):
    """Devices of a torus of this shape, row by row, or in another order of their numbers; a fourth size: cores of a chip."""
    places = [Place(at[:3], sum(at[3:])) for at in np.ndindex(*shape)]
    return [places[at] for at in (range(len(places)) if order is None else order)]


@dataclass(frozen=True)
class Place:
    """A device, as far as its stages are concerned."""

    coords: tuple[int, ...] | None = None
    core_on_chip: int = 0
    slice_index: int = 0


@pytest.mark.parametrize(
    ("devices", "sizes"),
    [
        (chips((4, 4, 4)), (4, 4, 4)),
        (chips((16, 16, 1)), (16, 16)),
        (chips((2, 2, 4)), (2, 2, 4)),
        (chips((8, 1, 1)), (8,)),
        (chips((2, 2, 4, 2)), (2, 2, 4, 2)),
        (chips((2, 4), order=[0, 1, 2, 3, 7, 6, 5, 4]), (8,)),  # a ring, no rows
        ([Place()] * 8, (8,)),
    ],
)
def test_a_stage_for_each_dimension_of_the_torus(devices, sizes):
    assert torus_of(devices) == stage_sizes(devices, sparse_cores=False) == sizes


@pytest.mark.parametrize(("shape", "sizes"), [((4, 4, 4), (16, 4)), ((8, 8), (64,)), ((2, 2, 4), (4, 4)), ((4, 1, 1), (4,))])
def test_sparse_cores_take_two_dimensions_at_once(shape, sizes):
    assert stage_sizes(chips(shape), sparse_cores=True) == sizes
    two_slices = [replace(one, slice_index=at) for at in range(2) for one in chips(shape)]
    assert stage_sizes(two_slices, sparse_cores=True) == (2, *sizes), "the network between slices is no dimension of a torus"


def test_the_places_of_a_stage():
    assert stages_of_sizes((2, 3)) == (((0, 3), (1, 4), (2, 5)), ((0, 1, 2), (3, 4, 5)))


TAKEN = ("batch", None, "mlp"), ("batch", None, "embed")


@pytest.mark.parametrize(("mesh", "turned"), [((1, 8, 1), True), ((2, 4, 1), False), ((2, 2, 2), True)])
def test_stages_come_to_the_whole_weight_and_the_whole_sum(mesh, turned):
    laid = make_mesh(MeshConfig(*mesh))
    stages = stages_of_sizes({8: (2, 2, 2), 4: (2, 2), 2: (2,)}[mesh[1]])
    how = ExplicitFsdp(laid, cut_axis, computed_spec, stages, turned)
    x, y = (jax.random.normal(jax.random.key(at), (8, 3, size)) for at, size in enumerate((6, 16)))
    weight = jax.random.normal(jax.random.key(2), (6, 16))
    cut = NamedSharding(laid, PartitionSpec(None, "fsdp"))
    axes = ("mlp", "embed")
    with jax.set_mesh(laid):
        gathered = jax.jit(lambda w: how.whole(w, axes), in_shardings=cut)(weight)
        summed = jax.jit(lambda x, y: how.gradient(lambda x, y: jnp.einsum("btd,btf->df", x, y), (x, y), TAKEN, axes))(x, y)
    np.testing.assert_array_equal(gathered, weight)
    np.testing.assert_allclose(summed, np.einsum("btd,btf->df", x, y), rtol=1e-5, atol=1e-5)
    assert gathered.sharding.shard_shape(gathered.shape) == (6 // mesh[2], 16), "what lies along tensor stays so"
    assert summed.sharding.shard_shape(summed.shape) == (6 // mesh[2], 16 // mesh[1])


def test_what_is_not_cut_stays_with_the_compiler():
    assert explicit_fsdp(make_mesh(MeshConfig(8, 1, 1)), cut_axis, computed_spec) is None
    how = explicit_fsdp(make_mesh(MeshConfig(1, 8, 1)), cut_axis, computed_spec)
    assert how is not None
    weight = jnp.ones((4, 4))
    assert how.whole(weight, ("heads", None)) is weight
    assert (
        float(how.gradient(jnp.sum, (jnp.ones((3, 2)),), (("batch", "embed"),), ("embed",))) == 6
    )  # three rows on eight devices


@pytest.mark.parametrize("variant", ["L", "V", "taps", "LoRA"])
def test_a_weight_is_gathered_along_the_axis_that_it_is_cut_along(variant):
    config = config_of(variant)
    program = program_of(config, (1, 8, 1))
    drawn = flatten(jax.eval_shape(program.model.init, jax.random.key(0), program.sample)["params"])
    boxed = drawn | boxed_adapters({path: drawn[path] for path in program.adapted}, config)
    places = flatten(param_shardings(program.mesh, unflatten(boxed)))
    axes = {path: getattr(box, "names", ()) for path, box in boxed.items()}
    assert ("vision_embed", "embed") in axes.values()
    for path, names in axes.items():
        stacked = sum(name in ("layers", "vision_layers") for name in names)  # a product sees one layer
        at = cut_axis(names[stacked:])
        assert [None if at is None else at + stacked] == ([*np.flatnonzero([p == "fsdp" for p in places[path].spec])] or [None])
