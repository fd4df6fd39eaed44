"""What the registry knows of a benchmark."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from deepstack_jax.evaluate.tasks import Task


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its files, its number, and how a folder of its files becomes a `Task`.

    Attributes:
      title: in a few words, for tables.
      folder: its folder below the root of all benchmarks.
      files: those that must be in the folder, one line per form in which they are published.
      origin: who publishes them under which name.
      metric: the number that tables quote, by the name of its scorer.
      open: (absolute folder, name of a protocol) -> the task.
      protocols: name -> what it stands for; "own" is the benchmark's own definition.
      paper: model of the DeepStack paper -> its number there, as printed.
    """

    title: str
    folder: str
    files: tuple[str, ...]
    origin: str
    metric: str
    open: Callable[[str, str], Task]
    protocols: Mapping[str, str] = field(default_factory=lambda: {"own": "the benchmark's own definition"})
    paper: Mapping[str, str] = field(default_factory=dict)
