"""VQA accuracy (Antol et al. 2015): how an answer is normalised, and how it is compared with those of ten annotators."""

import re
from collections.abc import Sequence
from statistics import mean

from deepstack_jax.evaluate.scorers.texts import Scorer

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
# The published pattern means to spare a period after a digit, and by a slip spares none but those before one.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # that are removed: the published call passes a flag as the count
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
# Words whose spellings with one apostrophe too few are mended. "she's", "let's" and words with a capital stand in the
# published table too, where nothing reaches them.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
you'd've you'll you're you've
"""


def _spellings() -> dict[str, str]:
    found = {"somebody'd": "somebodyd"}  # as it stands in the published table
    for word in _CONTRACTIONS.split():
        found |= {word[:at] + word[at + 1 :]: word for at, letter in enumerate(word) if letter == "'"}
    return found


_MENDED = _spellings()


def split_possessives(text: str) -> str:
    """The first step: lower case, no comma, no question mark, "'s" apart from its word."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def replace_marks(text: str) -> str:
    """Punctuation removed where it stands beside a blank, or all of it where a number holds a comma; else made a blank."""
    found = text
    commas = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _MARKS:
        loose = commas or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if loose else " ")
    return _PERIOD.sub("", found, count=_MOST_PERIODS)


def replace_words(text: str) -> str:
    """Numbers up to ten as digits, no articles, contractions with their apostrophe, one blank between words."""
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_answer(text: str) -> str:
    """An answer as TextVQA, OK-VQA and the EvalAI server normalise it before they compare."""
    return replace_words(replace_marks(_one_line(split_possessives(text))))


def vqav2_answer(text: str) -> str:
    """An answer as the VQAv2 evaluation normalises it: commas and "'s" stay for the punctuation step."""
    return replace_words(replace_marks(_one_line(text)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The mean over annotators of min(1, how many of the others gave this answer / 3): TextVQA, OK-VQA.

    Args:
      answer: as `vqa_answer` made it; the references are normalised here.

    Raises:
      ValueError: no reference.
    """
    return _leave_one_out(answer, [vqa_answer(reference) for reference in references])


def vqav2_accuracy(answer: str, references: Sequence[str]) -> float:
    """The same for VQAv2; `answer` as `vqav2_answer` made it."""
    return _leave_one_out(answer, [vqav2_answer(reference) for reference in references])


def vqav2_paper_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQAv2 as the code that the DeepStack paper's repository carries computes it.

    References on which all annotators agree are compared as they are, so that "Yes" from all ten and the answer "yes" give 0.
    Else both sides are normalised as in `vqav2_accuracy`, the answer a second time.

    Args:
      answer: as `vqa_answer` made it.
    """
    given = [_one_line(reference) for reference in references]
    if len(set(given)) > 1:
        return vqav2_accuracy(vqav2_answer(answer), given)
    return _leave_one_out(answer, given)


def _leave_one_out(answer: str, references: Sequence[str]) -> float:
    if not references:
        raise ValueError("VQA accuracy got no reference, expected the annotators' answers; leave the question out")
    matches = sum(answer == reference for reference in references)
    return float(mean(min(1, (matches - (answer == reference)) / 3) for reference in references))


VQA_ACCURACY = Scorer(
    vqa_accuracy, "VQA accuracy: mean over annotators of min(1, others who agree / 3), EvalAI's normalisation"
)
VQAV2_ACCURACY = Scorer(
    vqav2_accuracy, "VQA accuracy: mean over annotators of min(1, others who agree / 3), VQAv2's normalisation"
)
VQAV2_PAPER_ACCURACY = Scorer(
    vqav2_paper_accuracy, "VQA accuracy as the paper's code has it: references that all agree are not normalised"
)
