"""MMMU (Yue et al. 2024): how letters and open answers are read out of a reply, and when they are right."""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from string import ascii_uppercase

from deepstack_jax.evaluate.scorers.texts import Scorer

_ENDS = ",.!?;:'"
_KEY_WORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NOTHING = (*_ENDS, "")
# Discipline -> its subjects, as MMMU groups them
DISCIPLINES = {
    "Art_and_Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health_and_Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health"),
    ),
    "Humanities_and_Social_Science": ("History", "Literature", "Psychology", "Sociology"),
    "Tech_and_Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power"),
        *("Materials", "Mechanical_Engineering"),
    ),
}
_LONG = 5  # words; a longer reply is searched for the words of an option
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,000
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu_letter(reply: str, options: Sequence[str], draw: random.Random) -> str:
    """The letter that a reply chooses.

    Looked for are "(B)", else "B ", else "B.", else, in a reply of more than five words, the words of an option; of several
    found the last one counts. "B " is also the end of a word in capitals.

    Args:
      options: in the order of their letters.
      draw: the letter of a reply that names none is drawn, as MMMU's own code does, which sets no seed.
    """
    letters = ascii_uppercase[: len(options)]
    for mark in _ENDS:
        reply = reply.strip(mark)
    reply = f" {reply} "
    for pattern, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in letters if pattern.format(letter) in reply]:
            return max(found, key=lambda letter: reply.rfind(place.format(letter)))
    if len(reply.split()) > _LONG:
        words, lower = {letter: option.lower() for letter, option in zip(letters, options, strict=True)}, reply.lower()
        if found := [letter for letter in letters if words[letter] in lower]:
            return max(found, key=lambda letter: lower.rfind(words[letter]))
    return draw.choice(letters)


def find_numbers(text: str) -> list[str]:
    """Numbers in a text: all with thousands' commas, then all with an exponent, then the plain ones."""
    return [number for pattern in _NUMBERS for number in pattern.findall(text)]


def open_answers(reply: str) -> list[str | float]:
    """Everything in a reply to an open question that may be its answer, sorted: texts in lower case, numbers with two decimals.

    Of every line it is what follows the last "is ", "so ", "answer " and the like (of the last line also "="), the shortest of
    these, or else the whole reply; and all numbers in it.
    """
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    tails = [_tail(line, _KEY_WORDS if number < len(lines) - 1 else (*_KEY_WORDS, "=")) for number, line in enumerate(lines)]
    tails = [tail for tail in tails if tail not in _NOTHING] or [reply]
    texts = [*tails, *(number for tail in tails for number in find_numbers(tail))]
    return sorted({one for text in texts for one in normalise(text)}, key=lambda one: (isinstance(one, str), str(one)))


def _tail(line: str, words: Sequence[str]) -> str:
    """The shortest text after one of the words; an empty one gives way to the next, as in MMMU's own code."""
    shortest = ""
    for word in words:
        if word in line:
            tail = line.rpartition(word)[2].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def normalise(text: str) -> list[str | float]:
    """A text as MMMU compares it: a number rounded to two decimals; else in lower case, a single letter with a blank."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def mmmu_accuracy(parsed: str | Sequence[str | float], references: Sequence[str]) -> float:
    """1 where a letter is the right one, or an answer read from an open reply is: an equal number, a text that holds it.

    Both the benchmark's own definition and what the DeepStack paper's numbers mean. (A later release of lmms-eval hands on only
    the first open answer, as a text, and gives every open question 0.)

    Args:
      parsed: a letter (`mmmu_letter`), or answers (`open_answers`).
    """
    if isinstance(parsed, str):
        return float(parsed in references)
    right = [one for reference in references for one in normalise(reference)]
    texts = [one for one in right if isinstance(one, str)]
    return float(any(any(text in one for text in texts) if isinstance(one, str) else one in right for one in parsed))


def subject_of(question: str) -> str:
    """ "Art_Theory" of the question id "validation_Art_Theory_7"."""
    return "_".join(question.split("_")[1:-1])


def mmmu_numbers(ids: Sequence[str], scores: Sequence[float], digits: int = 5) -> tuple[float, dict[str, float]]:
    """Accuracy over all questions, and of every subject, rounded; the paper's code rounds to 3 digits."""
    subjects: dict[str, list[float]] = defaultdict(list)
    for question, score in zip(ids, scores, strict=True):
        subjects[subject_of(question)].append(score)
    means = {subject: sum(found) / len(found) for subject, found in sorted(subjects.items())}
    total = sum(means[subject] * len(found) for subject, found in subjects.items()) / max(1, len(scores))
    return round(total, digits), {subject: round(one, digits) for subject, one in means.items()}


def mmmu_disciplines(ids: Sequence[str], scores: Sequence[float], digits: int = 5) -> dict[str, float]:
    """Accuracy over the questions of every discipline, rounded; a subject that MMMU does not list is of none."""
    discipline = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}
    found: dict[str, list[float]] = defaultdict(list)
    for question, score in zip(ids, scores, strict=True):
        if (name := discipline.get(subject_of(question))) is not None:
            found[name].append(score)
    return {name: round(sum(found[name]) / len(found[name]), digits) for name in DISCIPLINES if name in found}


MMMU_ACCURACY = Scorer(
    mmmu_accuracy,
    "share of right letters, drawn with a fixed seed where none is named, and of open replies that hold the answer",
)
