"""`python -m benchmarks.gpu_check.tables` writes the GPU tables of docs/performance.md and README.md from benchmarks/results/.

Results of small models are left out; where there are none of a GPU, the documents say so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.stages import STAGES
from benchmarks.plan_table import write_section
from benchmarks.readme_table import REPOSITORY, write_parts

RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "performance.md"
NONE = (
    "Not measured: no device was at hand. `python -m benchmarks.gpu_check` is ready to run on one H100 or H200, and then this "
    "place shows what it found."
)
GOAL = "goal: "
HEADLINES = (  # of README: stage, figures, key, what it is
    ("step", "step", "MFU", "packed training step at 7B width, MFU"),
    ("step", "step", "samples/s", "... samples/s"),
    ("torch", "goal: samples/s, ours / torch eager", "got", "... samples/s over PyTorch's, eager"),
    ("torch", "goal: samples/s, ours / torch compiled", "got", "... samples/s over PyTorch's, compiled"),
    ("injection", "injection", "at 32 layers", "... with the stack injected over without, at 32 layers"),
    ("string", "goal: L / string, samples/s", "got", "... samples/s over a sequence of 2880 visual tokens"),
    ("memory", "step: step", "plan / peak", "memory: `plan` over what was used"),
    ("decode", "batch 1", "tokens/s", "decoding 7B at batch 1, tokens/s"),
    ("decode", "goal: share of the floor, batch 1", "got", "... of what the memory's bandwidth allows"),
)
STEP = ("s/step", "tokens/s", "samples/s", "TFLOP/s", "MFU", "of the best product", "peak, GiB", "plan says, GiB")
PERCENT = ("MFU", "of the best product", "of the data sheet")


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results of GPUs, by the name of their files."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("gpu-*.json"))]
    return [one for one in found if one["size"] == "full"]


def document(results: Iterable[dict[str, Any]]) -> str:
    """The part of docs/performance.md."""
    return "\n\n".join("\n\n".join(_sections(one)) for one in results) or NONE


def readme(results: list[dict[str, Any]]) -> str:
    """The part of README.md: a column for each device."""
    if not results:
        return NONE
    lines = [f"| | {' | '.join(one['machine']['device'] for one in results)} |", "|---" * (1 + len(results)) + "|"]
    for stage, name, key, what in HEADLINES:
        cells = [_cell(_figures(one, stage).get(name, {}).get(key), key) for one in results]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(results: dict[str, Any], stage: str) -> dict[str, Any]:
    return results["stages"].get(stage, {}).get("figures", {})


def _sections(results: dict[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield (
        f"**{machine['device']}** ({machine['memory']}, driver {machine['driver']}, {machine['cores']} cores), {versions}, "
        f"revision {machine['revision'][:12]}; medians, raw figures in benchmarks/results/."
    )
    left = [
        f"`{stage.name}` {found.get('status', 'was not run')}{_why(found)}"
        for stage in STAGES
        if (found := results["stages"].get(stage.name, {})).get("status") != "done"
    ]
    if left:
        yield f"Not whole: {'; '.join(left)}."
    for table in (_goals(results), _steps(results), _decoding(results), _kernels(results), _profile(results)):
        if len(table) > 2:
            yield "\n".join(table)


def _why(found: dict[str, Any]) -> str:
    return f" ({found['said'][-1].strip()[:160]})" if found.get("said") else ""


def _goals(results: dict[str, Any]) -> list[str]:
    """Every goal with what was reached, in the order of the stages."""
    lines = ["| goal | to reach | reached | ratio |", "|---|---|---|---|"]
    for stage in STAGES:
        for name, one in _figures(results, stage.name).items():
            if name.startswith(GOAL):
                sign = "at most" if one["at_most"] else "at least"
                numbers = f"{sign} {one['target']:g} | {one['got']:.3g} | {one['ratio']:.2f}"
                lines.append(f"| {name.removeprefix(GOAL)} | {numbers}{'' if one['ratio'] >= 1 else ', missed'} |")
    return lines


def _steps(results: dict[str, Any]) -> list[str]:
    """Every training step that was measured, ours and PyTorch's."""
    lines = [f"| step | layers, rows, remat, attention | {' | '.join(STEP)} | losses |", "|---" * (3 + len(STEP)) + "|"]
    for stage in STAGES:
        for name, one in _figures(results, stage.name).items():
            if "s/step" not in one or "losses" not in one:
                continue
            what = (
                f"{one['layers']}, {one['rows']} of {one['length']}, `{one['remat']}`, {one['kernel']}"
                if "layers" in one
                else "the same"
            )
            cells = " | ".join(_cell(one.get(key), key) for key in STEP)
            losses = ", ".join(f"{loss:.4f}" for loss in one["losses"])
            lines.append(f"| {name if name == stage.name else f'{stage.name}: {name}'} | {what} | {cells} | {losses} |")
    return lines


def _decoding(results: dict[str, Any]) -> list[str]:
    lines = ["| decoding | tokens/s | of the floor | transformers, tokens/s | ours / theirs |", "|---|---|---|---|---|"]
    theirs = _figures(results, "generate")
    for name, one in _figures(results, "decode").items():
        if name.startswith("batch"):
            other = theirs.get(name, {})
            share = one["floor, s/token"] / one["s/token"]
            against = f"{_cell(other.get('tokens/s'))} | {_cell(other.get('ours / theirs'))}"
            lines.append(f"| {name}, prompt {one['prompt']} | {one['tokens/s']:.1f} | {share:.0%} | {against} |")
    return lines


def _kernels(results: dict[str, Any]) -> list[str]:
    """Attention, forward and backward; distances are the largest of the output's and the gradients' means."""
    lines = [
        "| attention | kernel | ms | portable, ms | apart | from float32 | portable from it | equal |",
        "|---" * 8 + "|",
    ]
    for name, one in _figures(results, "kernels").items():
        if "refused" in one:
            lines.append(f"| {name} | does not run: {one['refused']}{' |' * 7}")
        elif "kernel" in one:
            times = " | ".join(f"{1000 * one[key]:.2f}" for key in ("seconds", "portable_seconds"))
            errors = " | ".join(f"{max(one[key]):.1e}" for key in ("apart", "errors", "portable_errors"))
            lines.append(f"| {name} | {one['kernel']} | {times} | {errors} | {'yes' if one['equal'] else 'no'} |")
    return lines


def _profile(results: dict[str, Any]) -> list[str]:
    kinds = _figures(results, "profile").get("by kind, ms a step", {})
    lines = ["| where a step's time goes | ms | share |", "|---|---|---|"]
    lines += [f"| {name} | {spent:.1f} | {spent / kinds['all']:.0%} |" for name, spent in kinds.items() if kinds["all"]]
    return lines


def _cell(value: float | None, key: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if key in PERCENT else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main() -> int:
    results = load()
    write_section("gpu", document(results), PAGE)
    return write_parts({"gpu": readme(results)})


if __name__ == "__main__":
    sys.exit(main())
