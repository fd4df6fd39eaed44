"""What the chips say to each other in a compiled step, read from its HLO text: how often, and how many bytes."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
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
    hidden: float = 0.0  # share of it that runs beside computation: started and waited for apart, or fused with a product

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
    computations, entry = _computations(text)
    times = _executions(computations, entry)
    devices = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", text)) else 1
    seen: dict[tuple[str, int], Collective] = {}
    for name, lines in computations.items():
        found = _in_computation(name, lines, devices) if times[name] else ()
        for at, (pieces, one) in enumerate(found):
            pieces = pieces or f"{name} {at}"
            known = seen.get((pieces, one.size), one)
            most, hidden = max(known.times, times[name]), max(known.hidden, one.hidden)
            seen[pieces, one.size] = replace(one, times=most, hidden=hidden, source=known.source or one.source)
    return sorted(seen.values(), key=lambda one: -one.total)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the entry."""
    found, entry, lines = {}, "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            found[header[2]] = lines = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return found, entry


def _executions(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs per step: loops multiply, conditions count as taken."""
    calls: dict[str, list[tuple[str, int]]] = {}
    for name, lines in computations.items():
        calls[name] = [call for line in lines for call in _calls(line, computations) if call[0] in computations]
    times: dict[str, int] = defaultdict(int)
    callers: dict[str, int] = defaultdict(int)
    for called in calls.values():
        for name, _ in called:
            callers[name] += 1
    ready, times[entry] = [name for name in computations if not callers[name]], 1
    while ready:  # a computation is counted once all its callers are
        name = ready.pop()
        for called, often in calls[name]:
            times[called] += times[name] * often
            callers[called] -= 1
            if not callers[called]:
                ready.append(called)
    return times


def _calls(line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    if loop := _WHILE.search(line):
        condition, body = loop.groups()
        yield body, _trips(line, computations[condition], computations[body])
        yield condition, 1
    for name in _CALLED.findall(line):
        yield name, 1
    for names in _BRANCHES.findall(line):
        for name in names.split(","):
            yield name.strip().lstrip("%"), 1


def _trips(line: str, condition: list[str], body: list[str]) -> int:
    """How often a loop runs: as the compiler says, or the number that its condition compares the counter with, by its step."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(known[1])
    limit = max(_constants(condition).values(), default=1)
    return -(-limit // _counter_step(condition, body))


def _constants(lines: list[str]) -> dict[str, int]:
    """Whole numbers by the name that the lines give them."""
    found = (re.match(r" *(?:ROOT )?%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", line) for line in lines)
    return {one[1]: int(one[2]) for one in found if one}


def _counter_step(condition: list[str], body: list[str]) -> int:
    """What a loop's body adds to the counter that its condition looks at: 2 where the compiler unrolled it once."""
    read = next((found for line in condition if (found := re.search(r" get-tuple-element\(.*\), index=(\d+)", line))), None)
    root = next((line for line in body if " ROOT " in line and " tuple(" in line), None)
    if not read or not root:
        return 1
    operands = re.findall(r"%?([\w.\-]+)", re.sub(r"/\*.*?\*/", "", root.split(" tuple(")[1].split(")")[0]))
    name, constants = operands[int(read[1])], _constants(body)
    added = next((found for line in body if (found := re.match(rf" *%?{re.escape(name)} = \S+ add\(([^)]*)\)", line))), None)
    steps = [constants[one] for one in re.findall(r"%?([\w.\-]+)", added[1]) if one in constants] if added else []
    return max(1, steps[0]) if steps else 1


def _in_computation(name: str, lines: list[str], devices: int) -> Iterator[tuple[str, Collective]]:
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
        yield channel, replace(one, hidden=float(bool(started) or name.startswith(_FUSED)))


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
