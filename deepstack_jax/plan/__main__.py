"""What a run costs before the machine is rented: `python -m deepstack_jax.plan --config=... --topology=v5p:4x4x4`."""

import json
import math
import os
import re
from collections.abc import Sequence

import jax
from absl import flags
from rich.table import Table

from deepstack_jax import cli
from deepstack_jax.errors import ConfigError
from deepstack_jax.plan.planner import Wanted, make_plan
from deepstack_jax.plan.report import Plan, gib, print_tables
from deepstack_jax.plan.search import Search, find_best
from deepstack_jax.plan.topology import examples, open_machine
from deepstack_jax.printing import Console, plural, quote

USAGE = """
What a run costs on a machine that is not here: memory per chip, FLOPs, traffic, step time and hours. The very training step is
compiled for the machine; no data and no weights are opened.

  python -m deepstack_jax.plan --config=configs/llava15.py:finetune --topology=v5p:4x4x4
  python -m deepstack_jax.plan --config=configs/llava15.py:finetune --topology=v5e:8x8 --search
  python -m deepstack_jax.plan --config=configs/demo.py --topology=here --json

  --config=FILE[:ARGUMENT]   configuration file; --config.KEY=VALUE overrides any key of it
  --topology=NAME            v5e:8x8, v5p:4x4x4 or Google's v5p-128, v6e:8x8 (TPU slices; in a clone pip install '.[plan]'),
                             gpu:8xH100, gpu:1xRTX4090 (estimated only), here (the devices of this machine)
  --slices=2                 so many of the TPU slice, joined by the data center's network
  --search                   try meshes, remat policies and micro-batches, and recommend one
  --batch_sizes=128,256      global batches for a search to try as well; else the configuration's own
  --tries=4                  most compilations of a search, or after a step that does not fit; a minute or two each at 7B
  --margin=0.1               share of the memory that a recommendation leaves free
  --estimate_only            compile nothing: seconds instead of minutes, and no compiler is needed
  --examples=N               examples per epoch, where the configuration's sets do not say
  --examples_per_row=X       with packing, which is planned without its data
  --json                     the plan as JSON on stdout

Exit codes: 0 it fits; 1 a mistake in the input, said in one line; 2 it does not fit, or nothing that a search tried does.
"""
EXIT_DOES_NOT_FIT = 2

FLAGS = (
    (TOPOLOGY := cli.Flag(flags.DEFINE_string, "topology", None, "Machine to plan for.")),
    (SLICES := cli.Flag(flags.DEFINE_integer, "slices", 1, "TPU slices.", lower_bound=1, upper_bound=1024)),
    (SEARCH := cli.Flag(flags.DEFINE_bool, "search", False, "Recommend mesh, remat policy and micro-batches.")),
    (BATCH_SIZES := cli.Flag(flags.DEFINE_list, "batch_sizes", [], "Global batches to try.")),
    (TRIES := cli.Flag(flags.DEFINE_integer, "tries", 4, "Most compilations of a search.", lower_bound=1)),
    (MARGIN := cli.Flag(flags.DEFINE_float, "margin", 0.1, "Share of memory left free.", lower_bound=0.0, upper_bound=0.9)),
    (ESTIMATE_ONLY := cli.Flag(flags.DEFINE_bool, "estimate_only", False, "Estimate without compiling.")),
    (EXAMPLES := cli.Flag(flags.DEFINE_integer, "examples", 0, "Examples per epoch.", lower_bound=0, upper_bound=10**12)),
    (PER_ROW := cli.Flag(flags.DEFINE_float, "examples_per_row", 0.0, "In a packed row.", lower_bound=0.0, upper_bound=1e6)),
    (JSON := cli.Flag(flags.DEFINE_bool, "json", False, "JSON on stdout.")),
    cli.CONFIG,
)


