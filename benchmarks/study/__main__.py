"""Train the injection laboratory's table and write docs/study.md: `python -m benchmarks.study`.

  --only=baseline,start_   rows of these names, or whose names begin so; those on real images begin with lines_ and smollm2_
  --seeds=3                runs of each row, seeds 0, 1, ...; rows of smollm2_ have one
  --size=gpu               the larger size, or slice, the first steps of the small one (default: cpu)
  --jobs=2                 runs at once, each with its share of the cores (default: 1)
  --runs=runs/study        folder of the workdirs
  --list                   the rows, which of their runs are done, and how long the others will take; trains nothing
  --report                 writes docs/study.md (study-gpu.md of --size=gpu) and its figures from the results; trains nothing
  --quick                  the headline rows with a seed of their own, into runs/study/quick: are they as the study's?

Whatever is done is never done again: a finished run is in benchmarks/study/results.jsonl, one that was stopped goes on from its
last checkpoint. Exit codes: 0 done; 1 a run failed, the others are done; 2 wrong arguments.
"""

import argparse
import os
import queue
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.study import report
from benchmarks.study.results import Run, add_run, by_row, committed, read_runs
from benchmarks.study.table import DIGITS, STUDIES, Row, Study
from benchmarks.study.train import Job, RunError, train
from deepstack_jax.printing import Console, plural

