"""What the paper's recipes send between chips, compiled for slices that nobody here owns, into docs/scaling.md.

`python -m benchmarks.collectives_table` compiles what benchmarks/results/collectives.json does not hold yet, minutes each (the
TPU compiler: `pip install -e '.[plan]'`), and writes the table; it may be stopped and run again at any time. With `write` it
compiles nothing and writes what is there. After a change of the program delete the file's rows, or all of it.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from benchmarks.plan_table import GIB, VARIANTS, write_section
from deepstack_jax.atomic import write_whole
from deepstack_jax.config import Config, MeshConfig, build_config
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.plan.planner import Wanted, make_plan
from deepstack_jax.plan.report import Plan
from deepstack_jax.plan.topology import Machine, open_machine
from deepstack_jax.train.core.optimizer import split
from deepstack_jax.train.core.program import Program, build_program

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "collectives.json"
PAGE = ROOT / "docs" / "scaling.md"
# 128 rows are not one for each of 256 chips: there tensor takes two, beside data; fsdp has a dimension of the torus of its own.
MESHES = {"v5p:4x4x4": MeshConfig(1, 64, 1), "v6e:8x8": MeshConfig(1, 64, 1), "v5e:16x16": MeshConfig(8, 16, 2)}
BFLOAT16, FLOAT32 = 2, 4


def recipe(variant: str, mesh: MeshConfig) -> Config:
    """A recipe of the paper at 7B on a mesh."""
    path, _, words = VARIANTS[variant, "7B"].partition(":")
    arguments = (words,) if words else ()
    return dataclasses.replace(build_config(runpy.run_path(str(ROOT / path))["get_config"](*arguments)), mesh=mesh)


def ideal(program: Program) -> float:
    """Bytes into each device: a weight that trains gathered for both passes, another for one, a gradient scattered once."""
    mesh = program.mesh.shape
    trainable, _ = split(program.abstract_state().params, program.groups)
    gathered = sum(size * (1 + (path in trainable)) for path, size in program.sizes.items())
    scattered = sum(program.sizes[path] for path in trainable)
    share = (mesh["fsdp"] - 1) / mesh["fsdp"] / mesh["tensor"]
    return share * (BFLOAT16 * gathered + FLOAT32 * scattered)


def numbers(plan: Plan, machine: Machine, config: Config) -> dict[str, Any]:
    """What is kept of a compiled step: in bytes along fsdp and along the others, all of it in seconds."""
    program = build_program(config, make_mesh(config.mesh, machine.devices), 1)
    near, far = config.mesh.tensor, config.mesh.tensor * config.mesh.fsdp
    fsdp = [one for one in plan.collectives if one.group > 1 and near <= one.stride < far]
    assert plan.roofline is not None
    return {
        "ideal": ideal(program),
        "bytes": sum(one.total for one in fsdp),
        "apart": sum(one.total * one.hidden for one in fsdp),
        "others": sum(one.total for one in plan.collectives) - sum(one.total for one in fsdp),
        "links": plan.roofline.links,
        "exposed": plan.roofline.exposed,
        "step": plan.roofline.step,
        "mfu": plan.mfu,
        "memory": plan.used,
        "seconds": plan.compile_seconds,
        "mesh": dict(plan.mesh),
        "remat": plan.remat,
    }


def row(variant: str, topology: str, found: dict[str, Any]) -> str:
    mesh = " x ".join(f"{name} {count}" for name, count in found["mesh"].items() if count > 1)
    moved = f"{found['bytes'] / 1e9:.1f} ({found['bytes'] / found['ideal']:.2f}x)"
    apart = f"{found['apart'] / found['bytes']:.0%}"
    waited = f"{found['exposed']:.3f} ({found['exposed'] / found['links']:.0%})"
    return (
        f"| {variant} | {topology} | {mesh} | {found['ideal'] / 1e9:.1f} | {moved} | {apart} | {found['others'] / 1e9:.1f} "
        f"| {found['links']:.3f} | {waited} | {found['step']:.3f} | {found['mfu']:.0%} | {found['memory'] / GIB:.1f} |"
    )


def main() -> None:
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    lines = [
        "| recipe | slice | mesh | GB, ideal | GB along fsdp | of them apart or fused | GB along others | links, s "
        "| waited for, s | step, s | MFU | GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for topology, mesh in MESHES.items():
        for variant in ("L", "V", "HD"):
            name = f"{variant} {topology}"
            if name not in kept and "write" not in sys.argv[1:]:
                machine, config = open_machine(topology), recipe(variant, mesh)
                kept[name] = numbers(make_plan(config, machine, Wanted()), machine, config)
                write_whole(RESULTS, json.dumps(kept, indent=1) + "\n")
            if name in kept:
                lines.append(row(variant, topology, kept[name]))
                print(lines[-1], flush=True)
    write_section("collectives", "\n".join(lines), PAGE)


if __name__ == "__main__":
    main()
