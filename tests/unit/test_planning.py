"""Planned figures against the step that really runs: memory by shardings and by XLA, traffic read from compiled programs."""

import dataclasses
from fractions import Fraction

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks import guard
from deepstack_jax.data.order.batches import packed_rows
from deepstack_jax.errors import ConfigError
from deepstack_jax.parallel.chips import CHIPS
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.kernels import kernels_for
from deepstack_jax.parallel.mesh import AXES, make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.plan.collectives import Collective, find_collectives, ring
from deepstack_jax.plan.compile import Compiled, Overflow
from deepstack_jax.plan.memory import activation_memory, state_memory
from deepstack_jax.plan.planner import Wanted, make_plan, memory_by_kind, plan_load
from deepstack_jax.plan.report import Plan, belongs_to, by_kind, verdict
from deepstack_jax.plan.roofline import BESIDE_SPARSE_CORES, estimate, guess_collectives, link_rate
from deepstack_jax.plan.search import candidates, find_best
from deepstack_jax.plan.topology import SLICES, Machine, open_machine, with_shape
from deepstack_jax.train.core.optimizer import FROZEN
from deepstack_jax.train.core.program import build_program
from deepstack_jax.train.core.state import new_state
from deepstack_jax.train.flops import step_flops
from tests.unit.tiny import draw_params, example, make_batch, tiny_config

CHIP = CHIPS["TPU v5"]
SMALL = {
    "optimizer.table": (("^vision_tower/", FROZEN), (".*", "default")),
    "decoder.vocab_size": 64,
    "data.max_images": 1,
    "data.max_length": 16,
}
# Shape of the torus, chip, seconds of a step, bytes gathered and scattered into each device.
COMPILED = [((4, 4, 4), "TPU v5", {16, 4}, 0.613, 55.6e9), ((8, 8), "TPU v6 lite", {64}, 0.315, 55.2e9)]
MESHES = {"fsdp": (1, 8, 1), "all three": (2, 2, 2)}


def config_on(mesh: tuple[int, int, int], more: dict | None = None):
    axes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    return tiny_config(SMALL | axes | (more or {}))


def machine(usable: float = 0.0, devices: int = 8) -> Machine:
    return Machine("test", tuple(jax.devices()[:devices]), 1, "here", CHIP, usable)


@pytest.fixture(scope="module", params=MESHES, ids=list(MESHES))
def planned(request):
    """(plan, the state and batch that a run would have)."""
    config = config_on(MESHES[request.param])
    plan = make_plan(config, machine(), Wanted(epoch=80))
    program = build_program(config, make_mesh(config.mesh), steps=10)

    def begin(params):
        return new_state(params, program.groups, program.optimizer, config.train.frozen_dtype)

    state = jax.jit(begin, out_shardings=program.shardings)(draw_params(program.shapes))
    rows = [[example(config, row, [(2, 2)])] for row in range(8)]
    batch = put_batch(program.mesh, make_batch(config, rows, length=16)._replace(example_id=np.zeros((8, 1), np.int64)))
    return plan, program, state, batch


def bytes_on_first_device(tree) -> int:
    device = jax.devices()[0]
    leaves = jax.tree.leaves(tree)
    return sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device)


def test_the_plan_is_the_memory_of_the_step_that_runs(planned):
    plan, program, state, batch = planned
    assert plan.memory["parameters"] == bytes_on_first_device(state.params)
    assert plan.memory["optimizer"] == bytes_on_first_device(state.opt_state)
    assert plan.memory["batch"] == bytes_on_first_device(batch)
    with use_mesh(program.mesh):
        step = program.jit_step().lower(state, batch).compile()
        after, _ = step(state, batch)
    assert int(after.step) == 1
    memory = step.memory_analysis()
    together = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    together += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    given = sum(plan.memory[name] for name in ("parameters", "optimizer", "batch", "padding"))
    assert memory.argument_size_in_bytes == pytest.approx(given)
    assert plan.used == pytest.approx(together)
    assert abs(plan.memory["padding"]) < 100  # the step counter, example ids that nothing reads


def test_collectives_are_those_of_the_compiled_step(planned):
    plan, program, _, _ = planned
    sums = by_kind(plan.collectives)
    assert sums
    # What moves is at least every trained kernel gathered once each way, and its gradient added up, over fsdp.
    trained = sum(size for path, size in program.sizes.items() if program.groups[path] != FROZEN and path.startswith("layers/"))
    least = 4 * trained / program.mesh.shape["tensor"] * (1 - 1 / program.mesh.shape["fsdp"])
    moved = sum(size for _, size in sums.values())
    assert moved > least
    if program.mesh.shape["fsdp"] == 8:  # nor much more than a step cannot do without, beside the small things
        assert moved < 2 * sum(one.total for one in guess_collectives(program, 8, 16))


