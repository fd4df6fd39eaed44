"""Two evaluations side by side: what each scores, how sure the difference is, and on which questions they differ."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate.results import PREDICTIONS, RESULTS, flat_scores
from deepstack_jax.evaluate.scorers.mmmu import DISCIPLINES
from deepstack_jax.json_lines import read_lines
from deepstack_jax.printing import label, plural

RESAMPLES, SEED, CONFIDENCE = 2000, 0, 0.95
_AT_ONCE = 1 << 22  # numbers of a resample that exist at once
_EXPECTED = "give a folder that `evaluate --out=DIR` wrote"
_NOT_HOW = ("checkpoint", "task")  # of a protocol: two models are to be told apart by it, and a task is compared with itself


@dataclass(frozen=True)
class Interval:
    """A difference, with what it may be by chance of the questions."""

    difference: float  # second minus first
    low: float
    high: float
    worse: int  # questions that the second scores lower on
    better: int

    @property
    def sure(self) -> bool:
        """Whether the sign of the difference is."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Evaluated:
    """One task of one evaluation, as its files have it."""

    folder: Path
    results: Mapping[str, Any]
    predictions: Mapping[tuple[int, int, str], Mapping[str, Any]]  # by row, turn and id


@dataclass(frozen=True)
class Pair:
    """A question that both were asked."""

    first: Mapping[str, Any]
    second: Mapping[str, Any]

    def gain(self, scorer: str) -> float:
        """By how much the second scores higher."""
        return self.second["scores"][scorer] - self.first["scores"][scorer]

    @property
    def differs(self) -> bool:
        """Whether a score or the answer is another."""
        return any(self.first.get(name) != self.second.get(name) for name in ("scores", "parsed", "prediction"))


@dataclass(frozen=True)
class Comparison:
    """A task of two evaluations."""

    title: str  # as --tasks names it; "" of one's own rows
    first: Evaluated
    second: Evaluated
    pairs: Sequence[Pair]
    intervals: Mapping[str, Interval]  # of the numbers that are means over questions, by their names in tables
    warnings: Sequence[str]

    def scores(self) -> Iterator[tuple[str, float, float]]:
        """Every number that both have: its name, the first's, the second's."""
        one, other = flat_scores(dict(self.first.results)), flat_scores(dict(self.second.results))
        yield from ((name, one[name], other[name]) for name in one if name in other)


def compare(first: str, second: str) -> list[Comparison]:
    """What two folders of `--out`, or their results.json, have in common.

    Raises:
      ConfigError: a file is missing or damaged, or they have no task or question in common.
    """
    one, other = open_results(first), open_results(second)
    if len(one) == len(other) == 1 and "" in {*one, *other}:  # one's own rows, whatever they are called
        one, other = ({"": found} for (found,) in (one.values(), other.values()))
    titles = [title for title in one if title in other]
    if not titles:
        raise ConfigError(
            f"{first} has {', '.join(one) or 'no task'} and {second} {', '.join(other) or 'no task'}; expected a task of both: "
            "evaluate both on it"
        )
    alone = sorted({*one, *other} - {*titles})
    found = [_compare(title, one[title], other[title]) for title in titles]
    if alone:
        warning = f"only one of them has {', '.join(alone)}, which is left out"
        found[0] = Comparison(**{**vars(found[0]), "warnings": [warning, *found[0].warnings]})
    return found


def open_results(path: str) -> dict[str, Evaluated]:
    """The tasks of an evaluation; ConfigError as `compare`."""
    folder = Path(path).expanduser()
    folder = folder.parent if folder.is_file() else folder
    results = _read(folder)
    if "tasks" not in results:
        return {"": _evaluated(folder, results)}
    return {title: _evaluated(folder / title.replace(":", "-"), part) for title, part in results["tasks"].items()}


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise ConfigError(
            f"{folder / RESULTS} cannot be read: {reason}; give a folder that `evaluate --out=DIR` wrote"
        ) from error
    if not isinstance(found, dict) or not ("scores" in found or "tasks" in found):
        raise ConfigError(f"{folder / RESULTS} has neither scores nor tasks; give a folder that `evaluate --out=DIR` wrote")
    return found


def _evaluated(folder: Path, results: dict[str, Any]) -> Evaluated:
    try:
        lines = read_lines(folder / PREDICTIONS)
    except OSError as error:
        raise ConfigError(f"{folder / PREDICTIONS} cannot be read: {error.strerror}; it stands beside {RESULTS}") from error
    try:
        return Evaluated(folder, results, {(one["row"], one["turn"], one["id"]): one for one in lines if "scores" in one})
    except KeyError as error:
        raise ConfigError(f"{folder / PREDICTIONS} has lines without {error}; evaluate again with this version") from error


