"""A benchmark of the field: the forms of its files, its prompts and its scores, and how a folder of files becomes a task."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple, SupportsIndex

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.encode.templates import AnyTemplate
from deepstack_jax.data.example import IMAGE_MARK, Example, ExampleError, Message, RecordMetadata, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.styles import RecordError, image_value
from deepstack_jax.data.formats.tables import ParquetRecords
from deepstack_jax.data.open import MissingError
from deepstack_jax.evaluate.benchmarks.rows import Form, Row, Rows
from deepstack_jax.evaluate.questions import Question
from deepstack_jax.evaluate.scorers.texts import Scorer
from deepstack_jax.evaluate.tasks import Prediction, Task, mean_by_kind, stripped
from deepstack_jax.generate.prompts import Turn, place_images
from deepstack_jax.printing import quote


class Item(NamedTuple):
    """A question of a benchmark, without its images."""

    id: str
    question: str  # as the file has it
    answers: tuple[str, ...]  # none where they are hidden
    options: tuple[str, ...] = ()
    kind: str = "all"
    split: str = ""  # that the row says it is of; "" where it says nothing
    details: Mapping[str, Any] = {}  # see `Question`


@dataclass(frozen=True)
class Protocol:
    """How a benchmark's questions are put and its answers scored."""

    words: str  # what its numbers mean
    scorers: Mapping[str, Scorer]
    max_new_tokens: int
    suffix: str = ""  # how to answer, behind the question
    open_suffix: str | None = None  # in its place, behind a question without options
    body: Callable[[Item], str] = lambda item: item.question  # no image in front; "<image>" where they are inside
    parse: Callable[[Question, str], Any] = stripped
    aggregate: Callable[[Sequence[Prediction]], dict[str, dict[str, Any]]] = mean_by_kind
    by_likelihood: bool = False
    images: Callable[[Row, str], Sequence[Any]] | None = None  # in place of the benchmark's own, see `Benchmark`

    def prompt(self, item: Item) -> str:
        """A question as it is put, but for images in front of it."""
        return self.body(item) + (self.suffix if item.options or self.open_suffix is None else self.open_suffix)

    def likelihood(self) -> "Protocol":
        """The same, answered by the likeliest letter."""
        _, and_more, shown = self.words.partition("; ")
        words = f"a choice by the likelihood of the letters, nothing is generated{and_more}{shown}"
        return replace(self, words=words, by_likelihood=True)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, as the registry has it.

    Attributes:
      title: in a few words, for tables.
      folder: its folder below the root of all benchmarks.
      origin: who publishes its files under which names.
      metric: the number that tables quote, by the name of its scorer; "" where a judge or a server gives it.
      forms: the forms of its files; the first that is there is read.
      item: (row, its number) -> the question, from the columns without images. RecordError where it is none.
      images: (row, folder) -> its images: paths under the folder, bytes, or a table's {"bytes", "path"}.
      protocols: "own" is the benchmark's own definition, "deepstack-paper" what the paper's numbers mean.
      split: what the rows must say they are of, where they say anything.
      hidden: its answers are not published, only its server scores.
      keep: which rows are its own, of a file that holds more.
      submission: as in `Task`.
      paper: model of the DeepStack paper -> its number there, as printed.
    """

    title: str
    folder: str
    origin: str
    metric: str
    forms: Sequence[Form]
    item: Callable[[Row, int], Item]
    images: Callable[[Row, str], Sequence[Any]]
    protocols: Mapping[str, Protocol]
    split: str = ""
    hidden: bool = False
    keep: Callable[[Item], bool] = lambda _item: True
    submission: Callable[[Sequence[Prediction]], dict[str, str]] | None = None
    paper: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        """What must be in its folder, per form."""
        return tuple(form.files for form in self.forms)

    def open(self, folder: str, protocol: str, limits: LimitsConfig, suffix: str | None = None) -> Task:
        """The task over the files of a folder; `suffix` in place of the protocol's own.

        Raises:
          MissingError: they are not there. SourceError: they are damaged, of another split, or hold a question twice.
        """
        try:
            rows = next((rows for form in self.forms if (rows := form.open(folder, limits)) is not None), None)
        except MissingError as error:
            raise MissingError(f"{error}; {self.origin}") from error
        if rows is None:
            raise MissingError(f"{folder} holds neither {' nor '.join(self.files)}; {self.origin}")
        chosen = self.protocols[protocol]
        if suffix is not None:
            chosen = replace(chosen, suffix=suffix, open_suffix=None)
        return Task(
            BenchmarkSource(rows, self, folder, chosen.images or self.images),
            Ask(chosen.prompt),
            {} if self.hidden else chosen.scorers,
            chosen.aggregate,
            suffix=chosen.suffix,
            open_suffix=chosen.open_suffix,
            parse=chosen.parse,
            by_likelihood=chosen.by_likelihood,
            max_new_tokens=chosen.max_new_tokens,
            submission=self.submission,
        )


@dataclass(frozen=True)
class Ask:
    """Puts a row of a benchmark as one question: `Task.questions`."""

    prompt: Callable[[Item], str]

    def __call__(self, example: Example, images: Sequence[Any], template: AnyTemplate) -> list[Question]:
        """The question of the row, images in front unless its prompt places them.

        Raises:
          RequestError: the prompt places another number of images than there are.
        """
        item: Item = example.info["item"]
        turn = Turn("human", place_images(self.prompt(item), len(images), template), images)
        asked = Question(example.index, item.id, 0, item.kind, (turn,), item.answers)
        return [replace(asked, options=item.options, details=item.details)]


class BenchmarkSource:
    """The rows of a benchmark as examples, by random access.

    Raises:
      SourceError: a question stands twice, rows are of another split, or none has an answer where answers are published.
    """

    def __init__(self, rows: Rows, benchmark: Benchmark, folder: str, images: Callable[[Row, str], Sequence[Any]]) -> None:
        self.rows, self.folder, self._benchmark, self._images = rows, folder, benchmark, images
        self._numbers = self._look_through()  # of the rows that are the benchmark's

    def _look_through(self) -> list[int]:
        path, seen, numbers, answered = self.rows.path, dict[str, int](), list[int](), 0
        for number, row in enumerate(self.rows.scan()):
            try:
                item = self._benchmark.item(row, number)
            except RecordError:
                numbers.append(number)  # counted when it is asked
                continue
            if item.split and str(item.split) != self._benchmark.split:
                raise SourceError(
                    f"{self.rows.place(number)} is of the split {quote(str(item.split))}, expected {self._benchmark.split!r}; "
                    f"{self._benchmark.origin}"
                )
            if (before := seen.setdefault(item.id, number)) != number:
                raise SourceError(
                    f"{path} holds the question {quote(item.id)} twice, as records {before} and {number}; remove one"
                )
            if self._benchmark.keep(item):
                numbers.append(number)
                answered += bool(item.answers)
        if not numbers:
            raise SourceError(f"{path} holds no question of this task; {self._benchmark.origin}")
        if not answered and not self._benchmark.hidden:
            raise SourceError(f"{path} holds no answers, expected those of every question; {self._benchmark.origin}")
        return numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return f"{self._benchmark.folder}({self.rows.path.rstrip('/').split('/')[-1]!r}, questions={len(self)})"

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Question `index`; ExampleError where its row cannot be used."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} is outside 0..{len(self) - 1} of {self.rows.path}")
        number, name = self._numbers[index], f"record {index}"
        try:
            row = self.rows.read(number)
            item = self._benchmark.item(row, number)
            name = item.id
            if not item.answers and not self._benchmark.hidden:
                raise RecordError("has no right answer; fetch the file again, or remove the record")
            given = self._images(row, self.folder)
            images = tuple(image_value(one, self.folder) if isinstance(one, str | bytes | dict) else one for one in given)
        except RecordError as error:
            raise ExampleError(f"{self.rows.place(number)} (id {quote(name)}): {error}", name) from error.__cause__
        except OSError as error:
            raise SourceError(
                f"cannot read {self.rows.path} any more: {error.strerror}; put it back and start again"
            ) from error
        words = f"{IMAGE_MARK}\n" * len(images) + item.question.replace(IMAGE_MARK, "")
        messages = (Message("human", words), Message("gpt", item.answers[0] if item.answers else ""))
        return Example(index, item.id, images, messages, {"item": item, "kinds": [item.kind]})

    def group(self, index: int) -> int:
        """The row group of a question in parquet, which is decoded as a whole; 0 of all others."""
        return self.rows.group(self._numbers[index]) if isinstance(self.rows, ParquetRecords) else 0

    def metadata(self) -> Iterator[RecordMetadata]:
        """Of every question in order; which images those in tables are, only reading them tells."""
        for index, number in enumerate(self._numbers):
            try:
                row = self.rows.read(number)
                item = self._benchmark.item(row, number)
                given = self._images(row, self.folder)
                yield RecordMetadata(item.id, tuple(one for one in given if isinstance(one, str)), "")
            except RecordError:
                yield RecordMetadata(f"record {index}", (), "")

    def missing_images(self, rows: int) -> list[str]:
        """Image files that the first `rows` questions name and that do not exist, each once, in order."""
        outlines = islice(self.metadata(), rows)
        return files.missing(dict.fromkeys(files.under(self.folder, name) for one in outlines for name in one.images))