def test_plan_in_numbers(planned):
    plan, program, _, _ = planned
    numbers = plan.as_dict()
    assert numbers["used"] == pytest.approx(sum(numbers["memory"].values()))
    assert numbers["load"]["steps"] == 10
    assert plan.hours == pytest.approx(plan.roofline.step * 10 / 3600)
    assert plan.samples_per_second == pytest.approx(8 / plan.roofline.step)
    assert plan.model_flops == step_flops(program.config, program.groups, 8, 16).model
    assert plan.mfu == pytest.approx(plan.model_flops / (plan.roofline.step * 8 * CHIP.flops))
    line = plan.roofline
    assert line.least == getattr(line, line.bound) <= line.step <= line.serial
    assert line.exposed == line.links > 0, "a CPU waits for every collective"
    assert line.step == pytest.approx(max(line.compute, line.memory) + line.exposed)
    assert dataclasses.replace(line, exposed=0.0).step == line.least
    assert plan.compile_seconds > 0
    assert (plan.margin, numbers["fits"]) == (None, None)


LOOPED = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %gather.1 = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} all-gather(%w), channel_id=3, <groups>, metadata={op_name="jit(step)/q/dot"}
  %piece.1 = bf16[1,64,32]{2,1,0} all-gather(%w), channel_id=3, <groups>
  %reduced = f32[16,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%counter, %one), metadata={}
  ROOT %tuple = (s32[], f32[16,4]) tuple(%next, /*index=1*/%reduced)
}

%all-reduce-scatter.2 (input: f32[64,4]) -> f32[16,4] {
  %all-reduce.9 = f32[64,4]{1,0} all-reduce(%input), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[16,4]{1,0} dynamic-slice(%all-reduce.9, %i), dynamic_slice_sizes={16,4}
}

%condition (p: (s32[], f32[16,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %counter = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

ENTRY %main (p0: f32[16,4]) -> f32[16,4] {
  %loop = (s32[], f32[16,4]) while(%init), condition=%condition, body=%body
  %start = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%p0), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[16,8]{1,0} all-gather-done(%start)
  %known = (s32[], f32[4]) while(%other), condition=%condition, body=%second, backend_config={"known_trip_count":{"n":"3"}}
  %pairs = (u32[], f32[4]) while(%more), condition=%until, body=%unrolled
  ROOT %total = f32[10]{0} all-reduce(%x), channel_id=8, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}

%unrolled (p: (u32[], f32[4])) -> (u32[], f32[4]) {
  %two = u32[] constant(2)
  %there = f32[4]{0} all-to-all(%v), channel_id=10, replica_groups={{0,1}}
  %twice = u32[] add(%counter, %two)
  ROOT %tuple.2 = (u32[], f32[4]) tuple(%twice, %there)
}

%until (p: (u32[], f32[4])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %counter = u32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%counter, %eight), direction=LT
}

%second (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %moved = f32[4]{0} collective-permute(%v), channel_id=9, source_target_pairs={{0,1},{1,0}}
}
""".replace("<groups>", "replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}")


SLICED = """HloModule jit_step, is_scheduled=true, num_partitions=4

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %send.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%g, %after), channel_id=8, <host>"all-reduce.3_0",<all>,<sum>}
  %recv.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after), channel_id=7, <host>"all-reduce.3_0",<all>,<sum>}
  %recv-done.1 = (bf16[8,128]{1,0}, token[]) recv-done(%recv.1), channel_id=7
}

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %limit = s32[] constant(5)
}