def _compare(title: str, first: Evaluated, second: Evaluated) -> Comparison:
    places = sorted({*first.predictions} & {*second.predictions})
    pairs = [Pair(first.predictions[place], second.predictions[place]) for place in places]
    if not pairs:
        raise ConfigError(f"{title or 'the two files'}: no question is in both; evaluate both on the same rows")
    warnings = [f"another protocol: {difference}" for difference in protocol_differences(first.results, second.results)]
    for name, found in (("first", first), ("second", second)):
        if more := len(found.predictions) - len(pairs):
            warnings.append(f"{plural(more, 'question')} of the {name} alone, which the interval is not of")
    if other := sum(pair.first["question"] != pair.second["question"] for pair in pairs):
        warnings.append(f"{plural(other, 'question')} of the same row and id with other words: are these the same rows?")
    return Comparison(title, first, second, pairs, _intervals(pairs), warnings)


def _intervals(pairs: Sequence[Pair]) -> dict[str, Interval]:
    """By scorer, of all questions and of those of each kind, and of each discipline that subjects of MMMU belong to."""
    shared = [name for name in pairs[0].first["scores"] if all(name in _scores(pair) for pair in pairs)]
    kinds = sorted({pair.first["kind"] for pair in pairs} - {"all"})
    groups = {name: subjects for name, subjects in DISCIPLINES.items() if {*subjects} & {*kinds}}
    groups |= {kind: (kind,) for kind in kinds}
    found = {}
    for name in shared:
        found[name] = paired_bootstrap([pair.gain(name) for pair in pairs])
        for group, members in groups.items():
            found[f"{group}_{name}"] = paired_bootstrap([pair.gain(name) for pair in pairs if pair.first["kind"] in members])
    return found


def _scores(pair: Pair) -> set[str]:
    return {*pair.first["scores"]} & {*pair.second["scores"]}


def protocol_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What of how answers were made and read is not the same, as "name: first | second"; of the data their name too."""
    one, other = (_flat(results.get("protocol", {})) for results in (first, second))
    names = [name for name in dict.fromkeys([*one, *other]) if name not in _NOT_HOW]
    return [
        f"{name}: {label(one.get(name, 'not said'))} | {label(other.get(name, 'not said'))}"
        for name in names
        if one.get(name) != other.get(name)
    ]


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def paired_bootstrap(gains: Sequence[float]) -> Interval:
    """The mean of paired differences with the percentile interval of its bootstrap (Efron 1979), drawn from one seed.

    Every question counts for itself: where many share an image, the true interval is wider.
    """
    values, rng = np.asarray(gains, np.float64), np.random.default_rng(SEED)
    rows = max(1, _AT_ONCE // values.size)
    means = np.concatenate(
        [
            values[rng.integers(0, values.size, (min(rows, RESAMPLES - first), values.size))].mean(axis=1)
            for first in range(0, RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values.mean()), float(low), float(high), int((values < 0).sum()), int((values > 0).sum()))


def names_of(comparison: Comparison) -> tuple[str, str]:
    """What the two models are called, with their folders where that is the same."""
    one, other = (str(side.results["name"]) for side in (comparison.first, comparison.second))
    if one != other:
        return one, other
    return f"{one}, {comparison.first.folder}", f"{other}, {comparison.second.folder}"


def comparison_table(found: Sequence[Comparison]) -> Table:
    """Every number of both, with the interval of the difference."""
    one, other = (label(name, 60) for name in names_of(found[0]))
    table = Table("task", "score", "A", "B", f"B - A\n{CONFIDENCE:.0%} interval", "better\nA : B", caption_justify="left")
    table.caption = f"A: {one}\nB: {other}"
    for column in table.columns[1:]:
        column.no_wrap = True
    for comparison in found:
        for at, (name, first, second) in enumerate(comparison.scores()):
            title = "" if at else comparison.title or str(comparison.first.results.get("data", ""))
            gain, counts, interval = f"{second - first:+.4f}", "", comparison.intervals.get(name)
            if interval is not None:
                gain += f"\n{interval.low:+.3f} to {interval.high:+.3f}"
                counts = f"{interval.worse:,} : {interval.better:,}"
            table.add_row(title, name, f"{first:.4f}", f"{second:.4f}", gain, counts)
    return table
