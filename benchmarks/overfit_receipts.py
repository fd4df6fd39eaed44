"""Learn 16 rows of receipts by heart, through the real path: `python -m benchmarks.overfit_receipts --data=DIR
--workdir=runs/overfit`.

DIR holds train.json in LLaVA JSON and its images. The first 16 rows become a file of their own, and a tokenizer is trained on
their words; then the verbs run as a user calls them: stage 1 on the transcriptions, stage 2 on all rows, packed, and
`evaluate` on the very rows. Exits with 1 unless every answer is exact.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.small_tokenizer import train_bpe
from deepstack_jax.data.encode.templates import TEMPLATES

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs" / "overfit.py"
ROWS = 16
VOCABULARY = 1024


def write_inputs(data: Path, workdir: Path) -> None:
    """The rows, those of one exchange apart for stage 1's template, and a tokenizer of their words."""
    rows = json.loads((data / "train.json").read_text())[:ROWS]
    captions = [row for row in rows if len(row["conversations"]) == 2]
    for name, chosen in (("rows.json", rows), ("captions.json", captions)):
        (workdir / name).write_text(json.dumps(chosen, indent=1))
    template = TEMPLATES["v1"]
    words = [template.start + template.ask, *(turn["value"] for row in rows for turn in row["conversations"])]
    train_bpe(words * 3, VOCABULARY, workdir / "tokenizer")


def verb(name: str, *flags: str) -> None:
    """Run a verb as a user does; where it fails, so does this."""
    command = [sys.executable, "-m", f"deepstack_jax.{name}", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.json and its images")
    parser.add_argument("--workdir", type=Path, default=REPOSITORY / "runs" / "overfit")
    given = parser.parse_args()
    data, workdir = given.data.absolute(), given.workdir.absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    write_inputs(data, workdir)
    began = time.perf_counter()
    shared = [f"--config.data.images={data}", f"--config.data.tokenizer={workdir / 'tokenizer'}"]
    one, two = workdir / "stage1", workdir / "stage2"
    verb(
        "train", f"--config={CONFIG}:pretrain", f"--workdir={one}", f"--config.data.train={workdir / 'captions.json'}", *shared
    )
    start = f"--config.train.weights={one}"
    rows = workdir / "rows.json"
    verb("train", f"--config={CONFIG}:finetune", f"--workdir={two}", start, f"--config.data.train={rows}", *shared)
    out = workdir / "evaluation"
    verb("evaluate", f"--model={two}", f"--data={rows}", f"--images={data}", f"--out={out}", "--max_new_tokens=300")
    results = json.loads((out / "results.json").read_text())
    score, asked = results["scores"]["exact_match"]["score"], results["questions"]
    print(f"{round(score * asked)} of {asked} answers of {ROWS} rows exact, {time.perf_counter() - began:.0f} s")
    raise SystemExit(score != 1.0)


if __name__ == "__main__":
    main()
