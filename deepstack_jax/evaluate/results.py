"""results.json: every score with all that it depends on; of a training run also what the run took (docs/runs.md)."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rich.table import Table

from deepstack_jax import __version__
from deepstack_jax.config import Config
from deepstack_jax.config.chat_template import template_in_words
from deepstack_jax.data.example import BadExample
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.generate.options import Options
from deepstack_jax.printing import plural, redacted

PREDICTIONS, RESULTS = "predictions.jsonl", "results.json"  # in the folder of an evaluation
NEAR = 1e-3
"""Logits between two choices from which on another batch, device or number of them may choose the other in float32."""
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "transformers", "tokenizers", "sentencepiece")
UNTITLED = ("name", "data", "rows", "rows_in_all", "questions", "bad_examples")  # of results, what a table has in its title
# Of a protocol, what a table has in words beside every score; results.json has all of it
SHOWN = ("definition", "decoding", "max_new_tokens", "template", "earlier_turns", "dtype")


def summarise(
    task: Task, data: str, rows: int, predictions: Sequence[Prediction], bad: Iterable[BadExample], protocol: dict[str, Any]
) -> dict[str, Any]:
    """The scores of a task, how many rows they are not of, and how the answers were made."""
    left_out = [{"row": example.index, "id": example.name, "reason": example.reason} for example in bad]
    near = sum(one.margin is not None and one.margin <= NEAR for one in predictions)
    counts = {
        "rows": rows,
        "rows_in_all": len(task.source),
        "questions": len(predictions),
        "bad_examples": len({one["row"] for one in left_out}),
    }
    scores = {
        name: score | ({"protocol": task.scorers[name].protocol} if name in task.scorers else {})
        for name, score in task.aggregate(predictions).items()
    }
    return {"data": data, **counts, "near_ties": near, "left_out": left_out, "protocol": protocol, "scores": scores}


def protocol_of(config: Config, options: Options, template: str, task: Task, checkpoint: str = "") -> dict[str, Any]:
    """How answers are made and read: what must be the same for two scores to be comparable, but for the model itself.

    Args:
      checkpoint: digest of the parameters, "" where the workdir beside it tells them.
    """
    packages = {name: version(name) for name in PACKAGES}
    return {
        "task": task.name,
        "definition": task.protocol,
        "decoding": "likeliest letter where there are options, else greedy" if task.by_likelihood else "greedy",
        "max_new_tokens": options.max_new_tokens,
        "template": template_in_words(options.template or template),
        "suffix": task.suffix,
        **({} if task.open_suffix is None else {"open_suffix": task.open_suffix}),
        "earlier_turns": "true answers",
        "image": asdict(config.image) | {"exif": options.exif, "max_pixels": config.data.max_pixels},
        "dtype": config.train.compute_dtype,
        "scorers": {name: scorer.protocol for name, scorer in task.scorers.items()},
        "checkpoint": checkpoint,
        "versions": {"deepstack_jax": __version__, "python": platform.python_version(), **packages},
    }


def title_of(task: Task) -> str:
    """A task as --tasks names it."""
    return task.name if task.protocol in ("", "own") else f"{task.name}:{task.protocol}"


def folder_of(task: Task) -> str:
    """The folder of its files, beside those of other tasks."""
    return title_of(task).replace(":", "-")


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
    asked = in_words(results.get("protocol", {}))
    for name, value in flat_scores(results).items():
        known = results["scores"].get(name, {})
        table.add_row(name, f"{value:.4f}", f"{known['protocol']}; {asked}" if "protocol" in known else "")
    for name, value in results.items():
        if not isinstance(value, dict | list) and name not in UNTITLED:
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value), "")
    return table


def tasks_table(name: str, tasks: Mapping[str, dict[str, Any]]) -> Table:
    """The scores of several tasks, and below them how each was asked."""
    table = Table("task", "score", "value", "questions", "left out", "near ties", title=name, caption_justify="left")
    table.caption = "\n".join(f"{task}: {in_words(results['protocol'])}" for task, results in tasks.items())
    for task, results in tasks.items():
        counts = (f"{results['questions']:,}", f"{results['bad_examples']:,}", f"{results['near_ties']:,}")
        for at, (score, value) in enumerate(flat_scores(results).items()):
            table.add_row("" if at else task, score, f"{value:.4f}", *(("", "", "") if at else counts))
        if not results["scores"]:
            table.add_row(task, "none here: see the files for its server or judge", "", *counts)
    return table


def in_words(protocol: Mapping[str, Any]) -> str:
    """The part of a protocol that a table has room for."""
    words = [f"{name} {protocol[name]}" for name in SHOWN if protocol.get(name)]
    image = protocol.get("image", {})
    return ", ".join([*words, *(f"image {name} {image[name]}" for name in ("mode", "num_crops") if name in image)])
