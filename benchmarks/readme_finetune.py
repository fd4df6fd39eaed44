"""Writes what a first fine-tuning prints into README.md: `python -m benchmarks.readme_finetune --weights=DIR --data=DIR`.

  --weights=DIR   the checkpoint; README has SmolLM2-135M-Instruct
  --tower=DIR     a vision tower, where the checkpoint has none
  --data=DIR      a folder with train.json and its images

It is the one command of README with short rows, two examples a step and six steps: minutes on two cores for such a model.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.readme_table import REPOSITORY, write_parts

SHORT = {"data.max_length": 640, "train.batch_size": 2, "train.steps": 6, "train.log_every": 1}
# The model's line, the table of groups, and of every step what does not depend on the machine.
SHOWN = re.compile(r"finetune-.*: .* parameters, .*|│ \w+ +│ (?:adamw|-) .*│|step \d+/\d+ loss .* grad \S+")


def excerpt(printed: str) -> str:
    """A block for README of what `train` printed."""
    found = [match[0] for line in printed.splitlines() if (match := SHOWN.match(line))]
    return "\n".join(["```text", *found, "```"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--tower", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    values = {"train.weights": given.weights.resolve(), "data.train": "train.json", "data.root": given.data.resolve(), **SHORT}
    values |= {"train.tower": given.tower.resolve()} if given.tower else {}
    words = ["--config=finetune.py", *(f"--config.{key}={value}" for key, value in values.items())]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deepstack_jax.train", *words, f"--workdir={folder}/run"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    if done.returncode:
        return done.returncode
    return write_parts({"finetune": excerpt(done.stdout)})


if __name__ == "__main__":
    sys.exit(main())