def main() -> int:
    config = cli.parse_config()
    if not TOPOLOGY.value:
        raise ConfigError(f"--topology is missing; e.g. {', '.join(f'--topology={name}' for name in examples())}")
    for flag in (MARGIN, PER_ROW):
        if math.isnan(flag.value):  # which absl's bounds let through
            raise ConfigError(f"--{flag.name}=nan, expected a number")
    if wrong := [size for size in BATCH_SIZES.value if not re.fullmatch(r"0*[1-9]\d{0,6}", size)]:
        raise ConfigError(f"--batch_sizes: {quote(wrong[0])} is not a whole number from 1 to 9,999,999; e.g. 128,256")
    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is part of the plan
    machine = open_machine(TOPOLOGY.value, SLICES.value)
    wanted = Wanted(EXAMPLES.value, PER_ROW.value)
    out, progress = Console(), Console(stderr=True)

    def compiling(plan: Plan) -> None:
        progress.print(f"compiling {choice(plan)}, estimated {gib(plan.used)} per device", soft_wrap=True)

    def search(like: Plan | None = None) -> Search:
        tries = 0 if ESTIMATE_ONLY.value else TRIES.value
        sizes = [int(size) for size in BATCH_SIZES.value] if not like else ()
        return find_best(
            config, machine, wanted, margin=MARGIN.value, tries=tries, compiling=compiling, like=like, batch_sizes=sizes
        )

    searched = None
    if SEARCH.value:
        searched = search()
        plan = searched.found or searched.least
    else:
        plan = make_plan(config, machine, wanted, compiled=False)  # also says what is wrong, before minutes pass
        if machine.compiler and not ESTIMATE_ONLY.value:
            compiling(plan)
            plan = make_plan(config, machine, wanted)
        if not plan.fits():
            try:
                searched = search(plan)
            except ConfigError as error:  # there is nothing else to try, but the plan is valid
                progress.print(f"warning: {error}", soft_wrap=True)
    print_plan(plan, searched, out)
    return cli.EXIT_DONE if plan.fits(MARGIN.value if SEARCH.value else 0.0) else EXIT_DOES_NOT_FIT


def print_plan(plan: Plan, searched: Search | None, console: Console) -> None:
    """The plan, and what else there is: the recommendation of a search, or the nearest that fits."""
    found = searched.found if searched else None
    if JSON.value:
        tried = [tried_entry(one) for one in searched.estimates] if searched else []
        nearest = found.as_dict() if found and not SEARCH.value else None
        console.file.write(json.dumps(plan.as_dict() | {"tried": tried, "nearest": nearest}) + os.linesep)
        return
    if searched:
        console.print(tried_table(searched.estimates))
    print_tables(plan, console)
    if searched and not found:
        console.print(no_mesh(searched), soft_wrap=True)
    elif found:
        how = "recommended" if SEARCH.value else "nearest that fits"
        how += ", as estimated" if found.source == "estimate" else ""
        console.print(f"{how}: {as_flags(found)}", soft_wrap=True)
        if found is not plan:
            console.print(f"which takes {gib(found.used)} per device")


def no_mesh(searched: Search) -> str:
    least, known = searched.least, "estimated" if not searched.compiled else "compiled"
    return (
        f"no mesh of {least.topology} was found that fits with {MARGIN.value:.0%} to spare; the least memory, as {known}: "
        f"{as_flags(least)}, {gib(least.used)} per device of {gib(least.usable)}; take more or larger chips"
        + (", or more --tries" if searched.compiled else "")
    )


def as_flags(plan: Plan) -> str:
    """What to add to the command line of `train`."""
    mesh = " ".join(f"--config.mesh.{name}={size}" for name, size in plan.mesh.items())
    batch = f" --config.train.batch_size={plan.load.examples:g}" if BATCH_SIZES.value else ""
    return f"{mesh} --config.decoder.remat={plan.remat} --config.train.accumulation={plan.accumulation}{batch}"


def choice(plan: Plan) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    batch = f", batch {plan.load.examples:g}" if BATCH_SIZES.value else ""
    return f"{mesh}, remat {plan.remat!r}, {plural(plan.accumulation, 'micro-batch', 'micro-batches')}{batch}"


def tried_entry(plan: Plan) -> dict[str, object]:
    """What a search looks at."""
    step = plan.roofline.step if plan.roofline else None
    return {"mesh": plan.mesh, "remat": plan.remat, "accumulation": plan.accumulation, "used": plan.used, "step": step}


def tried_table(tried: Sequence[Plan]) -> Table:
    """The best estimates of a search."""
    table = Table("mesh, remat, micro-batches", "GiB per device", "step, s", "MFU", title=f"{len(tried)} estimated; the best")
    for plan in tried[:8]:
        step, mfu = (f"{plan.roofline.step:.3f}", f"{plan.mfu:.0%}") if plan.roofline and plan.mfu else ("", "")
        table.add_row(choice(plan), f"{plan.used / 2**30:.2f}", step, mfu)
    return table


if __name__ == "__main__":
    cli.run(main, USAGE, FLAGS)
