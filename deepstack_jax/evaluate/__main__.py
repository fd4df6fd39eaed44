"""Score a model on held-out rows: `python -m deepstack_jax.evaluate --model=DIR --data=val.json --images=DIR`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from deepstack_jax import cli
from deepstack_jax.api import DTYPES, LMM, load_in_verb
from deepstack_jax.atomic import write_json, write_lines
from deepstack_jax.config import Config, build_config, from_stored, to_dict
from deepstack_jax.data.example import BadExample, SourceError
from deepstack_jax.data.fingerprint import describe_files, describe_options
from deepstack_jax.data.formats import files
from deepstack_jax.data.open import MissingError, open_files, open_source
from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate.ask import ask
from deepstack_jax.evaluate.checkpoint import EvalCheckpoint
from deepstack_jax.evaluate.questions import check_questions
from deepstack_jax.evaluate.results import data_name, protocol_of, summarise, table_of
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.generate.answers import Answerer
from deepstack_jax.generate.options import Options
from deepstack_jax.generate.prompts import find_template
from deepstack_jax.printing import REDACTED, Console, label, plural, redacted
from deepstack_jax.progress import Progress
from deepstack_jax.train.checkpoint.checksums import checksums
from deepstack_jax.train.checkpoint.init_weights import is_workdir
from deepstack_jax.train.checkpoint.reading import read_workdir_json

USAGE = """
Answer a held-out set by greedy generation, and score the answers.

  python -m deepstack_jax.evaluate --model=runs/receipts
  python -m deepstack_jax.evaluate --model=runs/receipts --data=receipts/val.json --images=receipts --out=scores
  python -m deepstack_jax.evaluate --model=DIR --config=configs/receipts.py --config.data.root=receipts --limit=20

  --model=DIR           Hugging Face folder or hub id (DeepStack, LLaVA-1.5, LLaVA-NeXT), or the workdir of a training run
  --adapter=DIR         LoRA adapters over the model: the workdir of a run that trained some, or a folder of PEFT
  --data=FILE           rows in LLaVA JSON, or any other container that `train` reads
  --images=DIR          where the image paths in the rows start
  --config=FILE         in place of --data and --images: the validation data of a configuration, its evaluation.max_new_tokens
                        and evaluation.batch_size. With neither, a workdir's own: as many rows as its run evaluates
  --config.KEY=VALUE    overrides a key of that file or of the run, with --data too: --config.data.limits.text_bytes=100000000
  --limit=N             the first N rows
  --out=DIR             writes predictions.jsonl (every question, answer and score) and results.json
  --max_new_tokens=64   most tokens of an answer
  --batch_size=8        questions answered at once; the answers do not depend on it
  --template=NAME       conversation template in place of the model's own
  --dtype=NAME          float32 or bfloat16; float32 on a CPU and bfloat16 on accelerators if left out

Every answered turn of a row is a question; the true answers of the turns before it are given. With --out the answers of a run
that was stopped are kept, and the same command goes on from there.

