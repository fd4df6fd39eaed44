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

from deepstack_jax.atomic import write_json, write_lines
from deepstack_jax.config import Config, DataConfig
from deepstack_jax.data.encode.encoder import Encoder, try_row
from deepstack_jax.data.encode.sizes import encoded_tokens, measure
from deepstack_jax.data.example import BadExample, Example, Source, SourceError
from deepstack_jax.data.formats.image_files import read_image
from deepstack_jax.data.open import check_images
from deepstack_jax.data.order.mixture import epoch_order
from deepstack_jax.data.overlap import find_overlap
from deepstack_jax.evaluate.held_out import HeldOut
from deepstack_jax.evaluate.questions import check_rows, uninterrupted
from deepstack_jax.evaluate.results import data_name, flat_scores, protocol_of, summarise, table_of
from deepstack_jax.evaluate.tasks import Prediction
from deepstack_jax.parallel.distributed import broadcast_str, is_first_host
from deepstack_jax.printing import Console, label, plural
from deepstack_jax.train.run.metrics import MetricsLog
from deepstack_jax.types import PyTree

THUMBNAIL = 448  # longest side, in pixels, of a picture in the log


def report_held_out(
    held_out: HeldOut, config: Config, params: PyTree, step: int, log: MetricsLog, console: Console
) -> float | None:
    """Held-out loss and a few answers, to the console and the logs.

    Returns:
      The loss; None where there is none, or none that can be compared with others, as where too many rows were left out.
    """
    numbers, bad = held_out.loss(params)
    left_out = count_left_out(held_out, bad, config, console)
    predictions, _ = held_out.predictions(params, 1)
    shown = predictions[: config.evaluation.samples]
    log.write(step, {**numbers, "validation_bad_examples": len(left_out)})
    if shown:
        picture = thumbnail(held_out.task.source, shown[0].row, config.data)
        log.sample(step, "samples", "\n\n".join(one_line(one) for one in shown), picture)
    console.print(f"step {step}: {loss_line(held_out, numbers)}")
    for one in shown:
        console.print(f"  {one_line(one)}", soft_wrap=True)
    loss = numbers.get("validation_loss", math.nan)
    return loss if math.isfinite(loss) and not _too_many(len(left_out), held_out.rows, config) else None


def count_left_out(held_out: HeldOut, bad: Iterable[BadExample], config: Config, console: Console) -> dict[int, BadExample]:
    """Held-out rows that could not be used, each with the first reason; named when first met, with a warning if they are many.

    By now they are no reason to end a run: `check_held_out` has looked at all of them before it began.
    """
    reasons: dict[int, BadExample] = {}
    for example in bad:
        reasons.setdefault(example.index, example)
    if _name(reasons, held_out.named, console) and (problem := _too_many(len(reasons), held_out.rows, config)):
        console.print(
            f"warning: {problem}; loss and scores are of the others; once they are mended, the same command evaluates again",
            soft_wrap=True,
        )
    return reasons


def check_held_out(source: Source, train: Source, config: Config, console: Console, *, starts: bool) -> set[int]:
    """Look through the held-out rows before anything is compiled; returns the numbers of those that cannot be used, now named.

    Args:
      train: the rows that are trained on, of which these should be none.
      starts: False where a run goes on, whose steps are not to be lost for its held-out data: what is wrong is said only.

    Raises:
      SourceError: more than `data.max_bad_fraction`: loss and scores would be of another set.
      OverlongError: one is too long, and the configuration says to stop then.
    """
    if starts:
        check_images(source, config.data, config.evaluation.examples)
    rows = min(config.evaluation.examples, len(source))
    named: set[int] = set()
    with console.status(f"looking through {plural(rows, 'held-out row')}"):
        reasons = {example.index: example for example in check_rows(source, config if starts else uninterrupted(config))}
    _name(reasons, named, console)
    if problem := _too_many(len(reasons), rows, config):
        if starts:
            raise SourceError(f"{problem}, the last one: {list(reasons.values())[-1].reason}; mend them, or allow more")
        console.print(f"warning: {problem}; loss and scores will be of the others", soft_wrap=True)
    if starts and is_first_host():
        with console.status(f"looking for them among {plural(len(train), 'training row')}"):
            said = overlap_line(source, rows, train)
        if said:
            console.print(f"warning: {said}", soft_wrap=True)
    return named


