"""`python -m benchmarks.task_table` writes the tables of docs/evaluation.md from the registry of benchmarks."""

from __future__ import annotations

from pathlib import Path

from deepstack_jax.evaluate.benchmarks.registry import TASKS

OUTPUT = Path(__file__).parents[1] / "docs" / "evaluation.md"
START, END = "<!-- tasks -->\n", "<!-- end of tasks -->"
MODELS = ("DeepStack-L", "DeepStack-V", "DeepStack-L-HD")


def tables() -> str:
    """Task -> files -> metric -> the paper's number -> protocols; then where the files come from."""
    lines = [f"| task | files | metric | {' | '.join(MODELS)} | protocols |", "|---" * (4 + len(MODELS)) + "|"]
    for name, task in TASKS.items():
        files = "; or ".join(task.files)
        metric = task.metric or ("its server's" if task.hidden else "a judge's")
        paper = " | ".join(task.paper.get(model, "-") for model in MODELS)
        protocols = "; ".join(f"`{protocol}`: {how.words}" for protocol, how in task.protocols.items())
        lines.append(f"| `{name}`: {task.title} | `{task.folder}/`: {files} | {metric} | {paper} | {protocols} |")
    lines += ["", "| folder | where its files come from |", "|---|---|"]
    lines += [f"| `{folder}/` | {origin} |" for folder, origin in {one.folder: one.origin for one in TASKS.values()}.items()]
    return "\n".join(lines).replace("*", r"\*") + "\n"


def page(text: str) -> str:
    """The page with its tables as the registry has them."""
    before, _, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{OUTPUT} has no section {START.strip()} ... {END}")
    return f"{before}{START}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    OUTPUT.write_text(page(OUTPUT.read_text()))
