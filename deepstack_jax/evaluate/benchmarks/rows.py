"""The files of benchmarks as rows: JSON objects, JSON lines, CSV, parquet. Each is None where its file is not there."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.example import SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.styles import Columns, RecordError
from deepstack_jax.data.open import MissingError, open_parquet

MAX_BYTES = 1 << 30  # of a file that is read as a whole: the annotations of VQAv2 have 190 MB
Row = dict[str, Any]


class Rows(Protocol):
    """Records by random access."""

    path: str  # that messages name

    def __len__(self) -> int: ...
    def read(self, index: int, /) -> Any:
        """Record `index`, normally a dict; RecordError where it cannot be read."""
        ...

    def scan(self) -> Iterator[Any]:
        """All records in order without their images; None in place of one that cannot be read."""
        ...

    def place(self, index: int, /) -> str:
        """Where record `index` is, for messages."""
        ...


class ListRows:
    """Rows in memory, of one file or put together from several."""

    def __init__(self, path: str, rows: Sequence[Any]) -> None:
        self.path, self._rows = path, rows
        if not rows:
            raise SourceError(f"{path} holds no questions; fetch it again")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Any:
        """Record `index`."""
        return self._rows[index]

    def scan(self) -> Iterator[Any]:
        """All records in order."""
        return iter(self._rows)

    def place(self, index: int) -> str:
        """The file and the number of the record."""
        return f"{self.path} record {index}"


class Form(NamedTuple):
    """A form in which a benchmark is published."""

    files: str  # what must be in its folder, for people
    open: Callable[
        [str, LimitsConfig], Rows | None
    ]  # the folder, what its tables may take -> rows; None where the file that tells the form is not there


def read_text(path: str) -> str:
    """All of a text file.

    Raises:
      MissingError: it is not there. SourceError: it cannot be read, or is not UTF-8.
    """
    try:
        return files.read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise MissingError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 ({error.reason})"
        raise SourceError(f"cannot read {path}: {why}; fetch it again") from error


def read_json(path: str) -> Any:
    """What a JSON file says; errors as of `read_text`, and a SourceError where it is none."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is no JSON ({error}); fetch it again") from error


def read_list(path: str, key: str = "") -> list[Any]:
    """The list that a JSON file is, or that it has under `key`."""
    value = read_json(path)
    if key:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list):
        where = f"a list under {key!r}" if key else "a list"
        raise SourceError(f"{path} is not {where}; it is another file than it is named after, fetch it again")
    return value


def read_object(path: str) -> dict[str, Any]:
    """The object that a JSON file is."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise SourceError(f"{path} is no JSON object; it is another file than it is named after, fetch it again")
    return value


def read_lines(path: str) -> list[Any]:
    """The values of a file that has one JSON value per line, whatever its name ends in."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path} line {number} is no JSON ({error}); fetch it again") from error
    return found


def read_csv(path: str) -> list[Row]:
    """The rows of a CSV file with a head, by its names."""
    return list(csv.DictReader(io.StringIO(read_text(path), newline="")))


def first_file(folder: str, names: Sequence[str]) -> str | None:
    """The first of the names that is a file in the folder, or None."""
    return next((path for name in names if files.is_file(path := files.under(folder, name))), None)


def place_of(folder: str, *names: str) -> str:
    """The first of the names that is a file in the folder, as a name; if none is, the first, which messages then name."""
    return next((name for name in names if files.is_file(files.under(folder, name))), names[0])


def one_image(key: str, *places: str, kind: type = str) -> Callable[[Row, str], Sequence[object]]:
    """How a row of one image tells it: what a table holds as "image", else the file that the row names under `key`.

    Args:
      places: below the folder, of which the first that is a file counts: "images/{}.jpg" with the name, "{file}" with its last
        part alone.
      kind: of the name.
    """

    def images(row: Row, folder: str) -> Sequence[object]:
        held = row.get("image")
        if held is not None and not isinstance(held, str):
            return [held]
        name = field(row, key, kind)
        file = str(name).rpartition("/")[2]
        return [place_of(folder, *(place.format(name, file=file) for place in places))]

    return images


def parquet(names: Sequence[str], needed: Sequence[str], images: Sequence[str] = ("image",)) -> Form:
    """Parquet files under the first pattern that matches any, with the columns of questions and those of images."""
    wanted = Columns.of((*needed, *images), tuple(needed))

    def find(folder: str, limits: LimitsConfig) -> Rows | None:
        found = (open_parquet(files.under(folder, name), wanted, limits) for name in names)
        return next((rows for rows in found if rows is not None), None)

    return Form(f"{names[0]} (parquet)", find)


def named(rows: Mapping[str, Any], key: str) -> list[Row]:
    """The values of an object by name, each with its name under `key`."""
    return [(row if isinstance(row, dict) else {}) | {key: name} for name, row in rows.items()]


def by_name(files: Sequence[str], key: str, images: str) -> Form:
    """A JSON object, the first that is there, that has every question by its name, which becomes its `key`.

    Args:
      images: the folder of images beside it, for people.
    """

    def find(folder: str, _limits: LimitsConfig) -> Rows | None:
        path = first_file(folder, files)
        return None if path is None else ListRows(path, named(read_object(path), key))

    return Form(f"{files[0]}, {images}/", find)


def joined(questions: Sequence[Any], answers: Sequence[Any], key: str, question_file: str, answer_file: str) -> list[Row]:
    """Every question with the fields of the annotation that has its id; without those where there is none.

    Raises:
      SourceError: an annotation's question is not there, or two annotations are of one question: the files do not belong
        together.
    """
    by_id: dict[Any, Row] = {}
    for number, row in enumerate(answers):
        name = field(row, key, where=f"{answer_file} record {number}")
        if name in by_id:
            raise SourceError(f"{answer_file} answers question {name!r} twice; fetch it again")
        by_id[name] = row
    rows = [by_id.pop(field(one, key, where=f"{question_file} record {at}"), {}) | one for at, one in enumerate(questions)]
    if by_id:
        raise SourceError(
            f"{answer_file} answers {len(by_id)} questions that {question_file} does not hold, e.g. {next(iter(by_id))!r}; "
            "give both files of one split"
        )
    return rows


def field(row: Any, key: str, kind: type | tuple[type, ...] = (str, int), where: str = "") -> Any:
    """What a row has under `key`.

    Raises:
      RecordError: nothing, or another type; a SourceError that names the place where `where` does.
    """
    value = row.get(key) if isinstance(row, Mapping) else None
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
    problem = f"{key} is {value!r:.80}, expected {kinds}; fetch the file again, or remove the record"
    raise SourceError(f"{where}: {problem}") if where else RecordError(problem)


def texts(value: Any) -> tuple[str, ...]:
    """Right answers out of a row: a text, a list of texts, or of objects with an "answer"; nothing where there are none."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    found = [one.get("answer") if isinstance(one, Mapping) else one for one in values]
    return tuple(str(one) for one in found if one is not None and not isinstance(one, dict | list))
