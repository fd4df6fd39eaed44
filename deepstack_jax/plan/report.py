"""A plan: what a configuration costs on a machine, as numbers for a program and as tables for a reader."""

import re
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from deepstack_jax.parallel.chips import GIB
from deepstack_jax.plan.collectives import Collective
from deepstack_jax.plan.roofline import Roofline
from deepstack_jax.printing import Console, plural
from deepstack_jax.train.flops import Part

SHOWN = 5  # collectives with most traffic that are shown one by one
# What each kind of memory is, and whether its size is known exactly.
KINDS = {
    "parameters": "exact, from the shardings",
    "optimizer": "exact, from the shardings",
    "batch": "exact, from the shardings",
    "padding": "the compiler's, of the three above; below zero where it drops what nothing reads",
    "gradients": "estimated share of the rest",
    "activations": "estimated share of the rest: kept for the backward pass",
    "stacks": "estimated share of the rest: the groups to inject, and their gradient",
    "temporaries": "the rest",
    "code": "the program itself",
}
SOURCES = {
    "libtpu": "by the target's own compiler",
    "here": "by the compiler of the devices here",
    "estimate": "estimated from shapes",
}


@dataclass(frozen=True)
class Load:
    """What one optimizer step, of `rows` rows of `length` positions, and the whole run consist of."""

    rows: int
    length: int
    examples: float  # per step, on average
    steps: int  # of the run, 0 = unknown
    assumed: str  # what of this is an assumption, in words; empty = nothing


@dataclass(frozen=True)
class Plan:
    """What a configuration costs on a machine; bytes are those of each device."""

    name: str
    topology: str
    devices: int
    hosts: int
    mesh: dict[str, int]
    kernel: str  # of training attention
    remat: str
    accumulation: int
    load: Load
    source: str  # where the sum of the memory comes from, see SOURCES
    memory: dict[str, float]  # bytes by kind, see KINDS
    host_memory: float  # bytes of the host's memory that each device's activations are offloaded to
    usable: float  # bytes that a program may use, 0 = unknown
    parts: tuple[Part, ...]
    model_flops: float
    executed_flops: float
    collectives: tuple[Collective, ...]
    roofline: Roofline | None  # None where nothing is published of the device
    mfu: float | None
    compile_seconds: float  # 0 = not compiled

    @property
    def used(self) -> float:
        """Bytes on each device."""
        return sum(self.memory.values())

    @property
    def margin(self) -> float | None:
        """Share of the usable memory that stays free, negative where it does not fit; None = the memory is not known."""
        return 1 - self.used / self.usable if self.usable else None

    @property
    def samples_per_second(self) -> float | None:
        """At the estimated step time."""
        return self.load.examples / self.roofline.step if self.roofline else None

    @property
    def hours(self) -> float | None:
        """Of the whole run at the estimated step time."""
        return self.roofline.step * self.load.steps / 3600 if self.roofline and self.load.steps else None

    def fits(self, margin: float = 0.0) -> bool:
        """Whether so much of the memory stays free; True where the memory is not known."""
        return self.margin is None or self.margin >= margin

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        more: dict[str, Any] = {name: getattr(self, name) for name in ("used", "margin", "samples_per_second", "hours")}
        more["fits"] = None if self.margin is None else self.fits()
        if self.roofline:
            bounds = {name: getattr(self.roofline, name) for name in ("step", "least", "serial", "bound")}
            more["roofline"] = asdict(self.roofline) | bounds
        return asdict(self) | more


def verdict(plan: Plan) -> str:
    """Fits or not, in one line."""
    used, usable = gib(plan.used), gib(plan.usable)
    if plan.margin is None:
        return f"{used} per device; how much there is, is not known"
    if plan.margin < 0:
        return f"does not fit: {used} per device of {usable} usable, {gib(plan.used - plan.usable)} too much"
    return f"fits: {used} per device of {usable} usable, {plan.margin:.0%} free"


