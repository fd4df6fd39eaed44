"""What a training run says of its held-out data: a few answers now and then, all scores at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.encode import BadExample
from deepstack_jax.data.image import ImageError, open_image
from deepstack_jax.data.sources import Source, SourceError
from deepstack_jax.evaluation.runner import Answer, HeldOut, mean_by_kind
from deepstack_jax.outward import write_json, write_whole
from deepstack_jax.parallel.distributed import first_host_says, is_first_host
from deepstack_jax.training.metrics import MetricsLog, read_metrics
from deepstack_jax.types import PyTree

THUMBNAIL = 448  # longest side, in pixels, of a picture in the log


def report_held_out(
    held_out: HeldOut, config: Config, params: PyTree, step: int, log: MetricsLog, console: Console
) -> float | None:
    """Held-out loss and a few answers, to the console and the logs.

    Returns:
      The loss; None where there is none, or none that can be compared with others.

    Raises:
      SourceError: as `count_left_out`.
    """
    numbers, bad = held_out.loss(params)
    left_out = count_left_out(held_out, bad, config, console)
    answers, _ = held_out.answers(params, 1)
    shown = answers[: config.evaluation.samples]
    log.write(step, {**numbers, "validation_bad_examples": left_out})
    if shown:
        picture = thumbnail(held_out.source, shown[0].index)
        log.sample(step, "samples", "\n\n".join(one_line(answer) for answer in shown), picture)
    console.print(f"step {step}: {loss_line(held_out, numbers)}")
    for answer in shown:
        console.print(f"  {one_line(answer)}", markup=False, soft_wrap=True)
    loss = numbers.get("validation_loss", math.nan)
    return loss if math.isfinite(loss) else None


def count_left_out(held_out: HeldOut, bad: Iterable[BadExample], config: Config, console: Console) -> int:
    """How many held-out rows could not be used; each is named when it is first met.

    Raises:
      SourceError: more than `data.max_bad_fraction`: the numbers would be of another set.
    """
    reasons = {example.index: example for example in bad}
    for index, example in reasons.items():
        if index not in held_out.named:
            held_out.named.add(index)
            console.print(f"held-out row {index} ({example.name}) is left out: {example.reason}", markup=False, soft_wrap=True)
    limit = config.data.max_bad_fraction
    if len(reasons) > limit * held_out.rows:
        last = list(reasons.values())[-1]
        raise SourceError(
            f"{len(reasons)} of {held_out.rows} held-out rows cannot be used, more than config.data.max_bad_fraction={limit}, "
            f"the last one: {last.reason}; mend them, or the held-out loss and scores would be of another set"
        )
    return len(reasons)


def loss_line(held_out: HeldOut, numbers: dict[str, float]) -> str:
    if not numbers:
        return f"no validation loss: none of the {held_out.rows} held-out rows has a supervised token that can be used"
    return f"validation loss {numbers['validation_loss']:.4f}"


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

    Raises:
      SourceError: as `count_left_out`.
    """
    stored = workdir / "results.json"
    protocol = asdict(config.evaluation)
    known = stored_results(stored, console) if is_first_host() else {}
    done = (known.get("steps"), known.get("evaluation")) == (facts["steps"], protocol)
    if first_host_says("done" if done else ""):
        show_results(config.name, stored, known, console)
        return
    results: dict[str, Any] = {"name": config.name, **facts, "evaluation": protocol}
    answers: list[Answer] | None = None
    if held_out is not None:
        numbers, bad = held_out.loss(params)
        count_left_out(held_out, bad, config, console)
        if not numbers:
            console.print(loss_line(held_out, numbers))
        answers, unasked = held_out.answers(params, config.evaluation.examples)
        left_out = count_left_out(held_out, [*bad, *unasked], config, console)
        results |= numbers | mean_by_kind(answers) | {"questions": len(answers), "bad_examples": left_out}
    if not is_first_host():
        return
    if answers is not None:
        write_whole(workdir / "predictions.jsonl", "".join(json.dumps(answer.as_dict()) + "\n" for answer in answers))
        log.write(facts["steps"], {name: value for name, value in results.items() if isinstance(value, float)})
        for answer in answers[: config.evaluation.samples]:
            console.print(f"  {one_line(answer)}", markup=False, soft_wrap=True)
    write_json(stored, results)
    show_results(config.name, stored, results, console)


def stored_results(stored: Path, console: Console) -> dict[str, Any]:
    """What an earlier attempt wrote; nothing where that is damaged, which is said."""
    if not stored.exists():
        return {}
    try:
        known = json.loads(stored.read_text())
        if isinstance(known, dict):
            return known
        problem = "no object"
    except ValueError as error:
        problem = str(error)
    console.print(f"{stored} is damaged ({problem}) and is made anew", markup=False, soft_wrap=True)
    return {}


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