ENTRY %main (p0: f32[16,4]) -> f32[16,4] {
  %loop = (s32[], bf16[8,128]) while(%init), condition=%condition, body=%body
  %recv.2 = (f32[2,16,4]{2,1,0}, u32[], token[]) recv(%after), channel_id=9, <host>"all-gather.4_0",<two>,<gather>}
}
"""
for short, long in {
    "<host>": "is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous=",
    "<all>": '_xla_megascale_target="{1,2,3,4}x{0:3}"',
    "<two>": "_xla_megascale_target={{100000,200000},{100001,200001}}",
    "<sum>": '_xla_megascale_transfer_type="ALL_REDUCE"',
    "<gather>": '_xla_megascale_transfer_type="ALL_GATHER"',
}.items():
    SLICED = SLICED.replace(short, long)


def test_what_slices_exchange_goes_over_the_network():
    """A TPU hands it to its host, which XLA writes as a send and a receive; the form is that of libtpu 0.0.42."""
    reduced, gathered = find_collectives(SLICED)
    assert (reduced.kind, reduced.times, reduced.size, reduced.group, reduced.across) == ("all-reduce", 5, 2048, 4, True)
    assert reduced.moved == 2048 * 2 * 3 / 4
    assert (gathered.kind, gathered.times, gathered.moved, gathered.group) == ("all-gather", 1, 2 * 16 * 4 * 4 / 2, 2)
    assert by_kind((reduced, gathered)).keys() == {"all-reduce between slices", "all-gather between slices"}
    assert link_rate(CHIP, reduced, (4,)) == CHIP.network == 6.25e9  # 50 Gbps per v5p chip


def test_slices_are_estimated_along_data_then_fsdp():
    """Along data only gradients cross the network; along fsdp every gathered kernel does."""

    def crossing(mesh: tuple[int, int, int], slices: int) -> dict[str, float]:
        config = config_on(mesh)
        program = build_program(config, make_mesh(config.mesh), 1)
        found = guess_collectives(program, 8, 16, slices)
        return {one.kind: one.total for one in found if one.across}

    assert crossing((2, 4, 1), 1) == {}
    assert crossing((2, 4, 1), 2).keys() == {"all-reduce"}
    assert crossing((1, 8, 1), 2).keys() == {"all-gather", "reduce-scatter"}
    assert sum(crossing((1, 8, 1), 2).values()) > 2 * crossing((2, 4, 1), 2)["all-reduce"]
    config = config_on((1, 8, 1))
    program = build_program(config, make_mesh(config.mesh), 1)
    for kind in ("all-gather", "reduce-scatter"):  # by whatever way, each device gets what it lacks once
        moved = [sum(c.total for c in guess_collectives(program, 8, 16, n) if c.kind == kind) for n in (1, 2, 4)]
        assert moved == pytest.approx([moved[0]] * 3)
    # Twice as many devices of each slice share a gradient's way to the other slices.
    assert crossing((8, 1, 1), 2)["all-reduce"] == pytest.approx(crossing((8, 1, 1), 4)["all-reduce"] / 3, rel=1e-6)
    config = config_on((2, 4, 1))
    apart = dataclasses.replace(machine(), slices=2)
    near, far = (make_plan(config, one, Wanted(), compiled=False).roofline.links for one in (machine(), apart))
    assert far > near


@dataclasses.dataclass(frozen=True)
class Place:
    """A chip, as far as a plan looks at it."""

    coords: tuple[int, ...]
    device_kind: str


@pytest.mark.parametrize(("shape", "chip", "groups", "seconds", "moved"), COMPILED)
def test_what_is_estimated_is_what_was_compiled(shape, chip, groups, seconds, moved):
    """docs/scaling.md and docs/plan.md have the compiled steps of DeepStack-L at 7B, whole slices along fsdp."""
    program = guard.program_of(guard.recipe("L"))
    chips = np.array([Place(coords, chip) for coords in np.ndindex(shape)], object).reshape(1, -1, 1)
    laid = dataclasses.replace(program, mesh=Mesh(chips, AXES), kernels=kernels_for("tpu", program.config))
    found = guess_collectives(laid, 128, 2048)
    assert {one.group for one in found} == groups, "sparse cores take two dimensions of the torus at once"
    assert {one.kind: one.hidden for one in found} == BESIDE_SPARSE_CORES
    assert sum(one.total for one in found) == pytest.approx(moved, rel=0.02)
    flops = step_flops(program.config, program.groups, 128, 2048, masked=laid.kernels.masked_computed)
    assert estimate(laid, CHIPS[chip], flops, found, 128, 2048).step == pytest.approx(seconds, rel=0.03)


def test_collectives_of_a_program_with_loops():
    found = {one.kind: one for one in find_collectives(LOOPED)}
    by_channel = {(one.kind, one.group): one for one in find_collectives(LOOPED)}
    gather = by_channel["all-gather", 4]
    assert (gather.times, gather.size, gather.moved) == (5, 64 * 32 * 2, 64 * 32 * 2 * 3 / 4)
    assert (gather.stride, by_channel["all-reduce", 4].stride, by_channel["all-gather", 8].stride) == (1, 2, 1)
    assert gather.source == "jit(step)/q/dot"
    scatter = found["reduce-scatter"]  # each device keeps a quarter and receives three of that size
    assert (scatter.times, scatter.size, scatter.moved) == (5, 16 * 4 * 4, 3 * 16 * 4 * 4)
    started = by_channel["all-gather", 8]
    assert (started.times, started.size, started.hidden, started.beside) == (1, 16 * 8 * 4, 1, 0), "waited for at once"
    assert by_channel["all-reduce", 4].moved == pytest.approx(2 * 40 * 3 / 4)
    assert (found["collective-permute"].times, found["collective-permute"].moved) == (3, 16)
    assert found["all-to-all"].times == 4  # 8 by steps of 2
    assert len(find_collectives(LOOPED)) == 6


WRITTEN_OUT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%begun (p: bf16[8,64]) -> bf16[64,64] {
  %all-gather.4 = bf16[64,64]{1,0} all-gather(%p), channel_id=1, <groups>, frontend_attributes={chain_id="2"}, <k>
}

%async_collective_fusion.1 (p: bf16[8,64]) -> bf16[64,64] {
  %all-gather.5 = bf16[64,64]{1,0} all-gather(%p), channel_id=1, <groups>, frontend_attributes={chain_id="2"}, <k>
}

%other (p: bf16[8,64]) -> bf16[8,64] {
  %all-gather.6 = bf16[64,32]{1,0} all-gather(%p), channel_id=1, <groups>, <q>
}

ENTRY %main (p0: bf16[8,64]) -> bf16[8,64] {
  %all-gather.1 = bf16[64,32]{1,0} all-gather(%p0), channel_id=1, <groups>, <q>
  %all-gather.2 = bf16[64,32]{1,0} all-gather(%p1), channel_id=1, <groups>, <q>
  %first = bf16[64,64]{1,0} fusion(%p2), kind=kLoop, calls=%begun
  %rest = bf16[64,64]{1,0} fusion(%first), kind=kOutput, calls=%async_collective_fusion.1
  %loop = bf16[8,64] while(%p3), condition=%until, body=%other, backend_config={"known_trip_count":{"n":"11"}}
}

%until (p: bf16[8,64]) -> pred[] {
}
"""
for name in "qk":
    WRITTEN_OUT = WRITTEN_OUT.replace(f"<{name}>", f'metadata={{op_name="jit(step)/block/{name}/shard_map/all_gather"}}')
