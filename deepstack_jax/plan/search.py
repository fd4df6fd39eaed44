"""Which mesh, remat policy, batch size and number of micro-batches to take: all estimated, the promising ones compiled."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from deepstack_jax.config import Config, MeshConfig
from deepstack_jax.errors import ConfigError
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.plan.planner import Wanted, assemble_plan, make_plan, plan_load
from deepstack_jax.plan.report import Plan
from deepstack_jax.plan.topology import Machine
from deepstack_jax.train.core.program import Program, build_program

TENSOR = (1, 2, 4, 8)  # beyond a host's devices tensor parallelism waits for slower links
REMAT = ("none", "minimal", "dots", "block")  # not "offload", whose traffic with the host is not in the estimate


@dataclass(frozen=True)
class Search:
    """What a search came to."""

    found: Plan | None  # what to take: compiled, or estimated where nothing is compiled; None = nothing was found that fits
    compiled: tuple[Plan, ...]  # compilations that left too little memory free, in their order
    estimates: tuple[Plan, ...]  # of all candidates, best first

    @property
    def least(self) -> Plan:
        """What needs least memory: of the compilations, or by estimate where there are none."""
        return min(self.compiled or self.estimates, key=lambda plan: plan.used)


def find_best(
    config: Config,
    machine: Machine,
    wanted: Wanted,
    *,
    margin: float,
    tries: int,
    compiling: Callable[[Plan], None],
    like: Plan | None = None,
    batch_sizes: Sequence[int] = (),
) -> Search:
    """The fastest that fits, by estimate, whose compilation says so too.

    A compilation that needs more than was estimated says by how much the others of its remat policy were underestimated, too.

    Args:
      config: whose mesh, remat policy and micro-batches are open.
      margin: share of the memory that must stay free.
      tries: most compilations; 0 = trust the estimates.
      compiling: is called with the estimate that is compiled next.
      like: a plan that does not fit; then the nearest to it that does is looked for, fewest changes first.
      batch_sizes: global ones to try; none = the configuration's own.

    Raises:
      ConfigError: no mesh divides the model and the batch.
    """
    pairs = estimate_all(config, machine, wanted, batch_sizes)
    if like:
        pairs = [pair for pair in pairs if _changes(pair[0], like)] or pairs  # itself is known not to fit
    pairs.sort(key=lambda pair: order(pair[0], margin, like))
    estimates = tuple(estimate for estimate, _ in pairs)
    if tries == 0 or not machine.compiler:
        return Search(estimates[0] if estimates[0].fits(margin) else None, (), estimates)
    compiled: list[Plan] = []
    short: dict[str, float] = {}  # by remat policy: compiled over estimated memory
    for estimate, candidate in pairs:
        # An estimate that is so many times too small fits where so much more stays free.
        if estimate.fits(margin) and not estimate.fits(1 - (1 - margin) / short.get(estimate.remat, 1.0)):
            continue
        if tries == 0:
            break
        tries -= 1
        compiling(estimate)
        try:
            plan = make_plan(candidate, machine, wanted)
        except ConfigError as error:
            logging.warning("%s", error)
            continue
        if plan.fits(margin):
            return Search(plan, tuple(compiled), estimates)
        compiled.append(plan)
        short[plan.remat] = plan.used / estimate.used
    return Search(None, tuple(compiled), estimates)


def estimate_all(
    config: Config, machine: Machine, wanted: Wanted, batch_sizes: Sequence[int] = ()
) -> list[tuple[Plan, Config]]:
    """Every candidate with its estimate. A mesh's program is traced once: policy and batches change no parameter."""
    found, problem = [], ""
    programs: dict[MeshConfig, Program] = {}
    for candidate in candidates(config, len(machine.devices), batch_sizes):
        try:
            if candidate.mesh not in programs:
                programs[candidate.mesh] = build_program(candidate, make_mesh(candidate.mesh, machine.devices), steps=1)
            program = dataclasses.replace(programs[candidate.mesh], config=candidate)
            found.append(
                (assemble_plan(program, machine, plan_load(candidate, program.mesh, machine.hosts, wanted), None), candidate)
            )
        except ConfigError as error:
            problem = str(error)
    if not found:
        raise ConfigError(f"no mesh of {machine.name} divides the model and the batch: {problem}")
    return found


def order(plan: Plan, margin: float, like: Plan | None) -> tuple[bool, int, float, float]:
    """Those that fit first, the nearest to `like` and the fastest of them first; of the others the one that needs least."""
    if not plan.fits(margin):
        return (True, 0, plan.used, plan.used)
    changes = _changes(plan, like) if like else 0
    return (False, changes, plan.roofline.step / plan.load.examples if plan.roofline else 0.0, plan.used)


def _changes(plan: Plan, like: Plan) -> int:
    pairs = ((plan.mesh, like.mesh), (plan.remat, like.remat), (plan.accumulation, like.accumulation))
    return sum(ours != theirs for ours, theirs in pairs)


def candidates(config: Config, devices: int, batch_sizes: Sequence[int] = ()) -> Iterator[Config]:
    """Every mesh whose rows divide, with every remat policy, batch size and power of two of micro-batches."""
    for tensor in sorted({*TENSOR, max(1, config.mesh.tensor)}):
        for fsdp in range(1, devices // tensor + 1):
            if devices % (tensor * fsdp):
                continue
            mesh = MeshConfig(data=devices // (tensor * fsdp), fsdp=fsdp, tensor=tensor)
            for batch_size in batch_sizes or (config.train.batch_size,):
                for accumulation in _micro_batches(config, batch_size, devices // tensor):
                    for remat in REMAT:
                        decoder = dataclasses.replace(config.decoder, remat=remat)
                        train = dataclasses.replace(config.train, accumulation=accumulation, batch_size=batch_size)
                        yield dataclasses.replace(config, mesh=mesh, decoder=decoder, train=train)


def _micro_batches(config: Config, batch_size: int, shards: int) -> list[int]:
    """Powers of two that leave every device a row, packed rows being as many as divide."""
    most = max(1, batch_size // shards)
    return [2**power for power in range(most.bit_length()) if config.data.packing.enabled or most % 2**power == 0]
