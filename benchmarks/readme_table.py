"""Writes the demo's measured table, pictures and answers into README.md: `python -m benchmarks.readme_table runs/demo`.

Run it after `make demo` (`make readme` does both): the demo's numbers and answers in README come from here and nowhere else.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from deepstack_jax.config import from_stored
from deepstack_jax.data.open import open_source

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


PYTHON = """import deepstack_jax as dsx

lmm, page = dsx.load({model}), [{page}]
print(lmm.generate(page, {fine}, max_new_tokens=1))
print(lmm.generate([page, page], [{coarse}, {fine}], max_new_tokens=1))
dsx.save_hf(lmm, {out}, force=True)
print(dsx.load({out}).logits([[1, -200, 5]], [page]).shape)"""


def answers(demo: Path) -> str:
    """What the trained demo says about a held-out page, from Python, the command line and in a conversation."""
    config = from_stored(json.loads((demo / "deepstack" / "config.json").read_text()))
    example, page = open_source(config.data, "validation")[0], demo / "page.png"
    asked = [message.text.replace("<image>", "").strip() for message in example.messages if message.role == "human"]
    fine = next(words for words in asked if words.startswith("digit"))
    coarse = next(words for words in asked if words.startswith("shade"))
    model, verb = str(demo / "deepstack"), [sys.executable, "-m", "deepstack_jax.generate"]
    names = {"model": model, "page": str(page), "fine": fine, "coarse": coarse, "out": str(demo.parent / "exported")}
    script = PYTHON.format(**{name: json.dumps(value) for name, value in names.items()})
    said = _run([sys.executable, "-c", script]).splitlines()
    lines = ["```python"]
    for line in script.splitlines():
        lines.append(f"{line}  # {said.pop(0)}" if line.startswith("print(") else line)
    command = ["--model=" + model, f"--image={page}", "--max_new_tokens=1"]
    said_once = _run([*verb, *command, f"--prompt={fine}", "--json"])
    said_twice = _run([*verb, *command, "--chat"], f"{coarse}\n{fine}\n").splitlines()
    lines += ["```", "", "```console", f"$ python -m deepstack_jax.generate {' '.join(command)} --prompt={fine} --json"]
    lines += [said_once.strip(), f"$ python -m deepstack_jax.generate {' '.join(command)} --chat"]
    lines += [f"> {coarse}", said_twice[0], f"> {fine}", said_twice[1], "```"]
    return "\n".join(lines)


def _run(command: list[str], typed: str = "") -> str:
    return subprocess.run(command, input=typed, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout


def write_parts(parts: dict[str, str]) -> int:
    """Rewrite the parts of README.md between the marks of their names; 1 where a mark is missing, said in one line."""
    readme = REPOSITORY / "README.md"
    text = readme.read_text()
    for name, part in parts.items():
        marked = re.compile(rf"(<!-- {name}:begin[^\n]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text, count = marked.subn(lambda match, part=part: match[1] + part + "\n" + match[2], text)
        if count != 1:
            print(f"error: README.md has no {name}:begin and {name}:end marks", file=sys.stderr)
            return 1
    readme.write_text(text)
    return 0


def main(folder: str) -> int:
    """Rewrite what the demo says in README.md, and refresh docs/images."""
    demo = Path(folder)
    for needed in ("summary.json", "page.png"):
        if not (demo / needed).is_file():
            print(f"error: {demo / needed} does not exist; run `make demo` first", file=sys.stderr)
            return 1
    parts = {"demo": markdown(json.loads((demo / "summary.json").read_text())), "answers": answers(demo)}
    if failed := write_parts(parts):
        return failed
    images = REPOSITORY / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    shutil.copy(demo / "pages.png", images / "pages.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
