"""A compiled program's HLO text as computations: how often each runs, and what runs while something else is under way."""

import re
from collections import defaultdict
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# What is started and waited for apart: a collective, or a computation of its own that holds one, for another kind of core. From
# libtpu 0.0.50 on it gets its operands later, and begins then.
_STARTED = re.compile(rf"^ *%?([\w.\-]+) = .*? (?:call|async|{'|'.join(KINDS)})-(start|update)\(%?([\w.\-]*)")
_WAITED = re.compile(rf" (?:call|async|{'|'.join(KINDS)})-done\(.*?%?([\w.\-]+)\)(?:,|$)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def computations_of(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the entry."""
    found, entry, lines = {}, "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            found[header[2]] = lines = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return found, entry


def executions(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
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


def windows_of(computations: dict[str, list[str]], times: dict[str, int]) -> dict[str, float]:
    """What runs between the start of something and the wait for it, as a share of all that the program computes in a step.

    By the name of the instruction that starts it, and of the computation that it starts; shares are of the compiler's estimates
    of cycles. The lines of a computation are in the order in which they run. What runs beside several at once counts for each
    in equal parts; kernels have no estimate, of a condition's branches the longest counts, and a loop that starts something
    itself counts as nothing for what is under way around it.
    """
    whole = sum(times[name] * _cycles(line) for name, lines in computations.items() for line in lines)
    starting = {name for name, lines in computations.items() if any(map(_STARTED.match, lines))}
    costs: dict[str, float] = {}

    def cost(line: str) -> float:
        if (own := _cycles(line)) or _STARTED.match(line):
            return own
        calls = [(name, often) for name, often in _calls(line, computations) if name in computations]
        if any(name in starting for name, _ in calls):
            return 0.0
        each = [often * of_computation(name) for name, often in calls]
        return max(each, default=0.0) if " conditional(" in line else sum(each)

    def of_computation(name: str) -> float:
        if name not in costs:
            costs[name] = sum(map(cost, computations[name]))
        return costs[name]

    found, within = dict[str, float](), dict[str, str]()
    for lines in computations.values():
        steps = [_STARTED.match(line) for line in lines]
        handed = {step[3] for step in steps if step and step[2] == "update"}  # what begins there, not where it is started
        origin, begun = dict[str, str](), dict[str, float]()
        for line, step in zip(lines, steps, strict=True):
            if step:
                name, before = step[1], step[3] if step[2] == "update" else step[1]
                origin[name] = origin.get(before, before)
                if name not in handed:
                    begun[name] = 0.0
                within |= dict.fromkeys(_CALLED.findall(line), origin[name])
            elif (waited := _WAITED.search(line)) and waited[1] in begun:
                found[origin[waited[1]]] = begun.pop(waited[1]) / whole if whole else 0.0
            elif begun and (cycles := cost(line)):
                begun = {name: window + cycles / len(begun) for name, window in begun.items()}
    return found | {name: found[start] for name, start in within.items() if start in found}


def _cycles(line: str) -> float:
    """Of an instruction, by the compiler's estimate; 0 = it has none."""
    own = _CYCLES.search(line)
    return float(own[1]) if own else 0.0
