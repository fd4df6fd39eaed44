"""The benchmarks that a training run asks now and then and at its end (`evaluation.tasks`)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepstack_jax.config import Config
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.data.example import Source, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.overlap import find_overlap, overlap_line
from deepstack_jax.errors import ConfigError, nearest
from deepstack_jax.evaluate.on_mesh import MeshAnswerer, make_decode, make_likelihood
from deepstack_jax.evaluate.results import flat_scores, folder_of, tasks_table, title_of
from deepstack_jax.evaluate.runner import (
    MAX_NEW_TOKENS,
    EvaluationRequest,
    checkpoint_digest,
    evaluate_one,
    leave_out,
    open_task,
    titles_of,
)
from deepstack_jax.generate.options import Options
from deepstack_jax.generate.text import ends_beside
from deepstack_jax.parallel.distributed import is_first_host
from deepstack_jax.printing import Console
from deepstack_jax.train.core.program import Program
from deepstack_jax.types import PyTree

FOLDER = "tasks"  # in the workdir, with a folder for each


class TrainingTasks:
    """The tasks of `evaluation.tasks`, opened before anything is compiled; with none of them nothing happens.

    Raises:
      ConfigError: no such task, or `evaluation.best` names none of them or no score of one.
      SourceError: files are missing or damaged, or too many rows cannot be asked.
    """

    def __init__(self, config: Config, workdir: Path, console: Console) -> None:
        self._config, self._workdir, self._console = config, workdir, console
        self._asked: list[EvaluationRequest] = []

    def open(self, train: Source, *, starts: bool) -> None:
        """Look through their rows, and for those that are trained on; what is wrong there ends a start alone."""
        settings = self._config.evaluation
        root = files.absolute(settings.tasks_root or self._config.data.root)
        for title in titles_of(settings.tasks):
            how = {"most_rows": 0, "options": Options(), "batch_size": settings.batch_size}
            one = open_task(title, root, self._config, self._console, **how)
            most = one.task.max_new_tokens or MAX_NEW_TOKENS
            self._asked.append(replace(one, options=Options(max_new_tokens=most)))
            if starts:
                leave_out(one.bad, [], one, self._console)
                if is_first_host():
                    found = find_overlap(one.task.source, one.rows, train)
                    if line := overlap_line(found, one.rows, len(train)):
                        self._console.print(f"warning: {title}: {line}", soft_wrap=True)
        self._check_best({title_of(one.task): one for one in self._asked})

    def _check_best(self, asked: Mapping[str, EvaluationRequest]) -> None:
        if not (best := self._config.evaluation.best):
            return
        title, _, score = best.partition("/")
        known = {**asked[title].task.scorers} if title in asked else {}
        if title not in asked or (known and score not in known):
            valid = [f"{name}/{scorer}" for name, one in asked.items() for scorer in one.task.scorers]
            raise ConfigError(f"config.evaluation.best={best!r:.80} is no score of the tasks; {nearest(best, valid)}")

    def begin(self, program: Program) -> None:
        """Take what answers are made with."""
        self._mesh, self._model = program.mesh, program.model
        self._how = {
            "decode": make_decode(program.model, program.mesh),
            "likelihood": make_likelihood(program.model, program.mesh),
        }

    def report(self, params: PyTree, step: int) -> dict[str, float]:
        """The scores on the first `evaluation.task_rows` rows of each, as "TASK/SCORE", also printed, in one line."""
        most = self._config.evaluation.task_rows
        few = [replace(one, rows=min(one.rows, most or one.rows)) for one in self._asked]
        few = [replace(one, bad=tuple(bad for bad in one.bad if bad.index < one.rows)) for one in few]
        tasks = self._ask(params, few, None)
        scores = [(f"{title}/{name}", entry["score"]) for title, one in tasks.items() for name, entry in one["scores"].items()]
        if scores:
            means = [f"{name} {score:.4f}" for name, score in scores]
            self._console.print(f"step {step}: {', '.join(means)}", soft_wrap=True)
        return scores_of(tasks)

    def finish(self, params: PyTree) -> dict[str, dict[str, Any]]:
        """All of each, with its files in WORKDIR/tasks; what results.json holds of them, by task."""
        tasks = self._ask(params, self._asked, self._workdir / FOLDER)
        if self._asked:
            self._console.print(tasks_table(self._config.name, tasks))
        return tasks

    def _ask(self, params: PyTree, asked: list[EvaluationRequest], out: Path | None) -> dict[str, dict[str, Any]]:
        if not asked:
            return {}
        config, tokenizer = self._config, load_tokenizer(self._config.data.tokenizer)
        about = (config, tokenizer, config.data.template, ends_beside(tokenizer))
        answerer = MeshAnswerer(self._model, params, *about, **self._how)
        digest = "" if out is None else checkpoint_digest(answerer)
        tasks, kept = dict[str, dict[str, Any]](), []
        for one in asked:
            folder = out / folder_of(one.task) if out is not None and is_first_host() else None
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            try:
                results, checkpoint = evaluate_one(answerer, digest, self._mesh, one, folder, config.name, self._console)
            except SourceError as error:  # by now no reason to end a run
                self._console.print(f"warning: no scores of {title_of(one.task)}: {error}", soft_wrap=True)
                continue
            tasks[title_of(one.task)] = results
            kept.append(checkpoint)
        for checkpoint in kept:
            checkpoint.remove()
        return tasks


def scores_of(tasks: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """{"docvqa/anls": ...}."""
    return {f"{title}/{name}": value for title, results in tasks.items() for name, value in flat_scores(results).items()}