Exit codes: 0 done; 1 a mistake in the input, said in one line; 130 stopped by Ctrl-C.
"""

FLAGS = (
    cli.Flag(flags.DEFINE_string, "model", None, "Model folder, hub id or workdir."),
    cli.Flag(flags.DEFINE_string, "adapter", "", "LoRA adapters over the model."),
    cli.Flag(flags.DEFINE_string, "data", None, "File of held-out rows."),
    cli.Flag(flags.DEFINE_string, "images", "", "Image root."),
    cli.Flag(flags.DEFINE_integer, "limit", None, "Most rows.", lower_bound=1),
    cli.Flag(flags.DEFINE_string, "out", None, "Folder for predictions.jsonl and results.json."),
    cli.Flag(flags.DEFINE_integer, "max_new_tokens", None, "Most tokens of an answer.", lower_bound=1),
    cli.Flag(flags.DEFINE_integer, "batch_size", None, "Questions answered at once.", lower_bound=1),
    cli.Flag(flags.DEFINE_string, "template", None, "Conversation template."),
    cli.Flag(flags.DEFINE_enum, "dtype", None, "float32 or bfloat16.", enum_values=DTYPES),
    cli.CONFIG_OR_KEYS,
)
MAX_NEW_TOKENS, BATCH_SIZE = 64, 8  # with --data
LINES = 50  # of progress, off a terminal


@dataclass(frozen=True)
class EvaluationRequest:
    """What is asked, and how."""

    task: Task  # with the rows
    config: Config  # of the data
    data: str  # its name
    origin: dict[str, Any]  # tells these rows from others
    rows: int  # how many of them are asked
    options: Options
    batch_size: int
    bad: tuple[BadExample, ...] = ()  # rows that are known not to be questions for any model


def main() -> int:
    given: dict[str, Any] = {flag.name: flag.value for flag in FLAGS}
    if not given["model"]:
        raise ConfigError("--model is missing; e.g. --model=DIR with a Hugging Face folder or the workdir of a training run")
    console = Console()
    evaluation = open_evaluation(given, console)
    leave_out(evaluation.bad, [], evaluation, console)
    out = cli.writable_folder(given["out"], "out") if given["out"] else None
    lmm = load_in_verb(given["model"], given["dtype"], given["adapter"])
    data = replace(lmm.config.data, max_pixels=evaluation.config.data.max_pixels)
    lmm = replace(lmm, config=replace(lmm.config, data=data))
    options = evaluation.options.replace({"exif": lmm.config.data.exif})  # as in training
    evaluation = replace(evaluation, options=options)
    checkpoint = EvalCheckpoint(out, None if out is None else key_of(lmm, evaluation))
    predictions, bad = ask_all(lmm.answerer, evaluation, checkpoint, console)
    protocol = protocol_of(lmm.config, options, lmm.template)
    scores = summarise(evaluation.task, evaluation.data, evaluation.rows, predictions, bad, protocol)
    results = {"name": given["model"]} | scores
    if out is not None:
        write_lines(out / "predictions.jsonl", map(asdict, predictions))
        write_json(out / "results.json", results)
        checkpoint.remove()
    console.print(table_of(results))
    return cli.EXIT_DONE


def open_evaluation(given: dict[str, Any], console: Console) -> EvaluationRequest:
    """The rows to ask, from --data, --config or the model's own run.

    Raises:
      ConfigError: two of them are given or none is there. SourceError: the file cannot be read.
      RequestError: no such template.
    """
    own = is_workdir(given["model"])
    if (cli.names_config() and given["data"] is not None) or not (cli.names_config() or given["data"] is not None or own):
        raise ConfigError(
            "give either --data=FILE with --images=DIR, or --config=FILE whose validation data is asked, or neither with the "
            "workdir of a training run as --model"
        )
    config = cli.parse_config(weights=given["model"]) if cli.names_config() else with_changes(given["model"] if own else None)
    max_new_tokens, batch_size, rows = config.evaluation.max_new_tokens, config.evaluation.batch_size, given["limit"]
    if given["data"] is not None:
        data = replace(config.data, source="files", root="", validation=files.absolute(given["data"]), images=given["images"])
        config, max_new_tokens, batch_size = replace(config, data=data), MAX_NEW_TOKENS, BATCH_SIZE
        try:
            source, name = open_files(given["data"], given["images"], data.limits), redacted(given["data"])
        except MissingError as error:
            raise ConfigError(f"{error}; point to it with --data=FILE") from error
    else:
        source, name = open_source(config.data, "validation"), data_name(config)
        rows = rows or (None if cli.names_config() else config.evaluation.examples)
    options = Options(max_new_tokens=given["max_new_tokens"] or max_new_tokens, template=given["template"])
    if options.template is not None:
        find_template(options.template)  # a wrong name is not the rows' fault
    rows = min(len(source), rows or len(source))
    origin = {"root": config.data.root, "files": describe_files(config.data, "validation", source)}
    origin |= describe_options(config.data, "validation", source, 0)
    with console.status(f"looking through {plural(rows, 'row')}"):
        bad = tuple(check_questions(source, range(rows), config.data))
    return EvaluationRequest(Task(source), config, name, origin, rows, options, given["batch_size"] or batch_size, bad)


def with_changes(workdir: str | None) -> Config:
    """The configuration of a run, or the defaults, with the keys that the command line changes."""
    config = Config()
    if workdir is not None:
        config = from_stored(read_workdir_json(Path(workdir).expanduser() / "config.json"))
        if REDACTED in str(config.data):
            raise ConfigError(
                f"{workdir}/config.json holds no credentials; give --config as the run was given it, URLs and all"
            )
    if flags.FLAGS["config"].value is None:
        return config
    changes = config_flags.get_override_values(flags.FLAGS["config"])
    values = ConfigDict(to_dict(config), convert_dict=True)
    values.update_from_flattened_dict(changes)
    return build_config(values)


def key_of(lmm: LMM, evaluation: EvaluationRequest) -> dict[str, Any]:
    """All that the answers depend on: another key, other answers."""
    protocol = asdict(evaluation.options) | {"batch_size": evaluation.batch_size, "rows": evaluation.rows}
    model = {"weights": checksums(lmm.params), "config": to_dict(lmm.config), "template": lmm.template}
    return {"data": evaluation.origin, "device": jax.default_backend(), **protocol, **model}


def ask_all(
    answerer: Answerer, evaluation: EvaluationRequest, checkpoint: EvalCheckpoint, console: Console
) -> tuple[list[Prediction], list[BadExample]]:
    """Ask everything that is not answered yet, showing how far it is.

    Returns:
      What was answered, now and before, in the order of the rows, and what could not be asked.

    Raises:
      SourceError: more rows than `data.max_bad_fraction` cannot be asked: the score would be of another set.
    """
    predictions, bad = [*checkpoint.predictions], [*evaluation.bad]
    done = {(one.row, one.turn) for one in predictions} | {(one.index, one.turn) for one in checkpoint.refusals}
    seen, never = {row for row, _ in done}, {example.index for example in bad}
    reached = max(seen, default=0)
    unread = sorted({*range(reached)} - seen - never)  # could not be read then: they may be fixed
    if done:
        console.print(f"goes on after {plural(len(done), 'question')} answered before, in {checkpoint.file}", soft_wrap=True)
    leave_out(checkpoint.refusals, bad, evaluation, console)
    remarks = Counter[str]()
    with Progress("rows", evaluation.rows, console, first=reached, lines=LINES) as progress:
        for rows in (unread, [row for row in range(reached, evaluation.rows) if row not in never]):
            how = (answerer, evaluation.options, evaluation.batch_size)
            for batch in ask(evaluation.task, *how, rows, done=done, remarks=remarks):
                checkpoint.add(batch)
                leave_out([one for one in batch if isinstance(one, BadExample)], bad, evaluation, console)
                answered = [one for one in batch if isinstance(one, Prediction)]
                predictions += answered
                progress.show(max([reached, *(one.row + 1 for one in answered)]))
        progress.show(evaluation.rows)
    for remark, count in remarks.items():
        console.print(f"{remark}: {count:,}", soft_wrap=True)
    if not predictions:
        raise SourceError(f"none of the {evaluation.rows} rows could be asked, expected at least one; fix them")
    return sorted(predictions, key=lambda one: (one.row, one.turn)), bad


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
        raise SourceError(
            f"{rows} of {plural(evaluation.rows, 'row')} cannot be asked, the last one: {bad[-1].reason}; fix them (image "
            "paths start at --images=DIR), or the score would be of another set"
        )


if __name__ == "__main__":
    less = "lower --batch_size or --max_new_tokens, or choose --dtype=bfloat16"
    cli.run(main, USAGE, FLAGS, less)
