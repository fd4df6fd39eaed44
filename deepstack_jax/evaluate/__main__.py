"""Score a model on held-out rows: `python -m deepstack_jax.evaluate --model=DIR --data=val.json --images=DIR`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.table import Table

from deepstack_jax import cli
from deepstack_jax.api import DTYPES, LMM, ConfigError, Options, load
from deepstack_jax.atomic import write_json, write_lines
from deepstack_jax.config import Config, DataConfig, to_dict
from deepstack_jax.data.encode.encoder import BadExample
from deepstack_jax.data.example import Source, SourceError
from deepstack_jax.data.fingerprint import describe_files, describe_options
from deepstack_jax.data.formats import files
from deepstack_jax.data.open import MissingError, open_files, open_source
from deepstack_jax.evaluate.checkpoint import EvalCheckpoint
from deepstack_jax.evaluate.held_out import Refusal, ask
from deepstack_jax.evaluate.progress import Progress
from deepstack_jax.evaluate.questions import check_questions
from deepstack_jax.evaluate.reports import left_out_of
from deepstack_jax.evaluate.scorers import SCORERS
from deepstack_jax.generate.prompts import find_template
from deepstack_jax.printing import Console, label, plural, redacted
from deepstack_jax.train.checkpoint.checksums import checksums

USAGE = """
Answer a held-out set by greedy generation, and score the answers.

  python -m deepstack_jax.evaluate --model=runs/receipts --data=receipts/val.json --images=receipts --out=scores
  python -m deepstack_jax.evaluate --model=runs/receipts --config=configs/receipts.py --config.data.root=receipts --limit=20

  --model=DIR           Hugging Face folder or hub id (DeepStack, LLaVA-1.5, LLaVA-NeXT), or the workdir of a training run
  --data=FILE           rows in LLaVA JSON, or any other container that `train` reads
  --images=DIR          where the image paths in the rows start
  --config=FILE         in place of --data and --images: the validation data of a configuration, its evaluation.max_new_tokens
                        and evaluation.batch_size
  --limit=N             the first N rows; all of them if left out
  --out=DIR             writes predictions.jsonl (every question, answer and score) and results.json
  --max_new_tokens=64   most tokens of an answer
  --batch_size=8        questions answered at once; the answers do not depend on it
  --template=NAME       conversation template in place of the model's own
  --dtype=NAME          float32 or bfloat16; float32 on a CPU and bfloat16 on accelerators if left out

Every answered turn of a row is a question; the true answers of the turns before it are given. With --out the answers of a run
that was stopped are kept, and the same command goes on from there.

