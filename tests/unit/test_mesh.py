"""Meshes from a configuration, what must divide by them, and which rows a process holds."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from deepstack_jax.config import MeshConfig
from deepstack_jax.errors import ConfigError
from deepstack_jax.parallel import chips as chips_table
from deepstack_jax.parallel import compiler
from deepstack_jax.parallel.compiler import compiler_options, uses_sparse_cores
from deepstack_jax.parallel.cudnn import packed_attention
from deepstack_jax.parallel.distributed import local_rows, process_slice
from deepstack_jax.parallel.mesh import AXES, check_batch_fits, check_model_fits, make_mesh
from deepstack_jax.parallel.rules import batch_sharding
from tests.unit.tiny import tiny_config

pytestmark = pytest.mark.quick


@dataclass(frozen=True)
class Chip:
    """As much of a device as a mesh is made by."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "made up"


def chips(count, per_process, per_slice=None):
    return [Chip(i, i // per_process, 0 if per_slice is None else i // per_slice) for i in range(count)]


def grid(sizes, per_process):
    """A mesh of described devices in their order."""
    return Mesh(np.array(chips(int(np.prod(sizes)), per_process)).reshape(sizes), AXES)


@dataclass(frozen=True)
class TorusChip(Chip):
    """A TPU chip with its place in the torus."""

    platform: str = "tpu"
    device_kind: str = "TPU v5"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def test_axes_lie_along_the_links_of_a_slice_or_share_them():
    slice_of_64 = [TorusChip(i, 0, coords=(i % 4, i // 4 % 4, i // 16)) for i in range(64)]
    assert dict(make_mesh(MeshConfig(1, 16, 4), slice_of_64).shape) == {"data": 1, "fsdp": 16, "tensor": 4}
    shared = make_mesh(MeshConfig(1, -1, 2), slice_of_64)
    assert dict(shared.shape) == {"data": 1, "fsdp": 32, "tensor": 2}
    for pair in shared.devices.reshape(-1, 2):  # the two of the tensor axis are neighbours on a ring of four
        apart = [abs(a - b) for a, b in zip(pair[0].coords, pair[1].coords, strict=True)]
        assert sorted(apart) in ([0, 0, 1], [0, 0, 3])


def test_mesh_takes_what_is_left():
    assert dict(make_mesh(MeshConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(2, 2, -1)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "nearest"),
    [
        ((3, 1, 1), "{'data': 8, 'fsdp': 1, 'tensor': 1}"),
        ((-1, 3, 1), "{'data': 4, 'fsdp': 2, 'tensor': 1}"),
        ((4, 1, 1), "{'data': 8, 'fsdp': 1, 'tensor': 1}"),
        ((1, -1, 6), "{'data': 1, 'fsdp': 2, 'tensor': 4}"),
    ],
)
def test_sizes_that_do_not_cover_the_devices(sizes, nearest):
    with pytest.raises(ConfigError, match="does not cover 8 devices; choose sizes whose product is 8") as caught:
        make_mesh(MeshConfig(*sizes))
    assert f"e.g. {nearest}, or set one axis to -1" in str(caught.value)


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 8), (-2, 1, 1)])
def test_sizes_that_mean_nothing(sizes):
    with pytest.raises(ConfigError, match="expected positive sizes, at most one of them -1"):
        make_mesh(MeshConfig(*sizes))


def test_slices_lie_along_data_and_then_along_fsdp():
    """Four slices of eight chips: what is exchanged in every layer stays within a slice where it can."""

    def across(*sizes):
        """Along which axes neighbours are in different slices."""
        mesh = make_mesh(MeshConfig(*sizes), chips(32, 4, 8))
        assert sorted(chip.id for chip in mesh.devices.flat) == list(range(32))
        place = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
        return {name for axis, name in enumerate(AXES) if (np.diff(place, axis=axis) != 0).any()}

    assert across(4, 4, 2) == {"data"}
    assert across(8, 1, 4) == {"data"}
    assert across(2, 8, 2) == {"data", "fsdp"}
    assert across(1, 32, 1) == {"fsdp"}
    with pytest.raises(ConfigError, match=r"over 4 slices: they would split the tensor axis; .*data as a multiple of 4"):
        across(1, 1, 32)


def test_a_batch_must_split_over_the_mesh():
    mesh = make_mesh(MeshConfig(4, 2, 1))
    check_batch_fits(tiny_config().train, mesh)
    for changes, nearest in (
        ({"train.batch_size": 12}, "12 with accumulation 1 does not split over 8 .*; nearest valid: 8 or 16"),
        ({"train.accumulation": 2}, "8 with accumulation 2 does not split over 8 .*; nearest valid: 16"),
    ):
        with pytest.raises(ConfigError, match=nearest):
            check_batch_fits(tiny_config(changes).train, mesh)


def test_sizes_of_the_model_must_divide_by_the_axis_that_cuts_them():
    config = tiny_config({"decoder.vocab_size": 64, "vision.heads": 4})
    check_model_fits(config.decoder, config.vision, make_mesh(MeshConfig(4, 1, 2)))
    with pytest.raises(ConfigError, match=r"mesh.tensor 4 does not divide config.decoder.kv_heads 2; .*: 2$"):
        check_model_fits(config.decoder, config.vision, make_mesh(MeshConfig(2, 1, 4)))
    with pytest.raises(ConfigError, match=r"mesh.tensor 2 does not divide config.decoder.vocab_size 61; .*on 8 devices: 1$"):
        check_model_fits(tiny_config().decoder, tiny_config().vision, make_mesh(MeshConfig(4, 1, 2)))
    with pytest.raises(
        ConfigError, match=r"mesh.fsdp 3 does not divide config.decoder.width 32, config.vision.width 16; .*: 2 or 4$"
    ):
        check_model_fits(config.decoder, config.vision, grid((4, 3, 1), 12))


@pytest.mark.parametrize(
    ("sizes", "per_process", "parts"),
    [
        ((8, 1, 1), 8, [0]),
        ((2, 4, 1), 2, [0, 1, 2, 3]),
        ((2, 2, 2), 2, [0, 1, 2, 3]),
        ((1, 2, 4), 2, [0, 0, 1, 1]),  # two processes along tensor hold the same rows
        ((1, 1, 8), 2, [0, 0, 0, 0]),
    ],
)
def test_the_rows_of_a_process(sizes, per_process, parts):
    mesh = grid(sizes, per_process)
    found = [process_slice(mesh, process) for process in range(len(parts))]
    assert [part.index for part in found] == parts
    assert {part.count for part in found} == {len(set(parts))}
    assert [part.index for part in found if part.is_leader] == sorted(set(parts))


def test_rows_that_processes_share_in_part():
    with pytest.raises(ConfigError, match=r"config\.mesh\.tensor 2 lays the rows of a batch over 3 processes unevenly"):
        process_slice(Mesh(np.array(chips(6, 2))[[0, 2, 1, 4, 3, 5]].reshape(1, 3, 2), AXES), 0)


def test_rows_come_back_in_their_order():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    rows = np.arange(24).reshape(8, 3)
    np.testing.assert_array_equal(local_rows(jax.device_put(rows, batch_sharding(mesh))), rows)
    np.testing.assert_array_equal(local_rows(jax.device_put(rows, jax.devices()[3])), rows)


def test_options_that_a_compiler_does_not_know_are_left_out(monkeypatch):
    known = {"xla_cpu_enable_fast_math": False}
    monkeypatch.setattr(compiler, "_OPTIONS", {"cpu": {"xla_no_such": True, **known, "xla_nor_this": True}})
    with pytest.warns(UserWarning, match="^the cpu compiler of this machine does not know xla_") as said:
        assert compiler_options(make_mesh(MeshConfig(1, 8, 1))) == known
    assert [str(one.message).split(";")[0].split()[-1] for one in said] == ["xla_no_such", "xla_nor_this"]
    assert compiler_options(make_mesh(MeshConfig(8, 1, 1))) == {}


def test_chips_with_sparse_cores_have_options_of_their_own(monkeypatch):
    of_cpu, of_sparse = ({"xla_cpu_enable_fast_math": fast} for fast in (False, True))
    monkeypatch.setattr(compiler, "_OPTIONS", {"cpu": of_cpu, compiler.SPARSE_CORES: of_sparse})
    mesh = make_mesh(MeshConfig(1, 8, 1))
    assert compiler_options(mesh) == of_cpu
    kind = mesh.devices.flat[0].device_kind
    monkeypatch.setitem(chips_table.CHIPS, kind, chips_table.CHIPS["TPU v6 lite"])
    assert compiler_options(mesh) == of_sparse
    assert uses_sparse_cores(mesh)
    monkeypatch.setitem(compiler._OPTIONS, compiler.SPARSE_CORES, of_sparse | {"xla_no_such_core": True})
    with pytest.warns(UserWarning, match=r"does not know xla_no_such_core; sparse cores stay unused"):
        assert compiler_options(mesh) == of_cpu


def test_more_elements_than_cudnn_counts_is_one_line():
    rows, ids = jax.ShapeDtypeStruct((64, 8192, 32, 128), "bfloat16"), jax.ShapeDtypeStruct((64, 8192), "int32")
    with pytest.raises(
        ConfigError, match=r"^64 rows of 8192 tokens and 32 heads of 128 are more .*config\.train\.accumulation"
    ):
        jax.eval_shape(lambda q, ids: packed_attention(q, q, q, ids, segments=2), rows, ids)
