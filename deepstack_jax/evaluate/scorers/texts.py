"""What a scorer is, and those that compare an answer with its references letter by letter or word by word."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ANLS_THRESHOLD = 0.5


@dataclass(frozen=True)
class Scorer:
    """A score of one answer, in 0..1; that of a data set is the mean unless its task says otherwise."""

    score: Callable[[Any, Sequence[str]], float]  # (answer as its task parses it, references) -> score
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


def binarised_anls(prediction: str, references: Sequence[str]) -> float:
    """1 where `anls` with any reference reaches its threshold, else 0.

    What the code that the DeepStack paper's repository carries gives questions of DocVQA and InfoVQA, and calls ANLS: a share
    of questions, larger than ANLS.
    """
    return float(any(anls(prediction, [reference]) for reference in references))


def mp_docvqa_anls(prediction: str, references: Sequence[str]) -> float:
    """ANLS as the evaluation of MP-DocVQA (Tito et al. 2023) computes it.

    Both sides in lower case and without white space around them, lengths as they are then. A similarity below 0.5, an empty
    answer and the answer "none" are 0, the latter two even where they are right.
    """
    said = prediction.lower().strip()
    if said in ("", "none"):
        return 0.0
    wanted = [reference.lower().strip() for reference in references]
    best = max(1 - levenshtein(one, said) / max(len(one), len(said)) for one in wanted)
    return best if best >= ANLS_THRESHOLD else 0.0


def mp_docvqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer equals a reference but for case and white space around it; the answer "none" is wrong (MP-DocVQA)."""
    said = prediction.lower().strip()
    return float(said != "none" and said in [reference.lower().strip() for reference in references])


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


def word_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the words that an answer shares with its best reference, each as often as it is in both.

    Words are what white space separates, in lower case. Of two texts without words F1 is 1, of one 0.
    """
    return max(_f1(prediction.lower().split(), reference.lower().split()) for reference in references)


def _f1(words: list[str], others: list[str]) -> float:
    shared = sum((Counter(words) & Counter(others)).values())
    return 2 * shared / (len(words) + len(others)) if words or others else 1.0


EXACT_MATCH = Scorer(
    exact_match, "share of answers equal to a reference, white space at the ends left out; case and punctuation count"
)
ANLS = Scorer(
    anls, f"mean similarity 1 - edit distance / length, lower case, 0 below {ANLS_THRESHOLD}; not binarised, as DocVQA's"
)
WORD_F1 = Scorer(word_f1, "mean F1 of the words shared with the best reference, lower case")
BINARISED_ANLS = Scorer(binarised_anls, f"share of questions with ANLS >= {ANLS_THRESHOLD}, which the paper's code calls ANLS")
MP_DOCVQA_ANLS = Scorer(mp_docvqa_anls, f"mean ANLS, lower case, 0 below {ANLS_THRESHOLD} and for empty answers, MP-DocVQA's")
MP_DOCVQA_ACCURACY = Scorer(mp_docvqa_accuracy, "share of answers equal to a reference, lower case")
