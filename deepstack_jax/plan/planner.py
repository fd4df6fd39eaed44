"""From a configuration and a machine to a plan."""

import dataclasses
import math
from fractions import Fraction

from jax.sharding import Mesh

from deepstack_jax.config import Config, DataConfig, DataSpec
from deepstack_jax.data.order.batches import packed_rows
from deepstack_jax.errors import ConfigError
from deepstack_jax.parallel.kernels import kernels_for
from deepstack_jax.parallel.mesh import check_batch_fits, make_mesh
from deepstack_jax.plan.collectives import find_collectives
from deepstack_jax.plan.compile import Compiled, Overflow, compile_step
from deepstack_jax.plan.memory import ActivationMemory, StateMemory, activation_memory, state_memory
from deepstack_jax.plan.report import Load, Plan
from deepstack_jax.plan.roofline import at_peak, estimate, guess_collectives
from deepstack_jax.plan.topology import Machine
from deepstack_jax.train.core.program import Program, build_program, no_fp8
from deepstack_jax.train.flops import step_flops

# Text tokens of an example, where packed rows are to be counted without their data: about the mean of LLaVA's 665k.
ASSUMED_TEXT = 200


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the user says of the data, which a plan does not open."""

    epoch: int = 0  # examples per epoch; 0 = as the configuration's sets say
    per_row: float = 0.0  # examples in a packed row; 0 = assumed from the lengths


def make_plan(config: Config, machine: Machine, wanted: Wanted, *, compiled: bool = True) -> Plan:
    """Plan a run of `config` on `machine`; `compiled=False` estimates in seconds what the compiler says in minutes.

    Machines without a compiler here, GPUs that is, are estimated only.

    Raises:
      ConfigError: a mesh or a batch that does not divide, with the nearest valid numbers; fp8 on chips that have none.
    """
    if config.train.matmul == "fp8" and machine.chip and not machine.chip.fp8:
        raise ConfigError(no_fp8(machine.name))
    mesh = make_mesh(config.mesh, machine.devices)
    load = plan_load(config, mesh, machine.hosts, wanted)
    program = build_program(config, mesh, max(load.steps, 1))
    result = compile_step(program, load.rows, load.length) if compiled and machine.compiler else None
    return assemble_plan(program, machine, load, result)


def assemble_plan(program: Program, machine: Machine, load: Load, result: Compiled | Overflow | None) -> Plan:
    """The plan of a program, with what its compilation gave."""
    config = program.config
    if not machine.compiler:  # the simulated CPU devices that stand for GPUs have another kernel
        program = dataclasses.replace(program, kernels=kernels_for("gpu", config))
    own, more = state_memory(program, load.rows, load.length), activation_memory(program, load.rows, load.length)
    flops = step_flops(config, program.groups, load.rows, load.length, masked=program.kernels.masked_computed)
    if isinstance(result, Compiled):
        collectives = tuple(find_collectives(result.text))
    else:
        collectives = tuple(guess_collectives(program, load.rows, load.length, machine.slices))
    roofline = mfu = None
    if machine.chip:
        roofline = estimate(program, machine.chip, flops, collectives, load.rows, load.length, slices=machine.slices)
        mfu = at_peak(config, machine.chip, {part.name: part.model for part in flops.parts})
        mfu /= roofline.step * len(machine.devices)
    return Plan(
        name=config.name,
        topology=machine.name,
        devices=len(machine.devices),
        hosts=machine.hosts,
        mesh=dict(program.mesh.shape),
        kernel=program.kernels.decoder,
        remat=config.decoder.remat,
        accumulation=config.train.accumulation,
        load=load,
        source=machine.compiler if result else "estimate",
        memory=memory_by_kind(own, more, result),
        host_memory=result.host if isinstance(result, Compiled) else 0.0,
        usable=machine.usable,
        parts=flops.parts,
        model_flops=flops.model,
        executed_flops=flops.executed,
        collectives=collectives,
        roofline=roofline,
        mfu=mfu,
        compile_seconds=result.seconds if result else 0.0,
    )


def memory_by_kind(own: StateMemory, more: ActivationMemory, result: Compiled | Overflow | None) -> dict[str, float]:
    """Bytes of each device by kind; the sum is the compiler's where it gave one, how it splits is estimated."""
    memory, estimates = own._asdict(), more._asdict()
    working = estimates.pop("working")
    if result is None:
        return memory | estimates | {"temporaries": working}
    left, code = result.total - sum(own), 0.0
    if isinstance(result, Compiled):
        memory["padding"] = result.arguments - sum(own)
        code = result.code
        left -= memory["padding"] + code
    for name, size in estimates.items():
        memory[name] = min(size, max(left, 0.0))
        left -= memory[name]
    return memory | {"temporaries": max(left, 0.0), "code": code}


def plan_load(config: Config, mesh: Mesh, hosts: int, wanted: Wanted) -> Load:
    """Rows of a step and steps of the run, without opening the data.

    Raises:
      ConfigError: the batch does not split over the mesh, with the nearest valid one.
    """
    data, train = config.data, config.train
    if data.packing.enabled:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        each = wanted.per_row or assumed_per_row(config.data_spec)
        divisor = math.lcm(shards, hosts) * train.accumulation
        rows, _ = packed_rows(Fraction(train.batch_size / each), divisor)
        said = "as told" if wanted.per_row else "assumed; --examples_per_row=N sets it"
        assumed = f"{each:.2f} examples per packed row, {said}"
    else:
        check_batch_fits(train, mesh)
        rows, assumed = train.batch_size, ""
    epoch = wanted.epoch or known_examples(data)
    steps = train.steps or (max(1, round(train.epochs * epoch / train.batch_size)) if epoch else 0)
    return Load(rows, data.max_length, float(train.batch_size), steps, assumed)


def assumed_per_row(spec: DataSpec) -> float:
    """Examples that a packed row holds, if each has one image and so many text tokens."""
    each = spec.layout.max_tokens + ASSUMED_TEXT
    return max(1.0, min(spec.data.max_length / each, spec.images_per_row, spec.data.packing.max_examples))


def known_examples(data: DataConfig) -> int:
    """Examples per epoch that the configuration itself names; 0 = it does not."""
    if data.generated is not None:
        return data.generated.length
    sets = () if data.train else data.sets.values()
    return round(sum(one.rows * one.repeat for one in sets)) if all(one.rows for one in sets) else 0
