"""Score a model on held-out rows: `python -m deepstack_jax.evaluate --model=DIR --data=val.json --images=DIR`."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from deepstack_jax import cli
from deepstack_jax.api import DTYPES, load_in_verb
from deepstack_jax.atomic import write_json, write_whole
from deepstack_jax.config import Config, MeshConfig, build_config, from_stored, to_dict
from deepstack_jax.data.example import Source, SourceError
from deepstack_jax.data.fingerprint import describe_files, describe_options
from deepstack_jax.data.formats import files
from deepstack_jax.data.open import MissingError, open_files, open_source
from deepstack_jax.data.overlap import find_overlap, overlap_line
from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate.benchmarks.registry import TASKS, find_task
from deepstack_jax.evaluate.checkpoint import EvalCheckpoint
from deepstack_jax.evaluate.compare import Comparison, compare, comparison_table
from deepstack_jax.evaluate.compare_page import PICTURES, SIDE, render_page
from deepstack_jax.evaluate.on_mesh import MeshAnswerer, over_mesh
from deepstack_jax.evaluate.pictures import pictures_of
from deepstack_jax.evaluate.questions import check_questions
from deepstack_jax.evaluate.results import (
    RESULTS,
    data_name,
    folder_of,
    table_of,
    tasks_table,
    title_of,
)
from deepstack_jax.evaluate.results_table import fill_table
from deepstack_jax.evaluate.runner import (
    MAX_NEW_TOKENS,
    EvaluationRequest,
    checkpoint_digest,
    evaluate_one,
    leave_out,
    open_task,
    titles_of,
)
from deepstack_jax.evaluate.tasks import Task
from deepstack_jax.generate.options import Options
from deepstack_jax.generate.prompts import find_template
from deepstack_jax.parallel.distributed import is_first_host
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.processes import join_processes
from deepstack_jax.printing import REDACTED, Console, plural, redacted
from deepstack_jax.train.checkpoint.init_weights import is_workdir
from deepstack_jax.train.checkpoint.reading import read_workdir_json

USAGE = """
Answer a held-out set by greedy generation, and score the answers.

  python -m deepstack_jax.evaluate --model=runs/receipts
  python -m deepstack_jax.evaluate --model=runs/receipts --data=receipts/val.json --images=receipts --out=scores
  python -m deepstack_jax.evaluate --model=DIR --config=configs/receipts.py --config.data.root=receipts --limit=20

  python -m deepstack_jax.evaluate --model=DIR --tasks=docvqa,seed:likelihood --data=benchmarks --out=scores/DIR
  python -m deepstack_jax.evaluate --compare scores/a scores/b --out=runs/compare

  --model=DIR           Hugging Face folder or hub id (DeepStack, LLaVA-1.5, LLaVA-NeXT), or the workdir of a training run
  --adapter=DIR         LoRA adapters over the model: the workdir of a run that trained some, or a folder of PEFT
  --data=FILE           rows in LLaVA JSON, or any other container that `train` reads; of --tasks the folder of all benchmarks
  --tasks=NAME,...      benchmarks of docs/evaluation.md, with a protocol in place of their own as NAME:PROTOCOL
  --images=DIR          where the image paths in the rows start
  --config=FILE         in place of --data and --images: the validation data of a configuration, its evaluation.max_new_tokens
                        and evaluation.batch_size. With neither, a workdir's own: as many rows as its run evaluates
  --config.KEY=VALUE    overrides a key of that file or of the run, with --data too: --config.data.limits.text_bytes=100000000
  --limit=N             the first N rows
  --compare A B         two folders of --out side by side, an interval for every difference, and in --out compare.html with the
                        questions on which they differ; pictures come from --data or --config, or where the benchmarks were
  --out=DIR             writes predictions.jsonl (every prompt, answer and score) and results.json, of --tasks in a folder each
  --into=FILE           docs/results.md or a copy of it, into whose last column the scores of --tasks are written
  --suffix=TEXT         what follows every question of --tasks, in place of each task's own; --suffix= leaves it out
  --max_new_tokens=64   most tokens of an answer; of --tasks as each says if left out
  --batch_size=8        questions answered at once; the answers do not depend on it
  --template=NAME       conversation template in place of the model's own
  --dtype=NAME          float32 or bfloat16; float32 on a CPU and bfloat16 on accelerators if left out
  --config.mesh.fsdp=N  cuts the parameters over devices, as does mesh.tensor; if left out every device has all of them
  --coordinator_address=HOST:PORT --process_count=N --process_id=I
                        several processes, as of `train`

Every answered turn of a row is a question; the true answers of the turns before it are given. With --out the answers of a run
that was stopped are kept, and the same command goes on from there.

