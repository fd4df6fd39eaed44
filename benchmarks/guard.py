"""What the steps of the main recipes cost, kept in benchmarks/results/guard.json so that no change moves it unseen.

`python -m benchmarks.guard --write` measures and writes; without it prints what moved, and ends with 1 where anything did. The
full-size programs are traced over eight simulated devices, before any compiler sees them, which takes seconds: FLOPs of all
products, what is gathered, scattered and added up by name, the number of operations, and the memory that `plan` estimates.
`tests/unit/test_guard.py` compares them; what compilers make of such programs is for tests/distributed/test_collectives.py and
tests/unit/test_planning.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepstack_jax.config import Config, MeshConfig, build_config
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.plan.collectives import ring
from deepstack_jax.plan.memory import activation_memory, state_memory
from deepstack_jax.plan.topology import simulated_devices
from deepstack_jax.train.core.program import Program, build_program

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "results" / "guard.json"
RECIPES = {"L": "llava15.py:finetune", "V": "deepstack_v.py:finetune", "HD": "deepstack_hd.py"}
DEVICES = 8
# Relative. Numbers of operations and collectives are compared under the jax that wrote them, as others write a step otherwise.
TOLERANCE = {"flops": 0.005, "operations": 0.1, "bytes": 0.02}
_KINDS = {"all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "psum": "all-reduce", "psum_invariant": "all-reduce"}


def recipe(name: str) -> Config:
    """A recipe over eight devices along fsdp."""
    path, _, words = RECIPES[name].partition(":")
    config = build_config(runpy.run_path(str(ROOT / "configs" / path))["get_config"](words))
    return dataclasses.replace(config, mesh=MeshConfig(1, DEVICES, 1))


def program_of(config: Config) -> Program:
    return build_program(config, make_mesh(config.mesh, simulated_devices(DEVICES)), 1)


def traced(program: Program) -> dict[str, Any]:
    """FLOPs, collectives, size and memory of a program before any compiler sees it."""
    rows, length = program.config.train.batch_size, program.config.data.max_length
    with use_mesh(program.mesh):
        jaxpr = program.jit_step().trace(program.abstract_state(), program.abstract_batch(rows, length)).jaxpr
    flops, operations = 0.0, 0
    counts, entered = Counter[str](), defaultdict[str, float](float)
    for eqn, times, devices in _equations(jaxpr.jaxpr, 1, 1):
        operations += 1
        name = eqn.primitive.name
        if name == "dot_general":
            flops += times * devices * _flops(eqn)
        elif name in _KINDS:
            kind = _KINDS[name]
            counts[kind] += times
            entered[kind] += times * sum(ring(kind, _group(eqn)) * _bytes(out.aval) for out in eqn.outvars)
    collectives = {kind: {"count": counts[kind], "bytes": entered[kind]} for kind in sorted(counts)}
    memory = sum(state_memory(program, rows, length)) + sum(activation_memory(program, rows, length))
    return {"flops": flops, "operations": operations, "memory": {"bytes": memory}, "collectives": collectives}


def _equations(jaxpr: Any, times: int, devices: int) -> Iterator[tuple[Any, int, int]]:
    """Every equation with how often it runs, and on how many devices its shapes exist; conditions count as taken each way."""
    for eqn in jaxpr.eqns:
        yield eqn, times, devices
        again = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        within = DEVICES if eqn.primitive.name == "shard_map" else devices  # which all lie along one axis
        for value in eqn.params.values():
            for one in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner, again, within)


def _flops(eqn: Any) -> float:
    (left, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in left)


def _group(eqn: Any) -> int:
    groups = eqn.params.get("axis_index_groups")
    if groups:
        return len(groups[0])
    if "axis_size" in eqn.params:
        return eqn.params["axis_size"]
    return DEVICES


def _bytes(aval: Any) -> float:
    return float(math.prod(aval.shape) * np.dtype(aval.dtype).itemsize)


def measure() -> dict[str, Any]:
    """All of it."""
    return {
        "jax": jax.__version__,
        "traced": {name: traced(program_of(recipe(name))) for name in RECIPES},
    }


def flat(tree: dict[str, Any], path: str = "") -> dict[str, float]:
    """Numbers by their path."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}/") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def moved(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each figure that is another than the one that is kept, beyond its tolerance."""
    skip = ("jax",) if kept["jax"] == now["jax"] else ("jax", "operations", "count")
    before, after = (flat(one) for one in (kept, now))
    lines = []
    for path in sorted(before.keys() | after.keys()):
        if path.rsplit("/")[-1] in skip:
            continue
        old, new = before.get(path, 0.0), after.get(path, 0.0)
        if abs(new - old) > TOLERANCE.get(path.rsplit("/")[-1], 0.0) * abs(old):
            change = f" ({new / old - 1:+.1%})" if old else ""
            lines.append(f"{path}: {old:,.0f} -> {new:,.0f}{change}")
    return lines


def main() -> None:
    now = measure()
    if "--write" in sys.argv[1:]:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(now, indent=1) + "\n")
    lines = moved(json.loads(FILE.read_text()), now)
    print("\n".join(lines) or "nothing moved")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