def overlap_line(held_out: Source, rows: int, train: Source) -> str:
    """How many of the held-out rows are trained on; "" where none was found."""
    overlap = find_overlap(held_out, rows, train)
    if not overlap.rows:
        return ""
    part = "" if overlap.looked_at >= len(train) else f" (the first {overlap.looked_at:,} of {len(train):,} were looked at)"
    return (
        f"{len(overlap.rows)} of {plural(rows, 'held-out row')} also stand among the training rows{part}, as the same row or "
        f"the same question about the same image, the first: {label(overlap.first)}; scores on them tell what was remembered: "
        "hold others out with --config.data.validation=FILE"
    )


def _name(reasons: dict[int, BadExample], named: set[int], console: Console) -> bool:
    """Print those that are not named yet; returns whether there were any."""
    new = [example for row, example in reasons.items() if row not in named]
    for example in new:
        console.print(f"held-out row {example.index} ({label(example.name)}) is left out: {example.reason}", soft_wrap=True)
    named.update(reasons)
    return bool(new)


def _too_many(bad: int, rows: int, config: Config) -> str:
    limit = config.data.max_bad_fraction
    if bad <= limit * rows:
        return ""
    return f"{bad} of {rows} held-out rows cannot be used, more than config.data.max_bad_fraction={limit}"


def loss_line(held_out: HeldOut, numbers: dict[str, float]) -> str:
    if not numbers:
        return f"no validation loss: none of the {held_out.rows} held-out rows has a supervised token that can be used"
    return f"validation loss {numbers['validation_loss']:.4f}"


def thumbnail(source: Source, index: int, data: DataConfig) -> np.ndarray | None:
    """The first picture of an example as u8[y, x, 3], shrunk; None where it has none that can be read."""

    def draw(example: Example) -> np.ndarray | None:
        if not example.images:
            return None
        picture = read_image(example.images[0], data)[0].convert("RGB")
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        return np.asarray(picture)

    drawn = try_row(source, index, draw)
    return None if isinstance(drawn, BadExample) else drawn


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
    evaluation = asdict(config.evaluation)
    known = stored_results(stored, console) if is_first_host() else {}
    done = (known.get("steps"), known.get("evaluation")) == (facts["steps"], evaluation)
    if held_out is not None and ("scores" not in known or _too_many(known["bad_examples"], held_out.rows, config)):
        done = False  # written by an earlier version, or rows may be mended by now
    if broadcast_str("done" if done else ""):
        console.print(table_of(known))
        return
    results: dict[str, Any] = {"name": config.name, **facts, "evaluation": evaluation}
    predictions: list[Prediction] | None = None
    if held_out is not None:
        numbers, bad = held_out.loss(params)
        count_left_out(held_out, bad, config, console)
        if not numbers:
            console.print(loss_line(held_out, numbers))
        predictions, unasked = held_out.predictions(params, config.evaluation.examples)
        left_out = count_left_out(held_out, [*bad, *unasked], config, console)
        protocol = protocol_of(config, held_out.options, config.data.template)
        results |= numbers
        results |= summarise(held_out.task, data_name(config), held_out.rows, predictions, left_out.values(), protocol)
    if not is_first_host():
        return
    if predictions is not None:
        write_lines(workdir / "predictions.jsonl", map(asdict, predictions))
        numbers = {name: value for name, value in results.items() if isinstance(value, float)}
        log.write(facts["steps"], numbers | flat_scores(results))
        for one in predictions[: config.evaluation.samples]:
            console.print(f"  {one_line(one)}", soft_wrap=True)
    write_json(stored, results)
    console.print(table_of(results))


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
    console.print(f"{stored} is damaged ({problem}) and is written again", soft_wrap=True)
    return {}


def first_sizes(source: Source, config: Config) -> dict[str, int]:
    """Of the examples that training begins with: positions of a row that holds one, and the most that one of them sees.

    "visual_tokens" counts distinct encoded tokens, in the sequence or injected: those of an example, however many share a row.
    """
    spec = uninterrupted(config).data_spec
    order, encoder = epoch_order(source, config.data.seed, config.data.shuffle), Encoder(spec)
    rows = order(0, np.arange(min(config.train.batch_size, len(order)))).tolist()
    found = [
        try_row(source, row, lambda one: (measure(one, encoder).tokens, encoded_tokens(one, encoder.spec))) for row in rows
    ]
    usable = [sizes for sizes in found if not isinstance(sizes, BadExample)]
    longest, visual = (max(sizes, default=0) for sizes in zip(*usable, strict=True)) if usable else (0, 0)
    return {"context_length": config.data_spec.padded_length(longest), "visual_tokens": visual}


def one_line(prediction: Prediction) -> str:
    mark = "right" if prediction.scores["exact_match"] else "wrong"
    expected = " or ".join(map(repr, prediction.references))
    return f"{mark}: {prediction.question!r} -> {prediction.prediction!r} (expected {expected})"