def print_tables(plan: Plan, console: Console) -> None:
    """The whole plan as tables."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    console.print(
        f"{plan.name} on {plan.topology}: {plural(plan.devices, 'device')}, {plural(plan.hosts, 'host')}; mesh {mesh}"
    )
    load = plan.load
    console.print(
        f"a step: {load.examples:g} examples in {plural(load.rows, 'row')} of {plural(load.length, 'position')}, "
        f"{plural(plan.accumulation, 'micro-batch', 'micro-batches')}, remat {plan.remat!r}, attention {plan.kernel!r}"
        + (f" ({load.assumed})" if load.assumed else ""),
        soft_wrap=True,
    )
    for table in (memory_table(plan), flops_table(plan), *traffic_tables(plan)):
        if table.row_count:
            console.print(table)
    for line in time_lines(plan):
        console.print(line, soft_wrap=True)
    console.print(verdict(plan), style="bold", soft_wrap=True)


def memory_table(plan: Plan) -> Table:
    """Bytes of each device by kind."""
    table = Table("memory per device", "GiB", "known how", title=f"memory, {SOURCES[plan.source]}", title_justify="left")
    for name, size in plan.memory.items():
        how = "estimated" if plan.source == "estimate" and not KINDS[name].startswith("exact") else KINDS[name]
        table.add_row(name, f"{size / GIB:.3f}", how)
    table.add_section()
    table.add_row("all", f"{plan.used / GIB:.3f}", f"of {gib(plan.usable)} usable" if plan.usable else "")
    if plan.host_memory:
        table.add_row("in the host's memory", f"{plan.host_memory / GIB:.3f}", "offloaded, for each device")
    return table


def flops_table(plan: Plan) -> Table:
    """FLOPs of a step over all devices, by part."""
    table = Table("TFLOPs per step", "forward", "backward", "model", "executed")
    for part in plan.parts:
        numbers = (part.forward, part.backward, part.model, part.executed)
        table.add_row(part.name, *(f"{number / 1e12:,.3f}" for number in numbers))
    table.add_section()
    table.add_row("all", "", "", f"{plan.model_flops / 1e12:,.3f}", f"{plan.executed_flops / 1e12:,.3f}")
    return table


def traffic_tables(plan: Plan) -> tuple[Table, Table]:
    """What enters each device per step, by kind; and the single collectives with most of it, with where they come from."""
    kinds = Table("collective", "per step", "GB into each device", "started apart or fused")
    beside = by_kind(tuple(replace(one, moved=one.moved * one.hidden) for one in plan.collectives if one.hidden))
    for kind, (count, size) in by_kind(plan.collectives).items():
        share = beside[kind][1] / size if size and kind in beside else 0.0  # a group of one moves nothing
        kinds.add_row(kind, f"{count:,}", f"{size / 1e9:,.3f}", f"{share:.0%}")
    largest = Table("most traffic", "times", "MB of result", "GB into each device", "belongs to")
    for one in plan.collectives[:SHOWN]:
        largest.add_row(one.name, str(one.times), f"{one.size / 1e6:,.1f}", f"{one.total / 1e9:,.3f}", belongs_to(one.source))
    return kinds, largest


# What jax and flax write into the path of an operation beside the names of modules: transformations, loops, calls, methods.
_PLUMBING = re.compile(r".*[(.].*|while|body|cond|branch_\d+_fun|.*_call|checkpoint|rematted_computation|shard_map|scan|main")


def belongs_to(source: str) -> str:
    """The part of the model that an operation's path in the program names, and the pass that it belongs to."""
    if "/" not in source:
        return source or "not named by the compiler"
    *_, path = (part for part in source.removesuffix(")").split(":") if "/" in part)  # of several in one, the last
    names = [name for name in path.split("/") if name and not _PLUMBING.fullmatch(name)]
    recomputed = ", recomputed" if "rematted_computation" in path else ""
    return "/".join(names or ["the step itself"]) + (recomputed or ", backward" if "transpose(" in source else "")


def by_kind(collectives: tuple[Collective, ...]) -> dict[str, tuple[int, float]]:
    """{kind: (executions per step, bytes into each device)}."""
    sums: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for one in collectives:
        count, size = sums[one.name]
        sums[one.name] = (count + one.times, size + one.total)
    return dict(sums)


def time_lines(plan: Plan) -> list[str]:
    """Step time, utilisation and hours; what it took to compile."""
    lines = []
    if plan.roofline and plan.mfu is not None:
        line, load = plan.roofline, plan.load
        lines.append(
            f"step, roofline: {line.step:.3f} s, bound by {line.bound} (compute {line.compute:.3f}, memory {line.memory:.3f}, "
            f"links {line.links:.3f} s, of which nothing runs beside {line.exposed:.3f}; everything overlapped: "
            f"{line.least:.3f} s, nothing: {line.serial:.3f} s)"
        )
        hours = (
            f"; {plural(load.steps, 'step')} in {plan.hours:.1f} hours" if plan.hours else "; the number of steps is not known"
        )
        lines.append(f"at most: MFU {plan.mfu:.0%}, {load.examples / line.step:.1f} examples/s{hours}")
    if plan.compile_seconds:
        lines.append(f"compiled in {plan.compile_seconds:.0f} s on this machine")
    return lines


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
