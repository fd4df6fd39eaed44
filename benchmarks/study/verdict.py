"""Whether a claim holds, computed from the scores of its rows by one rule for all claims.

Two rows are compared by the differences of their runs of the same seed, which had the same examples, questions and first
weights as far as both have them. Of these differences the mean and its 95% interval (Student's t) are taken:

  above  the interval lies above 0, the mean is LEAST or more: shown. Below 0, the mean -LEAST or less: contradicted.
  near   the interval lies above -NEAR: shown. Below -NEAR: contradicted.

Anything else is not shown, and of fewer than SEEDS seeds nothing is said. Where two rows end alike (both within ALIKE of each
other) and the claim is one of learning too, the steps to 90% decide instead: the interval of the logarithm of their ratio lies
on one side of 0, the mean ratio is FASTER or more, and the mean difference is that from one logged step to the next or more.
A claim holds if all its comparisons are shown, and is contradicted if one is and none is shown; between the two it holds in
part, or is contradicted in part.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from benchmarks.study.results import Run, by_row
from benchmarks.study.table import Claim, Comparison

LEAST = 0.02  # of exact match: a smaller difference is none worth a claim, however sure
NEAR = 0.05  # of exact match: "nearly as good"
ALIKE = 0.02
SEEDS = 3  # that a verdict needs
FASTER = 1.1  # ratio of steps: a smaller one is none worth a claim
SHOWN, NOT_SHOWN, CONTRADICTED, TOO_FEW = "shown", "not shown", "contradicted", "too few runs"
BY_SPEED = "shown by speed"
IN_PART, PART_CONTRADICTED = "shown in part", "contradicted in part"  # of claims alone


@dataclass(frozen=True)
class Judged:
    """A comparison and what the numbers say of it."""

    comparison: Comparison
    verdict: str
    mean: float = math.nan  # of the differences of exact match
    margin: float = math.nan  # half of the interval
    faster: float = math.nan  # how many times the steps of the first the second took to 90%, where that decided
    seeds: int = 0


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95% interval, infinite for a single difference."""
    values = np.asarray(differences, float)
    if len(values) < 2:
        return float(values.mean()), math.inf
    quantile = student.ppf(0.975, len(values) - 1)
    return float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(len(values)))


def judge(comparison: Comparison, runs: Mapping[tuple[str, str, int], Run], study: str) -> Judged:
    """One comparison, over the seeds that both rows have."""
    first, second = ({run.seed: run for run in by_row(runs, study, side.row)} for side in (comparison.first, comparison.second))
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return Judged(comparison, TOO_FEW)
    differences = [first[seed].score(comparison.first.kinds) - second[seed].score(comparison.second.kinds) for seed in seeds]
    mean, margin = interval(differences)
    if len(seeds) < SEEDS:
        return Judged(comparison, TOO_FEW, mean, margin, seeds=len(seeds))
    if comparison.expected == "near":
        verdict = SHOWN if mean - margin > -NEAR else CONTRADICTED if mean + margin < -NEAR else NOT_SHOWN
    elif mean - margin > 0 and mean >= LEAST:
        verdict = SHOWN
    elif mean + margin < 0 and mean <= -LEAST:
        verdict = CONTRADICTED
    else:
        verdict = NOT_SHOWN
    judged = Judged(comparison, verdict, mean, margin, seeds=len(seeds))
    if comparison.speed and verdict == NOT_SHOWN and max(map(abs, differences)) <= ALIKE:
        return _by_speed(judged, [first[seed] for seed in seeds], [second[seed] for seed in seeds])
    return judged


def _by_speed(judged: Judged, first: Sequence[Run], second: Sequence[Run]) -> Judged:
    """Rows that end alike, compared by their steps to 90%."""
    steps = [(one.reached(), other.reached()) for one, other in zip(first, second, strict=True)]
    if any(None in pair for pair in steps):
        return judged
    mean, margin = interval([math.log(theirs / ours) for ours, theirs in steps if ours and theirs])
    logged = first[0].curve[1][0] - first[0].curve[0][0]
    apart = abs(float(np.mean([theirs - ours for ours, theirs in steps if ours and theirs])))
    if abs(mean) < math.log(FASTER) or apart < logged:
        return judged
    verdict = BY_SPEED if mean - margin > 0 else CONTRADICTED if mean + margin < 0 else NOT_SHOWN
    return Judged(judged.comparison, verdict, judged.mean, judged.margin, math.exp(mean), judged.seeds)


def judge_claim(claim: Claim, runs: Mapping[tuple[str, str, int], Run], study: str) -> tuple[str, list[Judged]]:
    """The verdict about a claim, and those about its comparisons."""
    judged = [judge(comparison, runs, study) for comparison in claim.comparisons]
    verdicts = [one.verdict for one in judged]
    shown = any(verdict in (SHOWN, BY_SPEED) for verdict in verdicts)
    if TOO_FEW in verdicts:
        return TOO_FEW, judged
    if CONTRADICTED in verdicts:
        return PART_CONTRADICTED if shown else CONTRADICTED, judged
    if NOT_SHOWN in verdicts:
        return IN_PART if shown else NOT_SHOWN, judged
    return BY_SPEED if BY_SPEED in verdicts else SHOWN, judged