Exit codes: 0 done; 1 a mistake in the input, said in one line; 130 stopped by Ctrl-C.
"""

FLAGS = (
    cli.Flag(flags.DEFINE_string, "model", None, "Model folder, hub id or workdir."),
    cli.Flag(flags.DEFINE_string, "adapter", "", "LoRA adapters over the model."),
    cli.Flag(flags.DEFINE_string, "data", None, "File of held-out rows, or folder of benchmarks."),
    cli.Flag(flags.DEFINE_string, "tasks", "", "Benchmarks, NAME or NAME:PROTOCOL, between commas."),
    cli.Flag(flags.DEFINE_string, "images", "", "Image root."),
    cli.Flag(flags.DEFINE_multi_string, "compare", [], "Two folders of --out, which are compared."),
    cli.Flag(flags.DEFINE_integer, "limit", None, "Most rows.", lower_bound=1),
    cli.Flag(flags.DEFINE_string, "into", "", "docs/results.md, whose last column the scores are written to."),
    cli.Flag(flags.DEFINE_string, "out", None, "Folder for predictions.jsonl and results.json."),
    cli.Flag(flags.DEFINE_string, "suffix", None, "What follows every question of --tasks."),
    cli.Flag(flags.DEFINE_integer, "max_new_tokens", None, "Most tokens of an answer.", lower_bound=1),
    cli.Flag(flags.DEFINE_integer, "batch_size", None, "Questions answered at once.", lower_bound=1),
    cli.Flag(flags.DEFINE_string, "template", None, "Conversation template."),
    cli.Flag(flags.DEFINE_enum, "dtype", None, "float32 or bfloat16.", enum_values=DTYPES),
    *cli.PROCESSES,
    cli.CONFIG_OR_KEYS,
)
BATCH_SIZE = 8  # with --data


def main() -> int:
    given: dict[str, Any] = {flag.name: flag.value for flag in FLAGS}
    if given["compare"]:
        return compare_two(given)
    if not given["model"]:
        raise ConfigError("--model is missing; e.g. --model=DIR with a Hugging Face folder or the workdir of a training run")
    if given["tasks"] and not given["data"]:
        raise ConfigError("--tasks needs --data=ROOT, the folder that holds a folder for every benchmark")
    if given["suffix"] is not None and not given["tasks"]:
        raise ConfigError("--suffix is of --tasks; the questions of one's own rows are asked as the rows have them")
    if given["suffix"] is not None and given["into"]:
        raise ConfigError(
            f"--into={given['into']} holds scores of each task's own protocol, and --suffix asks otherwise; drop one of the two"
        )
    join_processes(*(flag.value for flag in cli.PROCESSES))
    console = Console(quiet=not is_first_host())
    asked = open_tasks(given, console) if given["tasks"] else [open_rows(given, console)]
    for evaluation in asked:
        leave_out(evaluation.bad, [], evaluation, console)
    leaks = look_for_leaks(asked, given["model"], console)
    out = cli.writable_folder(given["out"], "out") if given["out"] else None
    mesh = make_mesh(mesh_of_flags())
    answerer = load_over(mesh, given)
    digest, kept, tasks = checkpoint_digest(answerer), list[EvalCheckpoint](), dict[str, dict[str, Any]]()
    for evaluation, leak in zip(asked, leaks, strict=True):
        evaluation = replace(evaluation, overlap=leak)
        folder = out if out is None or not given["tasks"] else cli.writable_folder(str(out / folder_of(evaluation.task)), "out")
        folder = folder if is_first_host() else None
        results, checkpoint = evaluate_one(answerer, digest, mesh, evaluation, folder, given["model"], console)
        kept.append(checkpoint)
        tasks[title_of(evaluation.task)] = {"name": given["model"]} | results
    if given["tasks"]:
        if out is not None and is_first_host():
            write_json(out / RESULTS, {"name": given["model"], "tasks": tasks})
        if given["into"] and is_first_host():
            fill_table(Path(given["into"]).expanduser(), Path(given["model"]).name, tasks)
        asked_with = "" if given["suffix"] is None else f", every question with --suffix={json.dumps(given['suffix'])}"
        console.print(tasks_table(given["model"] + asked_with, tasks))
    else:
        console.print(table_of(*tasks.values()))
    for checkpoint in kept:  # now that nothing of it is asked again by the same command
        checkpoint.remove()
    return cli.EXIT_DONE


def look_for_leaks(asked: Sequence[EvaluationRequest], model: str, console: Console) -> list[dict[str, int]]:
    """How many rows of each the run of a workdir trained on, also printed; nothing is known of another model's training."""
    nothing: list[dict[str, int]] = [{} for _ in asked]
    if not is_workdir(model) or not is_first_host():
        return nothing
    try:
        train = open_source(with_changes(model, changed=False).data, "train")
    except (SourceError, ConfigError, OSError) as error:
        console.print(f"not compared with what the run trained on: {error}", soft_wrap=True)
        return nothing
    found = []
    for evaluation in asked:
        with console.status(f"looking for them among {plural(len(train), 'training row')}"):
            overlap = find_overlap(evaluation.task.source, evaluation.rows, train)
        if line := overlap_line(overlap, evaluation.rows, len(train)):
            console.print(f"warning: {' '.join(filter(None, (title_of(evaluation.task), line)))}", soft_wrap=True)
        counts = {"rows": len(overlap.rows), "image_rows": len(overlap.image_rows)}
        found.append(counts | {"looked_at": overlap.looked_at, "training_rows": len(train)})
    return found