WRITTEN_OUT = WRITTEN_OUT.replace("<groups>", "replica_groups=[1,8]<=[8], dimensions={0}")


def test_collectives_of_one_name_and_channel_add_up_but_for_pieces_of_one():
    """As `shard_map` writes them: layers that are unrolled, or that a second loop goes on with, all have one name."""
    found = find_collectives(WRITTEN_OUT)
    assert [(one.times, one.hidden) for one in found if one.source.endswith("/q/shard_map/all_gather")] == [
        (11, False),
        (1, False),
        (1, False),
    ]
    assert [(one.times, one.hidden) for one in found if one.source.endswith("/k/shard_map/all_gather")] == [(1, True)]


APART = """HloModule jit_step, is_scheduled=true, num_partitions=8

%called (p: bf16[8,64], t: token[]) -> bf16[64,64] {
  %all-gather.1 = bf16[64,64]{1,0} all-gather(%p), channel_id=1, <groups>, metadata={op_name="jit(step)/q"}
}

%called.1 (p: f32[64,64], t: token[]) -> f32[8,64] {
  %reduce-scatter.1 = f32[8,64]{1,0} reduce-scatter(%p), channel_id=1, <groups>, to_apply=%add, metadata={op_name="jit(step)/k"}
}

%twice (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %scaled = bf16[8,64]{1,0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"50"}}
}

ENTRY %main (p0: bf16[8,64]) -> bf16[8,64] {
  %first.call-start = ((bf16[8,64]{1,0}, token[]), bf16[64,64]{1,0}) call-start(%p0, %t0), <sparse>, to_apply=%called
  %norm = f32[8]{0} fusion(%p0), kind=kLoop, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %kernel = f32[8]{0} custom-call(%norm), custom_call_target="tpu_custom_call"
  %second.call-start = ((f32[64,64]{1,0}, token[]), f32[8,64]{1,0}) call-start(%p1, %t1), <sparse>, to_apply=%called.1
  %loop = (s32[], bf16[8,64]) while(%p3), condition=%until, body=%twice, backend_config={"known_trip_count":{"n":"2"}}
  %first.call-done = bf16[64,64]{1,0} call-done(%first.call-start)
  %product = f32[8]{0} fusion(%norm), kind=kOutput, calls=%fused.2, backend_config={"window_config":{"estimated_cycles":"300"}}
  %second.call-done = f32[8,64]{1,0} call-done(%second.call-start)
  %after = f32[8]{0} fusion(%product), kind=kLoop, calls=%fused.3, backend_config={"window_config":{"estimated_cycles":"7000"}}
}

%until (p: (s32[], bf16[8,64])) -> pred[] {
}
""".replace("<groups>", "replica_groups=[1,8]<=[8], dimensions={0}").replace("<sparse>", 'async_execution_thread="sparsecore"')