QUICK_SEED = 100  # none of the study's: --quick draws other cards
SPREADS, SLACK = 3.0, 0.05  # standard deviations, or share, that a quick run may lie from the study's mean
GUESSED = 400.0  # seconds of a run on one core, before any is done


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    console = Console()
    # Runs are processes of their own: this one only counts what they cost, and leaves a GPU's memory to them.
    jax.config.update("jax_platforms", "cpu")
    if asked.report:
        return report.write(read_runs(asked.results), console, asked.size)
    jobs = [
        Job(study_of(row), asked.size, row, seed)
        for seed in ([QUICK_SEED] if asked.quick else range(asked.seeds))  # all rows once before any twice
        for row in chosen(asked.only, asked.quick)
        if asked.quick or seed < study_of(row).runs
    ]
    for name, missing in {job.study.name: job.missing for job in jobs}.items():
        if missing:
            jobs = [job for job in jobs if job.study.name != name]
            console.print(f"left out: rows of {name}, for {missing}", soft_wrap=True)
    known = read_runs(asked.results)
    waiting = [job for job in jobs if not job.is_of(known.get(job.key))]
    console.print(listed(jobs, known, asked.jobs) if asked.list else estimate(waiting, known, asked.jobs), soft_wrap=True)
    if asked.list:
        return 0
    failed = train_all(waiting, asked.runs / asked.size, asked.results, asked.jobs, console)
    runs = read_runs(asked.results)
    if asked.quick:
        console.print(compared(jobs, runs, report.current(read_runs(committed(asked.size)), asked.size)))
    elif asked.results == committed(asked.size):
        report.write(runs, console, asked.size)
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    usage, *_ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=usage)
    parser.add_argument("--only", default="", help="names of rows, or their beginnings, between commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: %(default)s)")
    parser.add_argument("--size", choices=("cpu", "slice", "gpu"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the workdirs (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="file of the results (default: the study's own; with --size=gpu another)")
    for flag in ("list", "report", "quick"):
        parser.add_argument(f"--{flag}", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.seeds < 1 or asked.jobs < 1:
        parser.error("--seeds and --jobs are at least 1")
    if asked.report and asked.size not in report.PAGES:
        parser.error(f"--report: --size is one of {', '.join(report.PAGES)}; there is no page of a {asked.size}")
    asked.runs = asked.runs.resolve() / ("quick" if asked.quick else "")  # runs are started from the repository's root
    if asked.results is None:  # of a part, beside its runs; of the whole, where it is committed
        part = asked.quick or asked.size not in report.PAGES
        asked.results = asked.runs / asked.size / "results.jsonl" if part else committed(asked.size)
    try:
        chosen(asked.only, asked.quick)
    except ValueError as error:
        parser.error(str(error))
    return asked


def chosen(only: str, quick: bool) -> list[Row]:
    """Rows by their names or beginnings.

    Raises:
      ValueError: a name that no row has.
    """
    rows = [row for study in STUDIES.values() for row in study.rows.values() if row.quick or not quick]
    names = [name for name in only.split(",") if name]
    if unknown := [name for name in names if not any(row.name.startswith(name) for row in rows)]:
        raise ValueError(f"--only: no row is named, or begins with, {', '.join(unknown)}; --list shows them all")
    return [row for row in rows if not names or row.name in names or any(row.name.startswith(name) for name in names)]


def study_of(row: Row) -> Study:
    """The study that a row is of."""
    return next(study for study in STUDIES.values() if row.name in study.rows)


def seconds_of(job: Job, known: dict[tuple[str, str, int], Run], at_once: int) -> float:
    """How long a run takes: as others of its row did, else as all did."""
    rows = by_row(known, job.study.name, job.row.name) or [run for run in known.values() if run.study == job.study.name]
    each = max(1, (os.cpu_count() or 1) // at_once)
    return float(np.median([run.seconds for run in rows])) if rows else GUESSED / each


def estimate(waiting: Sequence[Job], known: dict[tuple[str, str, int], Run], at_once: int) -> str:
    hours = sum(seconds_of(job, known, at_once) for job in waiting) / at_once / 3600
    like = "as those before took" if known else "a guess"
    return f"{plural(len(waiting), 'run')} to do, {at_once} at once: about {hours:.1f} hours, {like}"


def listed(jobs: Sequence[Job], known: dict[tuple[str, str, int], Run], at_once: int) -> Table:
    """Rows, and what of each is done."""
    waiting = [job for job in jobs if not job.is_of(known.get(job.key))]
    table = Table("row", "what it is", "done", "seconds a run", box=SIMPLE_HEAD, caption=estimate(waiting, known, at_once))
    for name in dict.fromkeys(job.row.name for job in jobs):
        mine = [job for job in jobs if job.row.name == name]
        done = sum(job.is_of(known.get(job.key)) for job in mine)
        table.add_row(name, mine[0].row.label, f"{done}/{len(mine)}", f"{seconds_of(mine[0], known, at_once):.0f}")
    return table


def train_all(jobs: Iterable[Job], folder: Path, results: Path, at_once: int, console: Console) -> int:
    """Train what is left, each with its own cores; returns how many failed, which stops no other."""
    shares: queue.Queue[list[int]] = queue.Queue()
    for cores in shares_of(at_once):
        shares.put(cores)
    failed: list[str] = []
    saving = threading.Lock()

    def one(job: Job) -> None:
        cores = shares.get()
        try:
            if cores:
                os.sched_setaffinity(0, cores)  # of this thread, and so of the process that it starts
            run = train(job, folder, at_once)
            with saving:
                results.parent.mkdir(parents=True, exist_ok=True)
                add_run(run, results)
        except Exception as error:  # whatever it is, the other runs go on
            failed.append(job.name)
            said = str(error) if isinstance(error, RunError) else f"{job.name}: {error!r}"
            console.print(f"failed: {said}", soft_wrap=True)
        else:
            console.print(f"{job.name}: {scores_in_words(run)}, {run.seconds:.0f} s", soft_wrap=True)
        finally:
            shares.put(cores)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, jobs))
    return len(failed)


def shares_of(at_once: int) -> list[list[int]]:
    """The cores of this machine in equal parts; none for a single run, which takes what there is."""
    if at_once == 1 or not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(at_once)]
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // at_once)
    return [cores[number * each % len(cores) :][:each] for number in range(at_once)]


def scores_in_words(run: Run) -> str:
    return ", ".join(f"{kind} {score:.1%}" for kind, score in run.scores.items())


def compared(jobs: Sequence[Job], runs: report.Runs, study: report.Runs) -> Table:
    """Quick runs beside the study's mean and spread."""
    table = Table("row", "digits", "the study's", "within its spread", box=SIMPLE_HEAD)
    for job in jobs:
        run, others = runs.get(job.key), by_row(study, job.study.name, job.row.name)
        if run is None or not others:
            table.add_row(job.row.label, "-" if run is None else f"{run.score(DIGITS):.1%}", "-", "no runs to compare")
            continue
        scores = [one.score(DIGITS) for one in others]
        mean, spread = float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
        inside = abs(run.score(DIGITS) - mean) <= max(SPREADS * spread, SLACK)
        table.add_row(job.row.label, f"{run.score(DIGITS):.1%}", f"{mean:.1%} ± {spread:.1%}", "yes" if inside else "no")
    return table


if __name__ == "__main__":
    sys.exit(main())
