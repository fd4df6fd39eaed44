"""What devices send each other in a step, read in the compiled program: one layer's weights, one group of the stack."""

import re
from typing import NamedTuple

import jax
import numpy as np
import pytest

from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.rules import use_mesh
from tests.distributed.cases import LENGTH, MESHES, ROWS, batches, config_of, program_of, start

pytestmark = pytest.mark.usefixtures("optimized")

# Rows of the batch: a device's part of the stack is then larger than any weight of a layer, and smaller than those of all.
MANY = {"L": 64, "V": 64, "HD": 16}
LINE = re.compile(r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


class Collective(NamedTuple):
    kind: str
    sizes: tuple[int, ...]  # elements of each array that comes out
    where: str  # in the traced program


def collectives(program, rows):
    """Of the step compiled for so many rows of LENGTH positions, with all of XLA's optimizations."""
    with use_mesh(program.mesh):
        lowered = program.jit_step().lower(program.abstract_state(), program.abstract_batch(rows, LENGTH))
        text = lowered.compile().as_text()
    found = []
    for line in text.splitlines():
        if match := LINE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = tuple(int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes)
            where = re.search(r'op_name="([^"]*)"', line)
            found.append(Collective(match[2], sizes, where[1] if where else ""))
    return found


def largest_layer(program):
    """Elements of the largest weight of a single layer, and of the largest one that no layer has."""
    sizes = {True: 0, False: 0}
    for path, size in program.sizes.items():
        stacked = "layers/" in path
        layers = program.config.vision.layers if path.startswith("vision_tower") else program.config.decoder.layers
        sizes[stacked] = max(sizes[stacked], size // layers if stacked else size)
    return sizes[True], sizes[False]


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [
        ("L", "dp2xfsdp2xtp2"),
        pytest.param("L", "fsdp8", marks=pytest.mark.slow),
        pytest.param("L", "dp4xtp2", marks=pytest.mark.slow),
        pytest.param("V", "dp2xfsdp2xtp2", marks=pytest.mark.slow),
        pytest.param("HD", "dp2xfsdp2xtp2", marks=pytest.mark.slow),
    ],
)
def test_a_device_gathers_one_layer_and_one_group_at_a_time(variant, mesh):
    config, (data, fsdp, tensor) = config_of(variant), MESHES[mesh]
    program = program_of(config, (data, fsdp, tensor))
    shape, rows = config.data_spec.batch_shape(MANY[variant], LENGTH), MANY[variant] // (data * fsdp)
    width = config.vision.width if variant == "V" else config.decoder.width
    group, layer = rows * shape.visual * width, max(largest_layer(program))
    found = collectives(program, MANY[variant])
    gathers = [gather for gather in found if gather.kind == "all-gather"]

    of_group = [gather for gather in gathers if "cond/branch" in gather.where]
    assert [gather.sizes for gather in of_group] == [(group,)] * len(of_group)
    assert bool(of_group) == (tensor > 1), "the group is gathered within the condition, where there is something to gather"

    in_sequence = rows * shape.visual * config.decoder.width  # the visual tokens that the merge puts between the text
    allowed = max(layer, group, in_sequence)
    assert allowed < shape.groups * group, "the check would not see a whole stack"
    assert allowed < min(config.decoder.layers * largest_layer(program)[0], sum(program.sizes.values()))
    large = [gather for gather in gathers if max(gather.sizes) > allowed]
    assert large == []
    if fsdp > 1:
        per_layer = [gather for gather in gathers if "layers/while/body" in gather.where and "mlp/gate" in gather.where]
        assert per_layer, "the weights of a layer are gathered inside the scan"
        # Gradients of weights are scattered: what is added up whole is small (norms, biases, counts).
        scattered = {size * fsdp for one in found if one.kind == "reduce-scatter" for size in one.sizes}
        assert largest_layer(program)[0] // tensor in scattered
        small = config.decoder.width * config.decoder.heads
        over_fsdp = [one for one in found if one.kind == "all-reduce" and "shard_map" not in one.where and tensor == 1]
        assert [one for one in over_fsdp if max(one.sizes) > small] == []


@pytest.mark.parametrize("mesh", ["dp2xfsdp2xtp2", pytest.param("tp8", marks=pytest.mark.slow)])
def test_the_stack_lies_over_batch_and_width(mesh):
    """Its real sharding when it comes out of the model's first half, and the bytes of each device."""
    data, fsdp, tensor = MESHES[mesh]
    config = config_of("L")
    program = program_of(config, (data, fsdp, tensor))
    params = start(program).params
    with use_mesh(program.mesh):
        run = jax.jit(lambda params, batch: program.model.apply({"params": params}, batch, method="inputs"))
        merged, stack, _ = run(params, put_batch(program.mesh, batches("L")[0]))
    shape, width = config.data_spec.batch_shape(ROWS, LENGTH), config.decoder.width
    assert stack.shape == (shape.groups, ROWS, shape.visual, width)
    part = (shape.groups, ROWS // (data * fsdp), shape.visual, width // tensor)
    assert stack.sharding.shard_shape(stack.shape) == part
    assert {shard.data.nbytes for shard in stack.addressable_shards} == {stack.nbytes // 8}
    assert merged.sharding.shard_shape(merged.shape) == (ROWS // (data * fsdp), LENGTH, width)