WHOLE = 1000 + 2 * 50 + 300 + 7000  # cycles of the step


def test_what_runs_beside_a_collective_is_what_lies_between_its_start_and_the_wait_for_it():
    """As libtpu 0.0.42 writes what sparse cores do; two at once share the loop of two times 50 cycles."""
    scatter, gather = sorted(find_collectives(APART), key=lambda one: one.source)
    assert (gather.kind, gather.times, gather.hidden, gather.beside) == ("all-gather", 1, 1, (1000 + 2 * 50 / 2) / WHOLE)
    assert (scatter.kind, scatter.times, scatter.hidden, scatter.beside) == ("reduce-scatter", 1, 1, (2 * 50 / 2 + 300) / WHOLE)
    later = APART.replace("call-done(%first.call-start)", "call-done(%first.call-update)").replace(
        "  %kernel",
        "  %first.call-update = ((bf16[8,64]{1,0}), bf16[64,64]{1,0}) call-update(%first.call-start, %p0)\n  %kernel",
    )
    assert min(find_collectives(later), key=lambda one: one.kind).beside == 2 * 50 / 2 / WHOLE, "it begins with its operands"
    config = config_on((1, 8, 1))
    program = build_program(config, make_mesh(config.mesh), 1)
    flops = step_flops(config, program.groups, 8, 16)
    compute = estimate(program, CHIP, flops, [], 8, 16).compute

    def exposed(one: Collective) -> float:
        return estimate(program, CHIP, flops, [one], 8, 16).exposed

    long = dataclasses.replace(gather, times=3, moved=CHIP.link_bandwidth, beside=0.25 / compute)
    assert exposed(long) == pytest.approx(3 * (1 - 0.25)), "it is waited for as long as nothing is left to compute"
    assert exposed(dataclasses.replace(long, beside=2 / compute)) == 0
    assert exposed(dataclasses.replace(long, hidden=0.5)) == pytest.approx(3 * (1 - 0.5 * 0.25))


def test_unrolled_layers_gather_as_often_as_looped_ones():
    def gathered(scan: bool) -> dict[str, float]:
        config = config_on((1, 8, 1), {"decoder.scan": scan})
        sums: dict[str, float] = {}
        for one in make_plan(config, machine(), Wanted()).collectives:
            name = belongs_to(one.source)
            # Backward the compiler may find that unrolled layers have their weights already.
            if one.kind == "all-gather" and "/mlp/" in name and "," not in name:
                sums[name] = sums.get(name, 0) + one.total
        return sums

    looped = gathered(True)
    assert len(looped) == 3
    assert gathered(False) == looped


def test_a_ring_moves_what_the_others_hold():
    assert ring("all-gather", 1) == ring("all-reduce", 1) == ring("reduce-scatter", 1) == 0
    # reduce-scatter, then all-gather, is an all-reduce: per byte of the whole.
    assert ring("reduce-scatter", 4) / 4 + ring("all-gather", 4) == ring("all-reduce", 4)


def test_memory_splits_what_the_compiler_says_and_no_more():
    config = config_on((1, 8, 1))
    program = build_program(config, make_mesh(config.mesh), 1)
    own, more = state_memory(program, 8, 16), activation_memory(program, 8, 16)
    compiled = Compiled(sum(own) + 100, 50, 30, 10 * sum(more), 7, 0, "", 1.0)
    memory = memory_by_kind(own, more, compiled)
    assert sum(memory.values()) == pytest.approx(compiled.total)
    assert (memory["padding"], memory["code"], memory["gradients"]) == (100, 7, more.gradients)
    small = memory_by_kind(own, more, dataclasses.replace(compiled, temporaries=more.gradients / 2))
    assert sum(small.values()) == pytest.approx(compiled.total - 10 * sum(more) + more.gradients / 2)
    assert (small["stacks"], small["temporaries"]) == (0, 0)
    assert sum(memory_by_kind(own, more, Overflow(1e9, 1.0)).values()) == pytest.approx(1e9)


