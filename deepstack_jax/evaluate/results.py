"""results.json: every score with all that it depends on; of a training run also what the run took (docs/runs.md)."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from deepstack_jax.config import Config
from deepstack_jax.data.example import BadExample
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.generate.options import Options
from deepstack_jax.printing import plural, redacted


def summarise(
    task: Task, data: str, rows: int, predictions: Sequence[Prediction], bad: Iterable[BadExample], protocol: dict[str, Any]
) -> dict[str, Any]:
    """The scores of a task, how many rows they are not of, and how the answers were made."""
    left_out = [{"row": example.index, "id": example.name, "reason": example.reason} for example in bad]
    counts = {"rows": rows, "questions": len(predictions), "bad_examples": len({one["row"] for one in left_out})}
    scores = {name: score | {"protocol": task.scorers[name].protocol} for name, score in task.aggregate(predictions).items()}
    return {"data": data, **counts, "left_out": left_out, "protocol": protocol, "scores": scores}


def protocol_of(config: Config, options: Options, template: str) -> dict[str, Any]:
    """How answers are made."""
    return {
        "decoding": "greedy",
        "max_new_tokens": options.max_new_tokens,
        "template": options.template or template,
        "image_mode": config.image.mode,
        "num_crops": config.image.num_crops if config.image.kind.stacks_crops else 0,
        "dtype": config.train.compute_dtype,
        "earlier_turns": "true answers",
    }


def data_name(config: Config) -> str:
    """The held-out data of a configuration, for people."""
    return redacted(f"{config.name}: {config.data.validation or config.data.source}")


def flat_scores(results: dict[str, Any]) -> dict[str, float]:
    """{"exact_match": ..., "fine_exact_match": ...}: the names in logs and tables."""
    found = {}
    for name, entry in results.get("scores", {}).items():
        found |= {name: entry["score"]} | {f"{kind}_{name}": score for kind, score in entry.get("by_kind", {}).items()}
    return found


def table_of(results: dict[str, Any]) -> Table:
    """The scores with their protocol, then what else is a number or a word."""
    title = results["name"]
    if "data" in results:
        counts = f"{plural(results['questions'], 'question')} of {plural(results['rows'], 'row')}"
        title += f" on {results['data']}: {counts}, {results['bad_examples']} left out"
    table = Table("score", "value", "protocol", title=title)
    asked = ", ".join(f"{name} {value}" for name, value in results.get("protocol", {}).items())
    for name, value in flat_scores(results).items():
        known = results["scores"].get(name)
        table.add_row(name, f"{value:.4f}", f"{known['protocol']}; {asked}" if known else "")
    for name, value in results.items():
        if not isinstance(value, dict | list) and name not in ("name", "data", "rows", "questions", "bad_examples"):
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value), "")
    return table
