"""Multiple choice by letter: how SEED-Bench and AI2D read the letter of an answer, and when it is right."""

import re
from collections.abc import Sequence

from deepstack_jax.evaluate.scorers.short_answers import gqa_exact_match
from deepstack_jax.evaluate.scorers.texts import Scorer

_LETTER_FIRST = re.compile(r"\s*([A-Z])\.")


def first_letter(answer: str) -> str:
    """The first character of an answer, which is what SEED-Bench takes for its letter: "Answer: B" chooses A, "(B)" none."""
    return answer.strip()[:1]


def ai2d_letter(answer: str) -> str:
    """The letter that an answer begins with and a period ends ("B. leaf" is B), else the stripped answer (AI2D)."""
    found = _LETTER_FIRST.match(answer)
    return found[1] if found else answer.strip()


def same_letter(letter: str, references: Sequence[str]) -> float:
    """1 where it is the right letter, in either case (SEED-Bench)."""
    return float(any(letter.lower() == reference.lower().strip() for reference in references))


def very_letter(letter: str, references: Sequence[str]) -> float:
    """1 where it is the right letter in the same case, as the code that the DeepStack paper's repository carries has it."""
    return float(letter in references)


SEED_ACCURACY = Scorer(same_letter, "share of answers whose first character is the right letter, in either case")
SEED_PAPER_ACCURACY = Scorer(very_letter, "share of answers whose first character is the right letter, case counts")
AI2D_ACCURACY = Scorer(
    gqa_exact_match, 'share of answers that are the right letter or begin with it and a period ("B. leaf"), in either case'
)
AI2D_PAPER_ACCURACY = Scorer(
    gqa_exact_match, 'share of answers that are the right letter alone ("B. leaf" is wrong), in either case'
)