def test_gradients_and_activations_shrink_with_what_splits_them():
    def need(mesh, more=None):
        config = config_on(mesh, more)
        return activation_memory(build_program(config, make_mesh(config.mesh), 1), 8, 16)

    whole, split = need((8, 1, 1)), need((1, 8, 1))
    assert whole.gradients > 7 * split.gradients
    assert whole.activations == split.activations  # rows are split alike
    assert need((8, 1, 1), {"decoder.remat": "none"}).activations > 4 * whole.activations
    stacks = whole.stacks
    assert stacks == 2 * 4 * 1 * 4 * 4 * 32  # with its gradient: f32, 1 row, 4 groups of 4 tokens of width 32
    assert need((1, 8, 1), {"deepstack.stack": "none"}).stacks == 0
    # Along tensor the stack is cut by its width: twice the rows of each device, half of the width.
    assert need((2, 2, 2)).stacks == need((4, 1, 2)).stacks == stacks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch_size": 12}, "nearest valid: 8 or 16"),
        ({"mesh.fsdp": 3, "mesh.data": 1}, "does not cover 8 devices"),
        (
            {"mesh.fsdp": 1, "mesh.tensor": 8, "mesh.data": 1, "train.batch_size": 8},
            r"tensor 8 does not divide .*; nearest valid config.mesh.tensor on 8 devices: 2",
        ),
    ],
)
def test_what_does_not_divide_is_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_plan(config_on((1, 8, 1), changes), machine(), Wanted(), compiled=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["v7:2x2", "v5e", "v5e:2x2x2", "v5p:4x4", "gpu:H100", "gpu:8xH1000", "gpu:0xH100", "8xH100"])
def test_unknown_machines_name_what_is_known(name):
    with pytest.raises(ConfigError, match=r"v5p:|slices of v5|gpu:8xH100") as error:
        open_machine(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gpu:1000000000xH100", "gpu:9999xH100", "v5p:99999999x4x4", "v6e:9999x9999"])
def test_machines_of_absurd_sizes_are_refused_before_they_are_laid_out(name):
    with pytest.raises(ConfigError, match=r"1 to 4096 GPUs|has no shape of"):
        open_machine(name)


@pytest.mark.parametrize(
    ("google", "ours"),
    [
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-8192", "v5p:16x16x16"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-16", "v5e:4x4"),
        ("v6e-8", "v6e:2x4"),
        ("v6e-256", "v6e:16x16"),
        ("v5p:4x4x4", "v5p:4x4x4"),
    ],
)
def test_googles_names_count_cores_on_v5p_and_chips_elsewhere(google, ours):
    assert with_shape(google) == ours


def test_a_machine_that_is_not_there_names_those_that_are():
    for name, meant in (("L40S", "L40S"), ("RTX 4090", "RTX4090")):
        with pytest.raises(ConfigError, match=f"--topology={name} is unknown; e.g. gpu:1x{meant}$"):
            open_machine(name)
    with pytest.raises(ConfigError, match=r"--topology=v5p-100 is not a slice of v5p; known: v5p-8, v5p-16, .*v5p-128"):
        open_machine("v5p-100")


@pytest.mark.parametrize(
    ("kind", "terabytes", "tera"),
    [
        ("L40S", 0.864, 362.05),
        ("RTX A6000", 0.768, 154.8),
        ("A6000", 0.768, 154.8),
        ("RTX 4090", 1.008, 165.2),
        ("rtx-3090", 0.936, 71),
        ("A10G", 0.6, 70),
        ("L4", 0.3, 121),
        ("MI300X", 5.3, 1307.4),
        ("NVIDIA H100 80GB HBM3", 3.35, 989.4),
        ("A100-80GB", 2.039, 312),
    ],
)
def test_gpus_by_the_names_that_people_write(kind, terabytes, tera):
    """Bandwidth and dense bf16 arithmetic as the data sheets print them."""
    chip = open_machine(f"gpu:2x{kind}").chip
    assert chip is not None
    assert (chip.hbm_bandwidth, chip.flops) == (pytest.approx(terabytes * 1e12), pytest.approx(tera * 1e12))
    assert chip.network > 0


STEP, BACK = "jit(train_step)", "jit(train_step)/transpose(jvp(DeepStack))"
TOWER = "DeepStack.inputs/DeepStack.encode/vision_tower/vision_tower._scan/while/body/closed_call"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "not named by the compiler"),
        ("parameters, estimated", "parameters, estimated"),
        (f"{STEP}/jvp(DeepStack)/{TOWER}/EncoderLayer/norm1/mul", "vision_tower/EncoderLayer/norm1/mul"),
        (
            f"{BACK}/{TOWER}/checkpoint/EncoderLayer/o/add",
            "vision_tower/EncoderLayer/o/add, backward",
        ),
        (
            f"{BACK}/layers/while/body/checkpoint/rematted_computation/mlp/up/dot_general",
            "layers/mlp/up/dot_general, recomputed",
        ),
        (
            f"{STEP}/(add:reduce_sum:transpose(jvp(DeepStack))/layers/norm/reduce_sum)",
            "layers/norm/reduce_sum, backward",
        ),
        (f"{STEP}/while/body", "the step itself"),
    ],
)
def test_traffic_says_what_it_belongs_to(source, said):
    assert belongs_to(source) == said


