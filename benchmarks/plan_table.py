"""What fits where: every variant and size on slices and nodes, compiled, into docs/plan.md.

`python -m benchmarks.plan_table` plans what runs/plan does not hold yet, minutes each (the TPU compiler: `pip install -e
'.[plan]'`), and writes the table; it may be stopped and run again at any time. With `write` it plans nothing and writes what is
there. With `recipes` or `nano` it writes the tables of docs/training.md, which are estimated only.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parents[1] / "docs" / "plan.md"
FOLDER = Path("runs/plan")
GIB = 2**30
VARIANTS = {
    ("L", "7B"): "configs/llava15.py:finetune",
    ("V", "7B"): "configs/deepstack_v.py:finetune",
    ("HD", "7B"): "configs/deepstack_hd.py",
    ("L", "13B"): "configs/llava15.py:finetune,13b",
    ("V", "13B"): "configs/deepstack_v.py:finetune,13b",
    ("HD", "13B"): "configs/deepstack_hd.py:13b",
}
MACHINES = ("v5p:4x4x4", "v5p:2x2x4", "v5e:16x16", "v6e:8x8", "gpu:8xH100", "gpu:64xH100")
TRIES = 3
TRAINING = OUTPUT.with_name("training.md")
PACKED = "--config.data.packing.enabled=true"
RECIPES = (
    ("`llava15.py:pretrain`", "configs/llava15.py:pretrain"),
    ("... packed", "configs/llava15.py:pretrain", PACKED),
    ("`llava15.py:finetune`", "configs/llava15.py:finetune"),
    ("... packed", "configs/llava15.py:finetune", PACKED),
    ("`deepstack_v.py:finetune`", "configs/deepstack_v.py:finetune"),
    ("`deepstack_hd.py`", "configs/deepstack_hd.py"),
)
RECIPE_MACHINES = {"gpu:8xH100": "8 H100 (80 GB)", "v5p:4x4x4": "64 v5p chips"}
SO400M = "siglip2-so400m-384"
NANO_WORDS = (
    *(f"{stage},smollm2-135m" for stage in ("pretrain", "finetune")),
    *(f"finetune,smollm2-135m,{form}" for form in ("v", "taps", "baseline")),
    "finetune,smollm2-360m",
    f"finetune,qwen3-0.6b,{SO400M}",
    *(f"{stage},{model},{SO400M}" for model in ("smollm2-1.7b", "qwen3-1.7b", "qwen3-4b") for stage in ("finetune", "lora")),
)
NANO = tuple((f"`{words}`", f"configs/nano.py:{words}") for words in NANO_WORDS)
NANO_MACHINES = {"gpu:1xH100": "one H100 (80 GB)", "gpu:1xRTX4090": "one card of 24 GB (RTX 4090)", "v5e:2x4": "v5e:2x4"}


def flags(topology: str) -> list[str]:
    """How a machine is planned: TPUs by their compiler, GPUs estimated; the fastest mesh that fits is looked for."""
    return [f"--tries={TRIES}", *(["--estimate_only"] if topology.startswith("gpu:") else [])]


def plan(config: str, topology: str, *more: str) -> dict[str, Any] | str:
    """The plan as the verb prints it, or its error."""
    command = [sys.executable, "-m", "deepstack_jax.plan", f"--config={config}", f"--topology={topology}", "--search", "--json"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    if done.stdout:
        return json.loads(done.stdout)
    if not done.stderr.strip().splitlines()[-1].startswith("error: "):  # a defect, which no table should hold
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stderr.strip().splitlines()[-1]


def row(variant: str, size: str, topology: str, found: dict[str, Any] | str) -> str:
    """One line of the table."""
    if isinstance(found, str):
        return f"| {variant} {size} | {topology} | {found.removeprefix('error: ')} | - | - | - | - | - | - |"
    mesh = " x ".join(f"{name} {count}" for name, count in found["mesh"].items() if count > 1)
    how = f"{mesh}, {found['remat']}, {found['accumulation']}"
    room = f"{found['margin']:.0%} free" if found["margin"] >= 0 else f"{-found['margin']:.0%} too much"
    memory = f"{found['used'] / GIB:.1f} of {found['usable'] / GIB:.1f}"
    step, mfu = f"{found['roofline']['step']:.2f} ({found['roofline']['bound']})", f"{found['mfu']:.0%}"
    hours = f"{found['hours']:.1f}" if found["hours"] else "-"
    by = "estimate" if found["source"] == "estimate" else f"{found['compile_seconds']:.0f} s"
    return f"| {variant} {size} | {topology} | {how} | {memory} | {room} | {step} | {mfu} | {hours} | {by} |"


def write_section(name: str, text: str, path: Path = OUTPUT) -> None:
    """Put text between the marks of a section of a document."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    whole = path.read_text()
    before, _, rest = whole.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no section {start.strip()} ... {end}")
    path.write_text(f"{before}{start}{text}\n{end}{after}")


def write_recipes(section: str, recipes: Sequence[tuple[str, ...]], machines: Mapping[str, str]) -> None:
    """A table of docs/training.md."""
    lines = [
        f"| recipe | {' | '.join(f'{machine}: GiB each, s per step, hours' for machine in machines.values())} |",
        "|---" * (1 + len(machines)) + "|",
    ]
    for name, config, *more in recipes:
        cells = []
        for topology in machines:
            found = plan(config, topology, "--estimate_only", *more)
            if isinstance(found, str):
                raise SystemExit(found)
            memory = f"{found['used'] / GIB:.1f}"
            numbers = f"{memory}, {found['roofline']['step']:.2f}, {found['hours']:.1f}"
            cells.append(numbers if found["fits"] else f"does not fit: {memory} of {found['usable'] / GIB:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write_section(section, "\n".join(lines), TRAINING)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = [
        "| model | machine | mesh, remat, micro-batches | GiB per device | room | step, s (bound by) | MFU | hours | by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for topology in MACHINES:
        for (variant, size), config in VARIANTS.items():
            kept = FOLDER / f"{variant}-{size}-{topology.replace(':', '-')}.json"
            if not kept.exists():
                if "write" in sys.argv[1:]:
                    continue
                kept.write_text(json.dumps(plan(config, topology, *flags(topology))))
            lines.append(row(variant, size, topology, json.loads(kept.read_text())))
            print(lines[-1], flush=True)
    write_section("table", "\n".join(lines))


if __name__ == "__main__":
    if "recipes" in sys.argv[1:]:
        write_recipes("recipes", RECIPES, RECIPE_MACHINES)
    elif "nano" in sys.argv[1:]:
        write_recipes("nano", NANO, NANO_MACHINES)
    else:
        main()
