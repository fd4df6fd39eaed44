"""Scores of answers against references, by their published definitions; a new one is a function and a row of `SCORERS`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

ANLS_THRESHOLD = 0.5


@dataclass(frozen=True)
class Scorer:
    """A score of one answer, in 0..1; that of a data set is the mean."""

    score: Callable[[str, Sequence[str]], float]  # (answer, references) -> score; the best of the references counts
    protocol: str  # what exactly is computed, shown beside every number: the same name means other things elsewhere


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference after stripping white space at the ends, else 0. Case and punctuation count."""
    return float(any(prediction.strip() == reference.strip() for reference in references))


def anls(prediction: str, references: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity of one answer (Biten et al. 2019), as lmms-eval computes it for DocVQA.

    Both sides are lower-cased and their white space collapsed; the distance to the nearest reference is divided by the length
    of the longer of the two *as they were given*, in upper case, which white space around them and letters such as the sharp s
    make longer. A similarity below the threshold is 0.

    Raises:
      ValueError: no reference.
    """
    if not references:
        raise ValueError("anls got no reference, expected at least one; leave the question out")
    nearest = min(_relative_distance(prediction, reference) for reference in references)
    return 0.0 if 1 - nearest < threshold else 1 - nearest


def _relative_distance(prediction: str, reference: str) -> float:
    longer = max(len(reference.upper()), len(prediction.upper()))
    reference, prediction = (" ".join(text.lower().split()) for text in (reference, prediction))
    return levenshtein(reference, prediction) / longer if longer else 0.0


def levenshtein(first: str, second: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that make one string the other."""
    row = list(range(len(second) + 1))
    for count, letter in enumerate(first, 1):
        above, row = row, [count]
        for at, other in enumerate(second, 1):
            row.append(min(above[at] + 1, row[-1] + 1, above[at - 1] + (letter != other)))
    return row[-1]


SCORERS = {
    "exact_match": Scorer(
        exact_match, "share of answers equal to a reference, white space at the ends left out; case and punctuation count"
    ),
    "anls": Scorer(
        anls, f"mean similarity 1 - edit distance / length, lower case, 0 below {ANLS_THRESHOLD}; not binarised, as DocVQA's"
    ),
}
