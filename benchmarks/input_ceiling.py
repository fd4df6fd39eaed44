"""Whether the input keeps up with one H100: `python -m benchmarks.input_ceiling` writes the section of docs/input_pipeline.md.

Images per second and core are read from the page's own tables; what a GPU takes is by `plan`'s step with everything overlapped,
at the share of the peak that `plan` reckons with.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.plan_table import PACKED, plan, write_section

PAGE = Path(__file__).parents[1] / "docs" / "input_pipeline.md"
CORES = 16  # beside one GPU
RECIPES = {
    "DeepStack-L, Vicuna 7B, packed": ("configs/llava15.py:finetune", "gpu:8xH100", PACKED),
    "... projector alone (stage 1), packed": ("configs/llava15.py:pretrain", "gpu:8xH100", PACKED),
    "DeepStack-L, SmolLM2 1.7B, LoRA": ("configs/nano.py:lora,smollm2-1.7b", "gpu:1xH100"),
    "DeepStack-L, SmolLM2 135M": ("configs/nano.py:finetune,smollm2-135m", "gpu:1xH100"),
}
VIEWS, SIDE = 5, 336


def rates(page: str) -> dict[str, float]:
    """Images per second of one core by kind of image, as measured into the page."""
    found = re.findall(r"^## (Receipts|Photographs)$.*?^\| \*\*here\*\*, uint8 \| (\d+) \|", page, re.MULTILINE | re.DOTALL)
    if len(found) != 2:
        raise SystemExit(f"{PAGE} lacks its tables of images per second; run python -m benchmarks.input_pipeline")
    return {kind: float(rate) for kind, rate in found}


def section(per_core: dict[str, float], taken: dict[str, float]) -> str:
    """Supply and demand, the cores that each recipe keeps busy, and what to do where it is short."""
    kinds = ", ".join(kind.lower() for kind in per_core)
    lines = [f"| recipe | one H100 takes, images/s | cores that makes: {kinds} | supply over demand |", "|---|---|---|---|"]
    for name, demand in taken.items():
        cores = ", ".join(f"{demand / rate:.1f}" for rate in per_core.values())
        times = ", ".join(f"{CORES * rate / demand:.1f}x" for rate in per_core.values())
        lines.append(f"| {name} | {demand:.1f} | {cores} | {times} |")
    supply = " or ".join(f"{CORES * rate:,.0f} {kind.lower()}" for kind, rate in per_core.items())
    raw = VIEWS * SIDE**2 * 3 / 1e6
    slow, fast = raw * next(iter(taken.values())), raw * max(taken.values()) / 1000
    least = min(CORES * rate / demand for rate in per_core.values() for demand in taken.values())
    verdict = "the input is short of none of these" if least >= 1 else "the input is short of some of these"
    return f"""\
{CORES} cores make at most {supply} a second: the images/s of one core above times {CORES}. That was
measured on two cores, not on sixteen, and reading from a disk comes on top. What a GPU takes is examples, of one image each,
over `plan`'s step with everything overlapped, at 80% of the peak ([plan.md](plan.md)): most runs take less.

{chr(10).join(lines)}

So {verdict}; the least is {least:.1f} times what is taken. `data.workers` is the number of processes
that decode ahead, and the third column says how many are busy. Where a small model is short of images, in this order:

- all cores: `data.workers` up to their number, less one for the process that drives the GPU;
- `prepare` puts examples into shards with their images **as they were stored**: that saves looking for files and parsing
  JSON, not decoding and resizing, which are nearly all of the time (above);
- crops that are cut beforehand would save those too, and are **not offered**: {VIEWS} views are {raw:.1f} MB as they are,
  many times a JPEG, and compressed with loss they would have other pixels. For the first row that would be {slow:.0f} MB/s
  from the disk for each GPU, which is little; a small model, which would need it, asks for {fast:.1f} GB/s;
- a machine with more cores for each GPU."""


def main() -> None:
    taken = {}
    for name, (config, topology, *more) in RECIPES.items():
        found = plan(config, topology, "--estimate_only", *more)
        if isinstance(found, str):
            raise SystemExit(found)
        taken[name] = round(found["load"]["examples"] / found["roofline"]["least"] / found["devices"], 1)
        print(f"{name}: {taken[name]:.1f} images/s", flush=True)
    write_section("ceiling", section(rates(PAGE.read_text()), taken), PAGE)


if __name__ == "__main__":
    main()