def mesh_of_flags() -> MeshConfig:
    """All devices along data, but for what the command line says: the mesh of a run, or of a recipe, is that of training."""
    flag = flags.FLAGS["config"]
    changes = {} if flag.value is None else config_flags.get_override_values(flag)
    return MeshConfig(**{key.removeprefix("mesh."): value for key, value in changes.items() if key.startswith("mesh.")})


def compare_two(given: dict[str, Any]) -> int:
    """What --compare asks for: a table, and a page in --out."""
    if len(given["compare"]) != 2:
        raise ConfigError(f"--compare got {plural(len(given['compare']), 'evaluation')}, expected two: --compare A B")
    console, found = Console(), compare(*given["compare"])
    out = cli.writable_folder(given["out"] or "runs/compare", "out")
    pictures = {one.title: pictures_of(source_of(one, given), Config().data, SIDE, PICTURES) for one in found}
    page = render_page(found, pictures)
    write_whole(out / "compare.html", page.encode("utf-8", "replace"))
    for one in found:
        for warning in one.warnings:
            console.print(f"warning: {' '.join(filter(None, (one.title, warning)))}", soft_wrap=True)
    console.print(comparison_table(found))
    console.print(f"written: {out / 'compare.html'} ({len(page) / 1e6:.1f} MB)", soft_wrap=True)
    return cli.EXIT_DONE


def source_of(comparison: Comparison, given: dict[str, Any]) -> Source | None:
    """The rows of a comparison, for their pictures; None where they are not at hand, as --data is not given."""
    if not comparison.title:
        if cli.names_config():
            return open_source(cli.parse_config().data, "validation")
        return open_files(given["data"], given["images"]) if given["data"] else None
    name, _, protocol = comparison.title.partition(":")
    root = files.absolute(given["data"] or comparison.first.results["data"].removesuffix(TASKS[name].folder))
    try:
        return find_task(name, root, protocol or "own").source
    except MissingError as error:
        Console().print(f"without pictures of {name}: {error}; give --data=ROOT", soft_wrap=True)
        return None


def load_over(mesh: Mesh, given: dict[str, Any]) -> MeshAnswerer:
    """The model over a mesh; read into the host's memory where it is to lie on several devices."""
    several = mesh.size > 1 and jax.default_backend() != "cpu"
    with jax.default_device(jax.local_devices(backend="cpu")[0]) if several else nullcontext():
        lmm = load_in_verb(given["model"], given["dtype"], given["adapter"])
    return over_mesh(lmm.answerer, mesh)


def open_rows(given: dict[str, Any], console: Console) -> EvaluationRequest:
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


def open_tasks(given: dict[str, Any], console: Console) -> list[EvaluationRequest]:
    """The benchmarks of --tasks below --data.

    Raises:
      ConfigError: no such task or protocol, or one is named twice. SourceError: files are not there or damaged.
      RequestError: no such template.
    """
    config = with_changes(given["model"] if is_workdir(given["model"]) else None)
    if given["template"] is not None:
        find_template(given["template"])
    found = []
    for title in titles_of(given["tasks"]):
        rows, batch_size = given["limit"] or 0, given["batch_size"] or BATCH_SIZE
        options = Options(template=given["template"])
        how = {"most_rows": rows, "options": options, "batch_size": batch_size, "suffix": given["suffix"]}
        evaluation = open_task(title, files.absolute(given["data"]), config, console, **how)
        most = given["max_new_tokens"] or evaluation.task.max_new_tokens or MAX_NEW_TOKENS
        found.append(replace(evaluation, options=options.replace({"max_new_tokens": most})))
    return found


def with_changes(workdir: str | None, *, changed: bool = True) -> Config:
    """The configuration of a run, or the defaults; `changed`: with the keys that the command line changes."""
    config = Config()
    if workdir is not None:
        config = from_stored(read_workdir_json(Path(workdir).expanduser() / "config.json"))
        if REDACTED in str(config.data):
            raise ConfigError(
                f"{workdir}/config.json holds no credentials; give --config as the run was given it, URLs and all"
            )
    if flags.FLAGS["config"].value is None or not changed:
        return config
    changes = config_flags.get_override_values(flags.FLAGS["config"])
    values = ConfigDict(to_dict(config), convert_dict=True)
    values.update_from_flattened_dict(changes)
    return build_config(values)


def two_at_once(words: list[str]) -> list[str]:
    """A command line with `--compare A B` as two flags of one value."""
    at = next((at for at, word in enumerate(words) if word in ("--compare", "-compare")), len(words))
    flags = [f"--compare={word}" for word in words[at + 1 : at + 3]]
    return [*words[:at], *flags, *words[at + 3 :]]


if __name__ == "__main__":
    sys.argv = two_at_once(sys.argv)
    less = "lower --batch_size or --max_new_tokens, or choose --dtype=bfloat16"
    cli.run(main, USAGE, FLAGS, less)