def test_slices_have_the_dimensions_of_their_torus():
    for family, chip in (("v5e", "TPU v5 lite"), ("v5p", "TPU v5"), ("v6e", "TPU v6 lite")):
        assert all(name.count("x") + 1 == CHIPS[chip].links for name in SLICES[family].shapes)


def test_gpu_nodes_are_described_by_simulated_devices():
    node = open_machine("gpu:8xH100")
    assert (len(node.devices), node.hosts, node.compiler) == (8, 1, "")
    plan = make_plan(config_on((1, 8, 1)), node, Wanted())  # nothing can be compiled for them
    assert plan.source == "estimate"
    assert plan.kernel == "xla"  # the tiny model computes in float32
    half = config_on((1, 8, 1), {"train.compute_dtype": "bfloat16"})
    flash, plain = (make_plan(half, one, Wanted(), compiled=False) for one in (node, machine()))
    assert (flash.kernel, plain.kernel) == ("cudnn", "xla")
    assert flash.memory["temporaries"] < plain.memory["temporaries"], "a flash kernel keeps no scores"
    assert flash.executed_flops < plain.executed_flops, "nor computes those that are masked"
    assert {one.kind for one in plan.collectives} == {"all-gather", "reduce-scatter"}
    assert plan.compile_seconds == 0
    with pytest.raises(ConfigError, match="xla_force_host_platform_device_count=16"):
        open_machine("gpu:16xH100")
    with pytest.raises(ConfigError, match=r"--slices=2 with --topology=gpu:8xH100: only TPUs come in slices"):
        open_machine("gpu:8xH100", slices=2)


def test_a_packed_step_has_rows_for_its_examples():
    packed = config_on((1, 8, 1), {"data.packing.enabled": True, "data.max_length": 840, "train.batch_size": 64})
    mesh = make_mesh(packed.mesh)
    load = plan_load(packed, mesh, 1, Wanted())
    assert load.assumed
    assert load.rows == 16  # 840 positions hold four examples of 4 visual and 200 text tokens
    told = plan_load(packed, mesh, 1, Wanted(per_row=2.0, epoch=640))
    assert (told.rows, told.examples, told.steps) == (32, 64, 10)
    # 64 / 3.2 = 20 rows do not divide over 8 devices: 24, of which 20 are filled, as the run itself has it.
    assert plan_load(packed, mesh, 1, Wanted(per_row=3.2)).rows == 24 == packed_rows(Fraction(20), 8)[0]


def test_the_epoch_is_that_of_the_sets():
    sets = {"a": {"file": "a.json", "rows": 100, "repeat": 0.5}, "b": {"file": "b.json", "rows": 30}}
    config = config_on((1, 8, 1), {"data.sets": sets})
    mesh = make_mesh(config.mesh)
    assert plan_load(config, mesh, 1, Wanted()).steps == 10
    assert (
        plan_load(dataclasses.replace(config, data=dataclasses.replace(config.data, train="x.json")), mesh, 1, Wanted()).steps
        == 0
    )


def test_search_compiles_until_one_fits():
    config = config_on((8, 1, 1))
    meshes = {(one.mesh.data, one.mesh.fsdp, one.mesh.tensor) for one in candidates(config, 8)}
    assert {(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)} <= meshes
    told: list[Plan] = []
    search = find_best(config, machine(1e9, 2), Wanted(), margin=0.1, tries=1, compiling=told.append)
    assert len(told) == 1
    assert search.found is not None
    assert search.found.compile_seconds > 0
    assert search.found.fits(0.1)
    assert search.compiled == ()
    assert search.estimates[0].roofline.step == min(one.roofline.step for one in search.estimates)


def test_a_search_whose_compilations_do_not_fit_recommends_nothing(monkeypatch):
    """Estimates fit the memory and the compiled steps do not: none of them is passed off as what to take."""

    def compiled_larger(config, machine, wanted):
        plan = make_plan(config, machine, wanted, compiled=False)
        return dataclasses.replace(plan, memory=plan.memory | {"temporaries": machine.usable}, compile_seconds=1.0)

    monkeypatch.setattr("deepstack_jax.plan.search.make_plan", compiled_larger)
    search = find_best(config_on((8, 1, 1)), machine(1e9, 2), Wanted(), margin=0.1, tries=2, compiling=lambda _: None)
    assert search.estimates[0].fits(0.1)
    assert search.found is None
    assert len(search.compiled) == 2
    assert search.least in search.compiled
    assert not search.least.fits(0.1)


