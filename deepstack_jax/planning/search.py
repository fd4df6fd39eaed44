"""Which mesh, remat policy and number of micro-batches to take on a machine: all estimated, the promising ones compiled."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator

from deepstack_jax.config import Config, MeshConfig
from deepstack_jax.config_checks import ConfigError
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.planning.planner import Wanted, describe, make_plan, plan_load
from deepstack_jax.planning.report import Plan
from deepstack_jax.planning.topology import Machine
from deepstack_jax.training.program import Program, build_program

TENSOR = (1, 2, 4, 8)  # beyond a host's devices tensor parallelism waits for slower links
REMAT = ("none", "dots", "block")  # not "offload", whose traffic with the host is not in the estimate


def find_best(
    config: Config,
    machine: Machine,
    wanted: Wanted,
    *,
    margin: float,
    tries: int,
    compiling: Callable[[Plan], None],
    like: Plan | None = None,
) -> tuple[Plan | None, list[Plan]]:
    """The fastest that fits, by estimate, whose compilation says so too.

    Args:
      config: whose mesh, remat policy and micro-batches are open; the rest, the global batch too, stays.
      margin: share of the memory that must stay free.
      tries: most compilations, a minute or two each at 7B; 0 = trust the estimates.
      compiling: told the estimate that is compiled next.
      like: a plan that does not fit; then the nearest to it that does is looked for, fewest changes first.

    Returns:
      What was found, or None; and all estimates, best first.

    Raises:
      ConfigError: no mesh divides the model and the batch.
    """
    estimates = estimate_all(config, machine, wanted)
    estimates.sort(key=lambda pair: order(pair[0], margin, like))
    all_of_them = [estimate for estimate, _ in estimates]
    if tries == 0:
        return (all_of_them[0] if all_of_them[0].fits(margin) else None), all_of_them
    for estimate, candidate in estimates[:tries]:
        compiling(estimate)
        try:
            plan = make_plan(candidate, machine, wanted)
        except ConfigError as error:
            logging.warning("%s", error)
            continue
        if plan.fits(margin):
            return plan, all_of_them
    return None, all_of_them


def estimate_all(config: Config, machine: Machine, wanted: Wanted) -> list[tuple[Plan, Config]]:
    """Every candidate with its estimate. A mesh's program is traced once: policy and micro-batches change no parameter."""
    found, problem = [], ""
    programs: dict[MeshConfig, Program] = {}
    for candidate in candidates(config, len(machine.devices)):
        try:
            if candidate.mesh not in programs:
                programs[candidate.mesh] = build_program(candidate, make_mesh(candidate.mesh, machine.devices), steps=1)
            program = dataclasses.replace(programs[candidate.mesh], config=candidate)
            found.append(
                (describe(program, machine, plan_load(candidate, program.mesh, machine.hosts, wanted), None), candidate)
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
    changes = 0
    if like:
        pairs = ((plan.mesh, like.mesh), (plan.remat, like.remat), (plan.accumulation, like.accumulation))
        changes = sum(ours != theirs for ours, theirs in pairs)
    return (False, changes, plan.roofline.likely if plan.roofline else 0.0, plan.used)


def candidates(config: Config, devices: int) -> Iterator[Config]:
    """Every mesh whose rows divide, with every remat policy and power of two of micro-batches."""
    for tensor in TENSOR:
        for fsdp in range(1, devices // tensor + 1):
            if devices % (tensor * fsdp):
                continue
            mesh = MeshConfig(data=devices // (tensor * fsdp), fsdp=fsdp, tensor=tensor)
            for accumulation in _micro_batches(config, devices // tensor):
                for remat in REMAT:
                    decoder = dataclasses.replace(config.decoder, remat=remat)
                    train = dataclasses.replace(config.train, accumulation=accumulation)
                    yield dataclasses.replace(config, mesh=mesh, decoder=decoder, train=train)


def _micro_batches(config: Config, shards: int) -> list[int]:
    """Powers of two that leave every device a row, packed rows being as many as divide."""
    most = max(1, config.train.batch_size // shards)
    return [2**power for power in range(most.bit_length()) if config.data.packing.enabled or most % 2**power == 0]
