"""Writes the demo's measured table and pictures into README.md: `python -m benchmarks.readme_table runs/demo`.

Numbers in the README come from here and from nowhere else; run it after `make demo` (`make readme` does both).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LABELS = {
    "baseline": "low-res only (LLaVA-1.5)",
    "dummy": "dummy stack",
    "deepstack": "**DeepStack**",
    "legible": "low-res only, digits drawn plainly",
}


def markdown(summary: dict) -> str:
    """The table, one row per model."""
    lines = [
        "| model | digits (fine) | shades (coarse) | context | visual tokens seen | s/step |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in summary.items():
        lines.append(
            f"| {LABELS.get(name, name)} | {run['fine_exact_match']:.1%} | {run['coarse_exact_match']:.1%} | "
            f"{run['context_length']} | {run['visual_tokens']} | {run['seconds_per_step']:.2f} |"
        )
    first = next(iter(summary.values()))
    lines.append(f"| chance | {first['chance']:.1%} | {first['coarse_chance']:.1%} | | | |")
    return "\n".join(lines)


def main(folder: str) -> int:
    """Rewrite the part of README.md between the demo marks, and refresh docs/images."""
    demo, readme = Path(folder), REPOSITORY / "README.md"
    if not (demo / "summary.json").is_file():
        print(f"error: {demo}/summary.json does not exist; run `make demo` first", file=sys.stderr)
        return 1
    table = markdown(json.loads((demo / "summary.json").read_text()))
    marked = re.compile(r"(<!-- demo:begin[^\n]*-->\n).*?(<!-- demo:end -->)", re.DOTALL)
    text, count = marked.subn(lambda match: match[1] + table + "\n" + match[2], readme.read_text())
    if count != 1:
        print("error: README.md has no demo:begin and demo:end marks", file=sys.stderr)
        return 1
    readme.write_text(text)
    images = REPOSITORY / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for picture in ("pages.png", "curves.png"):
        shutil.copy(demo / picture, images / picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
