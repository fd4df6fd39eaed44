"""What each remat policy costs: the 7B step of DeepStack-L compiled for TPUs under each of them, into docs/runs.md.

`python -m benchmarks.remat_table` needs the TPU compiler (`pip install -e '.[plan]'`), and minutes for each policy.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

OUTPUT = Path(__file__).parents[1] / "docs" / "runs.md"
CONFIG, TOPOLOGY = "configs/llava15.py:finetune", "v5p:4x4x4"
POLICIES = ("none", "block", "minimal", "dots")
START, END = "<!-- remat -->\n", "<!-- end of remat -->"
GIB = 2**30


def row(policy: str) -> str:
    """One line of the table."""
    command = [sys.executable, "-m", "deepstack_jax.plan", f"--config={CONFIG}", f"--topology={TOPOLOGY}", "--json"]
    done = subprocess.run([*command, f"--config.decoder.remat={policy}"], capture_output=True, text=True, check=False)
    if not done.stdout:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout)
    again = found["executed_flops"] / found["model_flops"]
    return f"| `{policy}` | {found['used'] / GIB:.1f} | {again:.2f} | {found['roofline']['least']:.2f} |"


def main() -> None:
    lines = [
        f"`{CONFIG}` on `{TOPOLOGY}` (64 chips of 95.7 GiB), compiled by `python -m benchmarks.remat_table`;",
        "the time is that with everything overlapped (docs/plan.md):",
        "",
        "| policy | GiB per chip | executed / model FLOPs | step, s, at least |",
        "|---|---|---|---|",
        *map(row, POLICIES),
    ]
    before, _, rest = OUTPUT.read_text().partition(START)
    OUTPUT.write_text(f"{before}{START}" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
