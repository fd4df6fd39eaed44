"""docs/results.md: the paper's numbers, and beside them those of whoever trained a model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepstack_jax.atomic import write_whole
from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate.benchmarks.registry import TASKS
from deepstack_jax.evaluate.results import flat_scores

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
_EXPECTED = "expected docs/results.md, or a copy of it"
_ROW = re.compile(r"^\| `([\w:-]+)` .*\| ([^|]*) \|$", re.MULTILINE)


def fill_table(file: Path, name: str, tasks: Mapping[str, dict[str, Any]]) -> None:
    """Write the scores of tasks into the last column of the table between BEGIN and END; other rows keep theirs.

    Raises:
      ConfigError: the file is not there or has no such table.
    """
    try:
        text = file.read_text()
    except OSError as error:
        raise ConfigError(f"--into={file} cannot be read: {error.strerror}; {_EXPECTED}") from error
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"--into={file} has no lines {BEGIN} and {END}; {_EXPECTED}")
    known = {found[1]: found[2].strip() for found in _ROW.finditer(old)}
    ours = known | {title: cell_of(title, name, results) for title, results in tasks.items()}
    write_whole(file, f"{before}{BEGIN}\n\n{table_of_paper(ours)}\n\n{END}{after}")


def table_of_paper(ours: Mapping[str, str]) -> str:
    """Every benchmark with the paper's numbers, and ours by the task's name with its protocol."""
    models = list(dict.fromkeys(model for benchmark in TASKS.values() for model in benchmark.paper))
    lines = [f"| task | metric | {' | '.join(models)} | ours |", "|---" * (3 + len(models)) + "|"]
    titles = [title for name in TASKS for title in (name, *sorted(other for other in ours if other.startswith(f"{name}:")))]
    for title in titles:
        benchmark = TASKS[title.partition(":")[0]]
        paper = " | ".join(benchmark.paper.get(model, "-") for model in models)
        metric = benchmark.metric or "its server's or judge's"
        lines.append(f"| `{title}` | {metric} | {paper} | {ours.get(title, '')} |")
    return "\n".join(lines)


def cell_of(title: str, name: str, results: Mapping[str, Any]) -> str:
    """A score in percent, with whose it is, and what it is not of."""
    benchmark = TASKS[title.partition(":")[0]]
    score = flat_scores(dict(results)).get(benchmark.metric)
    if score is None:
        return f"to be scored ({name})"
    part = f", the first {results['rows']:,} rows" if results["rows"] < results["rows_in_all"] else ""
    part += f", {results['bad_examples']:,} left out" if results["bad_examples"] else ""
    return f"{100 * score:.1f} ({name}{part})"
