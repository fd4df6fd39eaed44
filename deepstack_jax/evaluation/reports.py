"""What a training run says of its held-out data: a few answers now and then, all scores at the end."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.image import ImageError, open_image
from deepstack_jax.data.sources import Source, SourceError
from deepstack_jax.evaluation.runner import Answer, HeldOut, mean_by_kind
from deepstack_jax.parallel.distributed import first_host_says, is_first_host
from deepstack_jax.training.metrics import MetricsLog, read_metrics, write_json
from deepstack_jax.types import PyTree

THUMBNAIL = 448  # longest side, in pixels, of a picture in the log


def report_held_out(held_out: HeldOut, config: Config, params: PyTree, step: int, log: MetricsLog, console: Console) -> float:
    """Held-out loss and a few answers, to the console and the logs; returns the loss."""
    numbers = held_out.loss(params)
    answers, _ = held_out.answers(params, 1)
    shown = answers[: config.evaluation.samples]
    log.write(step, numbers)
    if shown:
        picture = thumbnail(held_out.source, shown[0].index)
        log.sample(step, "samples", "\n\n".join(one_line(answer) for answer in shown), picture)
    console.print(f"step {step}: validation loss {numbers['validation_loss']:.4f}")
    for answer in shown:
        console.print(f"  {one_line(answer)}", markup=False, soft_wrap=True)
    return numbers["validation_loss"]


def thumbnail(source: Source, index: int) -> np.ndarray | None:
    """The first picture of an example as u8[y, x, 3], shrunk; None where it has none that can be read."""
    try:
        example = source[index]
        if not example.images:
            return None
        picture = open_image(example.images[0]).convert("RGB")
    except (ImageError, SourceError):
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def finish(
    held_out: HeldOut | None,
    config: Config,
    params: PyTree,
    facts: dict[str, Any],
    workdir: Path,
    log: MetricsLog,
    console: Console,
) -> None:
    """Evaluate the trained model, unless that is done; write predictions.jsonl and results.json; print the scores.

    All hosts take part, the first one writes.

    Args:
      facts: what results.json says besides scores; "steps" among them.
    """
    stored = workdir / "results.json"
    protocol = asdict(config.evaluation)
    known = json.loads(stored.read_text()) if is_first_host() and stored.exists() else {}
    done = (known.get("steps"), known.get("evaluation")) == (facts["steps"], protocol)
    if first_host_says("done" if done else ""):
        show_results(config.name, stored, known, console)
        return
    results: dict[str, Any] = {"name": config.name, **facts, "evaluation": protocol}
    answers: list[Answer] | None = None
    if held_out is not None:
        results |= held_out.loss(params)
        answers, bad = held_out.answers(params, config.evaluation.examples)
        results |= mean_by_kind(answers) | {"questions": len(answers), "bad_examples": len(bad)}
    if not is_first_host():
        return
    if answers is not None:
        scratch = workdir / "predictions.tmp"
        scratch.write_text("".join(json.dumps(answer.as_dict()) + "\n" for answer in answers))
        os.replace(scratch, workdir / "predictions.jsonl")
        log.write(facts["steps"], {name: value for name, value in results.items() if isinstance(value, float)})
        for answer in answers[: config.evaluation.samples]:
            console.print(f"  {one_line(answer)}", markup=False, soft_wrap=True)
    write_json(stored, results)
    show_results(config.name, stored, results, console)


def seconds_per_step(workdir: Path) -> float | None:
    """The median over the run's log lines; None where it was too short to be timed."""
    timed = [record["seconds_per_step"] for record in read_metrics(workdir) if "seconds_per_step" in record]
    return float(np.median(timed)) if timed else None


def visual_tokens_used(batch: Batch) -> int:
    """Most distinct encoded tokens that any row of the batch sees, in the sequence or injected."""
    rows = zip(batch.token_source, batch.stack_source, strict=True)
    return max(np.unique(source[source >= 0]).size for source in (np.concatenate([t, s.ravel()]) for t, s in rows))


def show_results(name: str, stored: Path, results: dict[str, Any], console: Console) -> None:
    """The scores as a table."""
    table = Table(title=f"{name}: {stored}", show_header=False)
    for key, value in results.items():
        if isinstance(value, dict):
            continue
        table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


def one_line(answer: Answer) -> str:
    mark = "right" if answer.score else "wrong"
    return f"{mark}: {answer.question!r} -> {answer.prediction!r} (expected {answer.reference!r})"
