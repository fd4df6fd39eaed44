"""The same numbers on every mesh of eight simulated devices, and what a device holds of it."""

from functools import cache
from itertools import pairwise

import jax
import numpy as np
import pytest

from deepstack_jax.config import TrainConfig
from deepstack_jax.generate.decoding import greedy
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.checkpoint.manager import Checkpoints
from tests.distributed.cases import (
    ADAPTED,
    FUSED,
    MESHES,
    VARIANTS,
    batches,
    config_of,
    parameters,
    program_of,
    start,
    two_steps,
)
from tests.unit.tiny import FAMILIES, example, make_batch


@cache
def on_one_device(variant):
    return two_steps(program_of(config_of(variant), (1, 1, 1)), variant)


def same(variant, sizes, accumulation=1):
    """Loss, gradients (the first moment), parameters and optimizer of two steps."""
    if variant == "quantised":
        pytest.importorskip("qwix", reason="qwix is not installed: the extra `quantised` has it")
    found = two_steps(program_of(config_of(variant, accumulation), sizes), variant)
    for (state, metrics), (one, one_metrics) in zip(found, on_one_device(variant), strict=True):
        for name, value in one_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        assert state.keys() == one.keys()
        for path, leaf in one.items():
            np.testing.assert_allclose(state[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)


def test_the_steps_compared_are_no_idle_ones():
    """Every parameter that the features depend on moves far, and its first moment is large beside the tolerance."""
    for variant in VARIANTS:
        (first, _), (second, _) = on_one_device(variant)
        moved = {path: np.abs(second[path] - leaf).max() for path, leaf in first.items() if path.startswith(".params")}
        still = [path for path, size in moved.items() if size < 1e-3]
        # A bias on keys changes no attention weight; nothing is computed after the post norm.
        assert all("['k']['bias']" in path or "post_norm" in path for path in still), still
        idle = ("post_norm", "k/bias")
        moments = [np.abs(m).max() for path, m in first.items() if ".mu" in path and not any(name in path for name in idle)]
        assert min(moments) > 1e-5
        assert np.median(moments) > 1e-3


@pytest.mark.parametrize(
    ("variant", "mesh", "accumulation"),
    [
        ("L", "dp2xfsdp2xtp2", 2),
        ("L", "tp8", 1),
        ("V", "dp4xtp2", 1),
        ("HD", "fsdp4xtp2", 1),
        ("LoRA", "dp2xfsdp2xtp2", 2),
    ],
)
def test_two_steps_equal_those_of_one_device(variant, mesh, accumulation):
    same(variant, MESHES[mesh], accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, *FUSED, *ADAPTED, *FAMILIES])
@pytest.mark.parametrize(("mesh", "accumulation"), [*((mesh, 1) for mesh in MESHES), ("fsdp8", 2), ("dp2xfsdp2xtp2", 2)])
def test_two_steps_equal_those_of_one_device_everywhere(mesh, accumulation, variant):
    same(variant, MESHES[mesh], accumulation)


def test_a_checkpoint_goes_from_eight_devices_to_four_to_one_and_back(tmp_path):
    """Bytes of every leaf, and where they lie each time."""
    config = config_of("L")
    programs = [program_of(config, sizes) for sizes in ((2, 2, 2), (1, 4, 1), (1, 1, 1), (1, 4, 2))]
    state = start(programs[0])
    expected = {path: np.asarray(leaf).tobytes() for path, leaf in parameters(state).items()}
    for step, (before, after) in enumerate(pairwise(programs), 1):
        checkpoints = Checkpoints(tmp_path, TrainConfig())
        checkpoints.save(state.replace(step=jax.device_put(np.int32(step), before.shardings.step)), {"at": step}, {})
        checkpoints.finish(step)
        checkpoints.close()
        checkpoints = Checkpoints(tmp_path, TrainConfig())
        state, data = checkpoints.restore(after.abstract_state())
        checkpoints.close()
        assert data == {"at": step}
        assert {path: np.asarray(leaf).tobytes() for path, leaf in parameters(state).items()} == expected
        assert [leaf.sharding for leaf in jax.tree.leaves(state)] == jax.tree.leaves(after.shardings)
        assert len(state.step.sharding.device_set) == after.mesh.size


@pytest.mark.parametrize("mesh", ["dp2xfsdp2xtp2", "tp8"])
def test_answers_under_a_mesh(mesh):
    """Prompts with and without pictures, continued by the same tokens as without a mesh."""
    config = config_of("L")
    rows = [[example(config, 40 + at, [(2, 2)] if at % 2 else [], answer=0)] for at in range(8)]
    prompts = make_batch(config, rows, 24)

    def answers(sizes):
        program = program_of(config, sizes)
        params = start(program).params
        with use_mesh(program.mesh):
            put = put_batch(program.mesh, prompts)
            return np.asarray(greedy(program.model, params, put, max_new_tokens=5, stop_ids=(2,)).tokens)

    alone = answers((1, 1, 1))
    assert len(np.unique(alone)) > 4
    np.testing.assert_array_equal(answers(MESHES[mesh]), alone)


def test_what_a_device_holds():
    """Bytes of parameters and moments fall with fsdp and tensor; the batch is cut over data and fsdp."""
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(start(program_of(config_of("L"), (1, 1, 1)))))
    for mesh, share in (("dp8", 1), ("fsdp8", 7.5), ("tp8", 4), ("fsdp4xtp2", 7), ("dp2xfsdp2xtp2", 3.5)):
        program = program_of(config_of("L"), MESHES[mesh])
        state = start(program)
        shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
        for device in program.mesh.devices.flat:
            held = sum(shard.data.nbytes for shard in shards if shard.device == device)
            assert held <= whole / share, f"{mesh}: {held} of {whole} bytes"
        batch = put_batch(program.mesh, batches("L")[0])
        rows = 16 // (MESHES[mesh][0] * MESHES[mesh][1])
        assert {shard.data.shape[0] for shard in batch.pixels.addressable_shards} == {rows}