def test_a_search_learns_from_what_did_not_fit(monkeypatch):
    """Where steps without remat need twice what was estimated, it goes on to a policy that is known no better, or fits."""
    tried: list[Plan] = []

    def compiled_larger(config, machine, wanted):
        plan = make_plan(config, machine, wanted, compiled=False)
        more = plan.used if plan.remat == "none" else 0.0
        return dataclasses.replace(plan, memory=plan.memory | {"code": more}, compile_seconds=1.0)

    monkeypatch.setattr("deepstack_jax.plan.search.make_plan", compiled_larger)
    config = config_on((8, 1, 1), {"train.batch_size": 64})
    estimates = find_best(config, machine(1e9, 2), Wanted(), margin=0.0, tries=0, compiling=print).estimates
    fastest = estimates[0]
    assert fastest.remat == "none"
    tight = machine(1.5 * fastest.used, 2)
    search = find_best(config, tight, Wanted(), margin=0.0, tries=9, compiling=tried.append)
    assert search.found is not None
    assert search.found.fits()
    assert tried[0].remat == "none"
    skipped = [one for one in estimates if one.remat == "none" and one not in tried and one.used > 0.75 * fastest.used]
    assert skipped, "those that would need as much are not compiled"


def test_batch_sizes_are_compared_by_the_time_of_an_example():
    config = config_on((2, 1, 1))
    search = find_best(config, machine(1e9, 2), Wanted(), margin=0.1, tries=0, compiling=print, batch_sizes=(4, 8, 64))
    assert {one.load.rows for one in search.estimates} == {4, 8, 64}
    assert search.found is not None
    assert search.found.load.rows == 64, "weights are read once for all rows"


def test_the_nearest_that_fits_changes_least():
    config = config_on((2, 1, 1), {"decoder.remat": "dots"})
    none_fits = make_plan(config, machine(1e3, 2), Wanted(), compiled=False)
    roomy = find_best(config, machine(1e9, 2), Wanted(), margin=0.1, tries=0, compiling=print, like=none_fits)

    def changes(plan: Plan) -> int:
        return (plan.mesh != none_fits.mesh) + (plan.remat != "dots") + (plan.accumulation != 1)

    assert roomy.found is not None
    assert min(map(changes, roomy.estimates)) == 1, "the plan that does not fit is not tried again"
    assert changes(roomy.found) == 1
    tight = machine(1.2 * none_fits.used, 2)
    search = find_best(config, tight, Wanted(), margin=0.2, tries=0, compiling=print, like=none_fits)
    assert search.found is not None
    assert search.found.fits(0.2)
    assert changes(search.found) == min(changes(one) for one in search.estimates if one.fits(0.2))


def test_search_without_room_says_what_needs_least():
    told: list[Plan] = []
    search = find_best(config_on((2, 1, 1)), machine(1e3, 2), Wanted(), margin=0.1, tries=1, compiling=told.append)
    assert search.found is None
    assert search.estimates[0].used == min(one.used for one in search.estimates)
    assert search.least == search.compiled[0]
    assert verdict(search.least).startswith("does not fit")


def test_links_are_faster_where_all_chips_take_part():
    def over(group: int, stride: int) -> Collective:
        return Collective("all-gather", 2, 100, 6e11, group, stride, "")

    torus = (4, 4, 4)
    of_all = {(64, 1): 3, (16, 1): 2, (16, 4): 2, (4, 1): 1, (4, 4): 1, (4, 16): 1, (2, 1): 1}
    for group, dimensions in of_all.items():
        assert link_rate(CHIP, over(*group), torus) == pytest.approx(CHIP.link_bandwidth * dimensions / 3), group
    assert link_rate(CHIP, over(8, 1), (8,)) == CHIP.link_bandwidth, "a whole slice, whatever it looks like"
    node = CHIPS["NVIDIA H100 80GB HBM3"]
    assert link_rate(node, over(8, 1), (64,)) == node.link_bandwidth
    assert link_rate(node, over(64, 1), (64,)) == 8 * node.network
    assert link_rate(node, over(8, 8), (64,)) == node.network  # one device of every host
    config = config_on((1, 8, 1))
    program = build_program(config, make_mesh(config.mesh), 1)
    flops = step_flops(config, program.groups, 8, 16)
    assert estimate(program, CHIP, flops, [over(8, 1)], 8, 16).links == pytest.approx(2.0)