Exit codes: 0 done; 1 a mistake in the input, said in one line; 130 stopped by Ctrl-C.
"""

FLAGS = {
    "model": (flags.DEFINE_string, None, "Model folder, hub id or workdir."),
    "data": (flags.DEFINE_string, None, "File of held-out rows."),
    "images": (flags.DEFINE_string, "", "Image root."),
    "limit": (flags.DEFINE_integer, None, "Most rows."),
    "out": (flags.DEFINE_string, None, "Folder for predictions.jsonl and results.json."),
    "max_new_tokens": (flags.DEFINE_integer, None, "Most tokens of an answer."),
    "batch_size": (flags.DEFINE_integer, None, "Questions answered at once."),
    "template": (flags.DEFINE_string, None, "Conversation template."),
    "dtype": (flags.DEFINE_string, None, "float32 or bfloat16."),
}
DEFAULTS = {"max_new_tokens": 64, "batch_size": 8}  # without --config


@dataclass(frozen=True)
class Task:
    """What is asked, and how; `origin` tells these rows from others, `bad` are known to be no questions for any model."""

    source: Source
    data: str
    origin: dict[str, Any]
    rows: int
    options: Options
    batch_size: int
    max_bad_fraction: float
    bad: tuple[BadExample, ...] = ()


def define_flags() -> None:
    """Only when this verb runs, so that another may have flags of the same name."""
    cli.define_config_flag()
    for name, (define, default, meaning) in FLAGS.items():
        define(name, default, meaning)


def main() -> int:
    given: dict[str, Any] = {name: flags.FLAGS[name].value for name in FLAGS}
    if not given["model"]:
        raise ConfigError("--model is missing; e.g. --model=DIR with a Hugging Face folder or the workdir of a training run")
    if given["dtype"] not in (None, *DTYPES):
        raise ConfigError(f"--dtype={given['dtype']} is not known; use one of {', '.join(DTYPES)}")
    for name in ("limit", "batch_size"):
        if given[name] is not None and given[name] < 1:
            raise ConfigError(f"--{name}={given[name]}, expected 1 or more")
    console = Console()
    task = open_task(given, console)
    leave_out(task.bad, [], task, console)
    out = cli.writable_folder(given["out"], "out") if given["out"] else None
    lmm = load(given["model"], given["dtype"])
    task = replace(task, options=task.options.replace({"exif": lmm.config.data.exif}))  # as in training
    unfinished = EvalCheckpoint(out, None if out is None else key_of(lmm, task))
    predictions, bad = run_task(lmm, task, unfinished, console)
    results = summarise(lmm, given["model"], task, predictions, bad)
    if out is not None:
        write_lines(out / "predictions.jsonl", predictions)
        write_json(out / "results.json", results)
        unfinished.done()
    console.print(table_of(results))
    return cli.EXIT_DONE


def open_task(given: dict[str, Any], console: Console) -> Task:
    """The rows to ask, from --data or --config.

    Raises:
      ConfigError: neither or both are given, or nothing is there. SourceError: the file cannot be read.
      RequestError: no such template.
    """
    if (flags.FLAGS["config"].value is None) == (given["data"] is None):
        raise ConfigError("give either --data=FILE with --images=DIR, or --config=FILE whose validation data is asked")
    if given["data"] is not None:
        config, sizes = Config(data=DataConfig(validation=files.absolute(given["data"]), images=given["images"])), DEFAULTS
        try:
            source, name = open_files(given["data"], given["images"]), given["data"]
        except MissingError as error:
            raise ConfigError(f"{error}; point to it with --data=FILE") from error
    else:
        config = cli.parse_config()
        data, evaluation = config.data, config.evaluation
        source, name = open_source(config, "validation"), f"{config.name}: {data.validation or data.source}"
        sizes = {"max_new_tokens": evaluation.max_new_tokens, "batch_size": evaluation.batch_size}
    sizes = {key: value if given[key] is None else given[key] for key, value in sizes.items()}
    options = Options(max_new_tokens=sizes["max_new_tokens"], template=given["template"])
    if options.template is not None:
        find_template(options.template)  # a wrong name is no fault of the rows
    rows = min(len(source), given["limit"] or len(source))
    origin = {"root": config.data.root, "files": describe_files(config, "validation", source)}
    origin |= describe_options(config, "validation", source, 0)
    with console.status(f"looking through {plural(rows, 'row')}"):
        bad = tuple(check_questions(source, range(rows), config.data))
    return Task(source, redacted(name), origin, rows, options, sizes["batch_size"], config.data.max_bad_fraction, bad)


def key_of(lmm: LMM, task: Task) -> dict[str, Any]:
    """All that the answers depend on: another key, other answers."""
    protocol = asdict(task.options) | {"batch_size": task.batch_size, "rows": task.rows}
    model = {"weights": checksums(lmm.params), "config": to_dict(lmm.config), "template": lmm.template}
    return {"data": task.origin, "device": jax.default_backend(), **protocol, **model}


def run_task(
    lmm: LMM, task: Task, unfinished: EvalCheckpoint, console: Console
) -> tuple[list[dict[str, Any]], list[BadExample]]:
    """Ask everything that is not answered yet, showing how far it is.

    Returns:
      The lines of predictions.jsonl, and what could not be asked.

    Raises:
      SourceError: more rows than `data.max_bad_fraction` cannot be asked: the score would be of another set.
    """
    answers, refused = unfinished.answers(), unfinished.refused()
    done = {*answers, *((refusal.index, refusal.turn) for refusal in refused)}
    reached = max((row for row, _ in done), default=0)
    bad, never = list(task.bad), {example.index for example in task.bad}
    remarks: dict[int, tuple[str, ...]] = {}
    unread = sorted({*range(reached)} - {row for row, _ in done} - never)  # could not be read then: they may be mended
    if done:
        console.print(f"goes on behind {plural(len(done), 'question')} answered before, in {unfinished.file}", soft_wrap=True)
    leave_out(refused, bad, task, console)
    with Progress(reached, task.rows, console) as progress:
        for rows in (unread, [row for row in range(reached, task.rows) if row not in never]):
            for results in ask(lmm.answerer, task.source, task.options, task.batch_size, rows, done):
                if isinstance(results, BadExample):
                    leave_out([results], bad, task, console)
                    continue
                unfinished.keep(results)
                leave_out([result for result in results if isinstance(result, Refusal)], bad, task, console)
                predictions = [result for result in results if not isinstance(result, Refusal)]
                remarks |= {one.question.row: one.question.remarks for one in predictions}
                found = [one.as_dict() for one in predictions]
                answers |= {(line["row"], line["turn"]): line for line in found}
                progress.show(max(reached, *(line["row"] + 1 for line in found)) if found else reached)
        progress.show(task.rows)
    for remark, count in Counter(chain.from_iterable(remarks.values())).items():
        console.print(f"{remark}: {count:,}", soft_wrap=True)
    if not answers:
        raise SourceError(f"none of the {task.rows} rows could be asked, expected at least one; mend them")
    return [answers[place] for place in sorted(answers)], bad


def leave_out(more: Sequence[BadExample], bad: list[BadExample], task: Task, console: Console) -> None:
    """Name what cannot be asked and add it to `bad`.

    Raises:
      SourceError: as `run_task`.
    """
    for example in more:
        console.print(f"row {example.index} ({label(example.name)}) is left out: {example.reason}", soft_wrap=True)
    bad += more
    rows = len({example.index for example in bad})
    if rows > task.max_bad_fraction * task.rows:
        raise SourceError(
            f"{rows} of {plural(task.rows, 'row')} cannot be asked, the last one: {bad[-1].reason}; mend them (image paths "
            "start at --images=DIR), or the score would be of another set"
        )


def summarise(
    lmm: LMM, model: str, task: Task, predictions: Sequence[dict[str, Any]], bad: Sequence[BadExample]
) -> dict[str, Any]:
    """results.json: every score with all that it depends on."""
    config = lmm.config
    crops = config.image.num_crops if config.image.mode in ("deepstack", "hd") else 0
    protocol = {
        "decoding": "greedy",
        "max_new_tokens": task.options.max_new_tokens,
        "template": task.options.template or lmm.template,
        "image_mode": config.image.mode,
        "num_crops": crops,
        "dtype": config.train.compute_dtype,
        "earlier_turns": "true answers",
    }
    scores = {
        name: {"score": float(np.mean([line[name] for line in predictions])), "protocol": scorer.protocol}
        for name, scorer in SCORERS.items()
    }
    counts = {"rows": task.rows, "questions": len(predictions), **left_out_of(bad)}
    return {"model": model, "data": task.data, **counts, "protocol": protocol, "scores": scores}


def table_of(results: dict[str, Any]) -> Table:
    """The scores, each with its protocol."""
    asked = ", ".join(f"{name} {value}" for name, value in results["protocol"].items())
    counts = (
        f"{plural(results['questions'], 'question')} of {plural(results['rows'], 'row')}, {results['bad_examples']} left out"
    )
    table = Table("score", "value", "protocol", title=f"{results['model']} on {results['data']}: {counts}")
    for name, entry in results["scores"].items():
        table.add_row(name, f"{entry['score']:.4f}", f"{entry['protocol']}; {asked}")
    return table


if __name__ == "__main__":
    define_flags()
    less = "lower --batch_size or --max_new_tokens, or choose --dtype=bfloat16"
    cli.run(main, USAGE, less)
