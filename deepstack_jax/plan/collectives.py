"""What the chips say to each other in a compiled step, read from its HLO text: how often, and how many bytes."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from deepstack_jax.plan.hlo import KINDS, computations_of, executions, windows_of

_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
# What a TPU receives from other slices, by way of its host.
_ACROSS = re.compile(r' = \(\(?(.*?), u32\[\], token\[\]\) recv\(.*_xla_megascale_transfer_type="(\w+)"')
# The TPU's computations of a product and a piece of a collective that runs beside it.
_FUSED = "async_collective_fusion"
_ANY = "1"  # the channel of every collective that shard_map wrote out
_SHAPE = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")  # bits of an element, none for "pred"; dimensions


@dataclass(frozen=True)
class Collective:
    """One collective instruction of the program."""

    kind: str
    times: int  # executions per step; those under a condition count as if it always held
    size: int  # bytes of its result on each device
    moved: float  # bytes that enter each device per execution, in a ring
    group: int  # devices that take part together
    stride: int  # from one of them to the next, in the order of the mesh
    source: str  # the operation of the model that it belongs to
    across: bool = False  # between slices, over the data center's network; then `group` counts slices
    hidden: float = 0.0  # share of it that may run beside computation: started and waited for apart, or fused with a product
    beside: float | None = None  # what runs beside one execution, as a share of a step's computing; None = as much as it needs

    @property
    def total(self) -> float:
        """Bytes that enter each device per step."""
        return self.times * self.moved

    @property
    def name(self) -> str:
        """Its kind, and whether it leaves the slice."""
        return f"{self.kind} between slices" if self.across else self.kind


def find_collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program, by its HLO after partitioning (`compiled.as_text()`), most traffic first.

    Instructions that the compiler split into pieces, to run beside others, share a channel (or a chain) and a size: they
    count once.
    """
    computations, entry = computations_of(text)
    times = executions(computations, entry)
    windows = windows_of(computations, times)
    devices = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", text)) else 1
    seen: dict[tuple[str, int], Collective] = {}
    for name, lines in computations.items():
        found = _in_computation(name, lines, devices, windows) if times[name] else ()
        for at, (pieces, one) in enumerate(found):
            pieces = pieces or f"{name} {at}"
            known = seen.get((pieces, one.size), one)
            best = max(known, one, key=lambda piece: piece.hidden)  # whose window goes with it
            most, source = max(known.times, times[name]), known.source or one.source
            seen[pieces, one.size] = replace(one, times=most, hidden=best.hidden, beside=best.beside, source=source)
    return sorted(seen.values(), key=lambda one: -one.total)


def _in_computation(
    name: str, lines: list[str], devices: int, windows: Mapping[str, float]
) -> Iterator[tuple[str, Collective]]:
    """(what the pieces of one collective share, "" where it is whole; the collective as one that runs once).

    The TPU's reduce-scatter is written as an all-reduce that its computation, by name, cuts at once.
    """
    for line in lines:
        if across := _ACROSS.search(line):
            kind = across[2].lower().replace("_", "-")
            yield _once(line, kind if kind in KINDS else "collective-permute", _bytes(across[1]), _slices(line), 1, True)
        found = _COLLECTIVE.search(line)
        if not found:
            continue
        shape, kind, started = found.groups()
        members = _first_group(line, devices)
        group, stride = len(members), members[1] - members[0] if len(members) > 1 else 1
        size = _bytes(shape)
        if started and kind == "all-gather":  # the result of a start holds the operand as well
            size = size * group // (group + 1)
        elif started and kind == "collective-permute":
            size //= 2
        elif kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind, size = "reduce-scatter", size // group
        channel, one = _once(line, kind, size, group, stride)
        if name.startswith(_FUSED):
            one = replace(one, hidden=1.0)
        elif (window := windows.get(name, windows.get(_name(line)))) is not None:
            one = replace(one, hidden=1.0, beside=window)
        yield channel, one


def _name(line: str) -> str:
    return line.split(" = ")[0].strip().removeprefix("ROOT ").lstrip("%")


def _once(line: str, kind: str, size: int, group: int, stride: int, across: bool = False) -> tuple[str, Collective]:
    channel, chain = re.search(r"channel_id=(\d+)", line), re.search(r'chain_id="(\d+)"', line)
    found = re.search(r'op_name="([^"]*)"', line)
    source = found[1] if found else ""
    one = Collective(kind, 1, size, size * ring(kind, group), group, stride, source, across)
    if channel and channel[1] != _ANY:
        return channel[1], one
    return f"chain {chain[1]} of {source}" if chain else "", one


def _bytes(shape: str) -> int:
    """Of a shape, or of all in a tuple, as HLO writes it."""
    sizes = ((int(bits or 8) // 8 or 1, dims.split(",")) for bits, dims in _SHAPE.findall(shape))
    return sum(width * math.prod(int(size) for size in dims if size) for width, dims in sizes)


def _slices(line: str) -> int:
    """How many slices exchange: all of them as `"{1,2}x{0:15}"`, or some as `{{100000,200000},...}`, slice by device."""
    first = re.search(r'_xla_megascale_target="?\{+([\d,]+)\}', line)
    return len(first[1].split(",")) if first else 1


def _first_group(line: str, devices: int) -> list[int]:
    """Devices that take part together, of the first group, from any of the forms in which XLA writes groups."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])]
        together = re.findall(r"'(\w+)'", named[2])
        ids = np.arange(math.prod(size for _, size in axes)).reshape([size for _, size in axes])
        return ids[tuple(slice(None) if name in together else 0 for name, _ in axes)].ravel().tolist()
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        dims = [int(size) for size in iota[3].split(",")]
        order = [int(axis) for axis in iota[4].split(",")] if iota[4] else range(len(dims))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return ids.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        return [int(member) for member in listed[1].split(",")]
    return list(range(devices))


def ring(kind: str, group: int) -> float:
    """Bytes that enter a device per byte of its result, when the devices pass pieces around in a ring."""
    others = (group - 1) / group
    return {
        "all-gather": others,
        "all-reduce": 2 * others,
        "reduce-scatter": group - 1.0,
        "all-to-all": others,
        "collective-permute": 1.0,
    }[kind]
