"""A task from its rows to its predictions: over all devices and processes, kept batch by batch, going on after a kill."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from deepstack_jax.atomic import write_json, write_lines, write_whole
from deepstack_jax.background import in_background
from deepstack_jax.config import Config, to_dict
from deepstack_jax.data.example import BadExample, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate.ask import Prepared, Refusal, Result, answer, of_all_hosts, prepare, result_of
from deepstack_jax.evaluate.batches import Place, batches_of
from deepstack_jax.evaluate.benchmarks.registry import TASKS, find_task
from deepstack_jax.evaluate.checkpoint import EvalCheckpoint
from deepstack_jax.evaluate.on_mesh import MeshAnswerer, share_of
from deepstack_jax.evaluate.questions import check_questions
from deepstack_jax.evaluate.results import PREDICTIONS, RESULTS, protocol_of, summarise
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.generate.options import Options
from deepstack_jax.parallel.distributed import ProcessSlice, broadcast_str, process_slice
from deepstack_jax.printing import Console, label, plural, redacted
from deepstack_jax.progress import Progress
from deepstack_jax.train.checkpoint.checksums import checksums

ALONE = ProcessSlice(0, 1, True)
MAX_NEW_TOKENS = 64  # where neither a task nor the user says
LINES = 50  # of progress, off a terminal
_QUESTION_FILES = (".json", ".jsonl", ".csv", ".txt", ".parquet")


@dataclass(frozen=True)
class EvaluationRequest:
    """What is asked, and how."""

    task: Task  # with the rows
    config: Config  # of the data
    data: str  # its name
    origin: dict[str, Any]  # tells these rows from others
    rows: int  # how many of them are asked
    options: Options
    batch_size: int  # questions answered at once, by all processes together
    bad: tuple[BadExample, ...] = ()  # rows that are known not to be questions for any model
    overlap: Mapping[str, int] = field(default_factory=dict)  # with what the model trained on, as results.json has it


def open_task(
    title: str,
    root: str,
    config: Config,
    console: Console,
    *,
    most_rows: int,
    options: Options,
    batch_size: int,
    suffix: str | None = None,
) -> EvaluationRequest:
    """A benchmark as --tasks names it, NAME or NAME:PROTOCOL, its rows looked through.

    Args:
      root: folder or URL that holds a folder for every benchmark.
      most_rows: the first so many; 0 = all.
      suffix: in place of the task's own.

    Raises:
      ConfigError: no such task or protocol. SourceError: its files are not there or damaged.
    """
    name, _, protocol = title.partition(":")
    task = find_task(name, root, protocol or "own", config.data.limits, suffix)
    folder = files.join(root, TASKS[name].folder)
    rows = min(len(task.source), most_rows or len(task.source))
    with console.status(f"looking through {plural(rows, 'row')} of {title}"):
        bad = tuple(check_questions(task.source, range(rows), config.data, task.questions))
    origin = {"folder": redacted(folder), "files": _folder_version(folder), "rows": len(task.source)}
    return EvaluationRequest(task, config, redacted(folder), origin, rows, options, batch_size, bad)


def titles_of(tasks: str) -> list[str]:
    """The names between commas.

    Raises:
      ConfigError: one stands twice.
    """
    titles = [title.strip() for title in tasks.split(",") if title.strip()]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ConfigError(f"the tasks name {twice[0]} twice; once is enough")
    return titles


def _folder_version(folder: str) -> dict[str, str]:
    """Size and last change of the files of questions below a local folder."""
    if files.is_url(folder):
        return {}
    found = [
        file for depth in ("*", "*/*", "*/*/*.json") for file in Path(folder).glob(depth) if file.suffix in _QUESTION_FILES
    ]
    stats = {str(file.relative_to(folder)): file.stat() for file in sorted(found)}
    return {name: f"{stat.st_size:,} bytes, changed {stat.st_mtime_ns}" for name, stat in stats.items()}


def checkpoint_digest(answerer: MeshAnswerer) -> str:
    """Tells parameters apart; computed where they lie."""
    return hashlib.sha256(json.dumps(checksums(answerer.params), sort_keys=True).encode()).hexdigest()[:16]


def key_of(answerer: MeshAnswerer, digest: str, evaluation: EvaluationRequest) -> dict[str, Any]:
    """All that the answers depend on: another key, other answers."""
    asked = evaluation.task
    task = {"task": asked.name, "protocol": asked.protocol, "suffix": asked.suffix, "open_suffix": asked.open_suffix}
    how = asdict(evaluation.options) | {"batch_size": evaluation.batch_size, "rows": evaluation.rows}
    model = {"weights": digest, "config": to_dict(answerer.config), "template": answerer.template}
    return {"data": evaluation.origin, "device": jax.default_backend(), **task, **how, **model}


def ask_all(
    answerer: MeshAnswerer,
    evaluation: EvaluationRequest,
    checkpoint: EvalCheckpoint,
    console: Console,
    part: ProcessSlice = ALONE,
) -> tuple[list[Prediction], list[BadExample]]:
    """Ask everything that is not answered yet, showing how far it is; all processes take part, and end with the same.

    Args:
      checkpoint: of the first process; the others keep nothing.
      part: which questions of every batch this process asks.

    Returns:
      What was answered, now and before, in the order of the rows, and what could not be asked.

    Raises:
      SourceError: more rows than `data.max_bad_fraction` cannot be asked: the score would be of another set.
    """
    predictions, bad = list[Prediction](), [*evaluation.bad]
    known = [result_of(record) for record in json.loads(broadcast_str(json.dumps([asdict(one) for one in checkpoint.results])))]
    never = {example.index for example in bad}
    readable = [row for row in range(evaluation.rows) if row not in never]
    with console.status(f"sorting the questions of {plural(len(readable), 'row')} by length"):
        batches, unread = batches_of(evaluation.task, answerer, evaluation.options, readable, evaluation.batch_size)
    leave_out(unread, bad, evaluation, console)
    take(known, predictions, bad, evaluation, console)
    done = {Place(one.row, one.turn) for one in predictions} | {
        Place(one.index, one.turn) for one in known if isinstance(one, Refusal)
    }
    if done:
        console.print(f"goes on after {plural(len(done), 'question')} answered before, in {checkpoint.file}", soft_wrap=True)
    for file in () if done else checkpoint.others:
        what = "another model, other data, another batch size or other options"
        console.print(f"begins anew: {file} has answers with {what}; remove it if it is not wanted", soft_wrap=True)
    remarks = Counter[str]()
    left = [left for batch in batches if (left := [place for place in batch if place not in done])]
    parts = in_background((prepare_part(answerer, evaluation, batch, part, remarks) for batch in left), 1)
    shown = Progress("questions", sum(map(len, batches)), console, first=len(done), lines=LINES)
    with closing(parts) as prepared, shown as progress:
        for batch, mine in zip(left, prepared, strict=True):
            share = share_of_process(evaluation, part)
            found = of_all_hosts(answer(evaluation.task, answerer, evaluation.options, share, mine), part)
            checkpoint.add(found)
            take(found, predictions, bad, evaluation, console)
            done.update(batch)
            progress.show(len(done))
    for remark, count in remarks.items():
        console.print(f"{remark}: {count:,}", soft_wrap=True)
    if not predictions:
        raise SourceError(f"none of the {evaluation.rows} rows could be asked, expected at least one; fix them")
    return sorted(predictions, key=lambda one: (one.row, one.turn)), bad


def evaluate_one(
    answerer: MeshAnswerer,
    digest: str,
    mesh: Mesh,
    evaluation: EvaluationRequest,
    folder: Path | None,
    name: str,
    console: Console,
) -> tuple[dict[str, Any], EvalCheckpoint]:
    """Ask a task, score it and write its files; all processes take part.

    Args:
      digest: of the parameters.
      folder: for the files, on the first process alone; None writes none.
      name: of the model, in results.json.

    Returns:
      What results.json holds but for the name; and the answers on their way, which may be removed when nothing asks again.

    Raises:
      SourceError: as `ask_all`.
    """
    config, part, task = answerer.config, process_slice(mesh), evaluation.task
    config = replace(config, data=replace(config.data, max_pixels=evaluation.config.data.max_pixels))
    options = evaluation.options.replace({"exif": config.data.exif})  # as in training
    evaluation = replace(evaluation, options=options, batch_size=share_of(mesh, evaluation.batch_size) * part.count)
    answerer = replace(answerer, config=config)
    checkpoint = EvalCheckpoint(folder, None if folder is None else key_of(answerer, digest, evaluation))
    predictions, bad = ask_all(answerer, evaluation, checkpoint, console, part)
    protocol = protocol_of(config, options, answerer.template, task, digest)
    results = summarise(task, evaluation.data, evaluation.rows, predictions, bad, protocol)
    if evaluation.overlap:
        results["overlap"] = dict(evaluation.overlap)
    if folder is not None:
        write_lines(folder / PREDICTIONS, map(asdict, predictions))
        write_json(folder / RESULTS, {"name": name, **results})
        for file, content in (task.submission(predictions) if task.submission else {}).items():
            write_whole(folder / file, content)
            console.print(f"written for the benchmark's server or judge: {folder / file}", soft_wrap=True)
    return results, checkpoint


def share_of_process(evaluation: EvaluationRequest, part: ProcessSlice) -> int:
    """Questions of a batch that a process asks at most."""
    return -(-evaluation.batch_size // part.count)


def prepare_part(
    answerer: MeshAnswerer, evaluation: EvaluationRequest, batch: Sequence[Place], part: ProcessSlice, remarks: Counter[str]
) -> list[Prepared]:
    """This process' share of a batch, read and encoded."""
    share = share_of_process(evaluation, part)
    mine = batch[part.index * share : (part.index + 1) * share]
    rows = list(dict.fromkeys(place.row for place in mine))
    return list(prepare(evaluation.task, answerer, evaluation.options, rows, frozenset(mine), remarks))


def take(
    results: Sequence[Result],
    predictions: list[Prediction],
    bad: list[BadExample],
    evaluation: EvaluationRequest,
    console: Console,
) -> None:
    """Add results to `predictions` and `bad`; raises as `ask_all`."""
    predictions += [one for one in results if isinstance(one, Prediction)]
    leave_out([one for one in results if isinstance(one, BadExample)], bad, evaluation, console)


def leave_out(more: Sequence[BadExample], bad: list[BadExample], evaluation: EvaluationRequest, console: Console) -> None:
    """Name what cannot be asked and add it to `bad`.

    Raises:
      SourceError: as `ask_all`.
    """
    for example in more:
        console.print(f"row {example.index} ({label(example.name)}) is left out: {example.reason}", soft_wrap=True)
    bad += more
    rows = len({example.index for example in bad})
    if rows > evaluation.config.data.max_bad_fraction * evaluation.rows:
        where = f"in {evaluation.data}" if evaluation.task.name else "image paths start at --images=DIR"
        raise SourceError(
            f"{rows} of {plural(evaluation.rows, 'row')} cannot be asked, the last one: {bad[-1].reason}; fix them ({where}), "
            "or the score would be of another set; --config.data.max_bad_fraction=1 scores those that can be asked"
        )
