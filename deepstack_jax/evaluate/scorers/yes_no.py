"""POPE (Li et al. 2023): answers read as yes or no, and the five numbers of a set of them."""

from collections.abc import Sequence

from deepstack_jax.evaluate.scorers.texts import Scorer, exact_match


def yes_or_no(answer: str) -> str:
    """What an answer says, by POPE's own rule: "no" where its first sentence has the word "No", "no" or "not", else "yes"."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def whole_answer(answer: str) -> str:
    """An answer in lower case; the paper's code counts only those that are "yes" or "no" and nothing else."""
    return answer.lower().strip()


def pope_numbers(said: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 of "yes", and the share of *answers* that are "yes": POPE's own definition.

    A number whose denominator is 0 is 0, where POPE's own script ends in an error.

    Args:
      said: "yes" or "no" each, as `yes_or_no` reads answers.
      right: "yes" or "no" each, in any case.
    """
    return _numbers(said, right) | {"yes_ratio": _share(sum(one == "yes" for one in said), len(said))}


def pope_paper_numbers(said: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """The same as the code that the DeepStack paper's repository carries computes it; `said` as of `whole_answer`.

    An answer that is neither "yes" nor "no" is wrong, but lowers recall nowhere. Its yes-ratio is that of the right answers, so
    that it says nothing of the model.
    """
    return _numbers(said, right) | {"yes_ratio": _share(sum(whole_answer(one) == "yes" for one in right), len(right))}


def _numbers(said: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    pairs = list(zip(said, map(whole_answer, right), strict=True))
    hits, false_alarms, misses = (pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
    precision, recall = _share(hits, hits + false_alarms), _share(hits, hits + misses)
    f1 = _share(2 * precision * recall, precision + recall)
    accuracy = _share(sum(one == other for one, other in pairs), len(pairs))
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1_score": f1}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


POPE_ACCURACY = Scorer(
    exact_match, 'share of right answers; "no" where the first sentence has the word No, no or not, else "yes"'
)
POPE_PAPER_ACCURACY = Scorer(exact_match, 'share of answers that are the right one of "yes" and "no" and nothing else')
