"""Every benchmark by its name: `TASKS` says what there is, `find_task` opens one."""

from dataclasses import replace

from deepstack_jax.data.formats import files
from deepstack_jax.errors import ConfigError, nearest
from deepstack_jax.evaluate.benchmarks.benchmark import Benchmark
from deepstack_jax.evaluate.benchmarks.receipts import RECEIPTS
from deepstack_jax.evaluate.tasks import Task

TASKS: dict[str, Benchmark] = {"receipts": RECEIPTS}


def find_task(name: str, root: str, protocol: str = "own") -> Task:
    """The task of that name over its files below `root`.

    Args:
      root: folder or URL that holds a folder for every benchmark (`Benchmark.folder`).
      protocol: one of `Benchmark.protocols`: "own" is the benchmark's own definition, "deepstack-paper" what the numbers of the
        paper mean, "likelihood" a choice by the likelihood of the letters.

    Raises:
      ConfigError: no such task or protocol; the nearest is named.
      SourceError: its files are not there, damaged, or of another split; the message says where they come from.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r:.80}; {nearest(name, TASKS)}")
    benchmark = TASKS[name]
    if protocol not in benchmark.protocols:
        raise ConfigError(f"task {name} has no protocol {protocol!r:.80}; {nearest(protocol, benchmark.protocols)}")
    task = benchmark.open(files.join(root, benchmark.folder), protocol)
    return replace(task, name=name, protocol=protocol)
