"""Short answers that are right or wrong: ChartQA's relaxed accuracy, GQA's exact match."""

from collections.abc import Sequence
from string import punctuation

from deepstack_jax.evaluate.scorers.texts import Scorer

TOLERANCE = 0.05
_NO_PUNCTUATION = str.maketrans("", "", punctuation)


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 where a number is within 5% of the reference, any other answer equals it but for case (ChartQA; Methani et al. 2020).

    A number is what Python's `float` reads, a "%" at its end divides it by 100. Where the answer is no number, or the reference
    none or 0, texts are compared. Thousands' commas, currency and units are not removed, and years are numbers too.
    """
    return float(any(_is_close(answer, reference) for reference in references))


def _is_close(answer: str, reference: str) -> bool:
    said, right = _number(answer), _number(reference)
    if said is None or not right:
        return answer.lower() == reference.lower()
    return abs(said - right) / abs(right) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def gqa_exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer equals a reference in lower case, both without ASCII punctuation; blanks inside count (GQA)."""
    return float(any(_plain(answer) == _plain(reference) for reference in references))


def _plain(text: str) -> str:
    # The published one runs in numpy: a text in lower case is cut to the length it had, and NULs at its end do not count.
    return text.lower()[: len(text)].translate(_NO_PUNCTUATION).rstrip("\0")


RELAXED_ACCURACY = Scorer(
    relaxed_accuracy, f"relaxed accuracy: numbers within {TOLERANCE:.0%}, other answers equal but for case"
)
GQA_EXACT_MATCH = Scorer(gqa_exact_match, "share of answers equal to the reference, lower case, ASCII punctuation removed")
