"""Multiple choice by letter: SEED-Bench, AI2D and MMMU."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.styles import RecordError
from deepstack_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Protocol
from deepstack_jax.evaluate.benchmarks.coco_vqa import PHRASE
from deepstack_jax.evaluate.benchmarks.documents import read_literal
from deepstack_jax.evaluate.benchmarks.rows import (
    Form,
    ListRows,
    Row,
    Rows,
    field,
    first_file,
    one_image,
    parquet,
    place_of,
    read_list,
    read_object,
    read_text,
    texts,
)
from deepstack_jax.evaluate.questions import Question
from deepstack_jax.evaluate.scorers.choices import (
    AI2D_ACCURACY,
    AI2D_PAPER_ACCURACY,
    SEED_ACCURACY,
    SEED_PAPER_ACCURACY,
    ai2d_letter,
    first_letter,
)
from deepstack_jax.evaluate.scorers.mmmu import (
    MMMU_ACCURACY,
    mmmu_disciplines,
    mmmu_letter,
    mmmu_numbers,
    open_answers,
    subject_of,
)
from deepstack_jax.evaluate.scorers.texts import Scorer
from deepstack_jax.evaluate.tasks import Prediction, of_answer

LETTER = "\nAnswer with the option's letter from the given choices directly."
_LETTER_OF_PAPER = "Answer with the option letter from the given choices directly."  # MMMU's prompt in the paper's base code
SEED = 42  # of the letters that are drawn where an answer names none
_IMAGE_NUMBER = re.compile(r"<image (\d+)>")


def lettered(options: Sequence[str]) -> str:
    """The options of a choice, a line each."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))


def choice_body(item: Item) -> str:
    """Question and options."""
    return f"{item.question}\n{lettered(item.options)}"


def _seed_json(folder: str, _limits: LimitsConfig) -> Rows | None:
    path = first_file(folder, ("SEED-Bench.json",))
    return None if path is None else ListRows(path, read_list(path, "questions"))


def _seed_item(row: Row, _number: int) -> Item:
    kind = field(row, "data_type", str)
    options = tuple(str(field(row, f"choice_{letter}")) for letter in "abcd")
    return Item(str(field(row, "question_id")), field(row, "question", str), texts(row.get("answer")), options, kind)


def _seed_images(row: Row, folder: str) -> Sequence[object]:
    """The image; of a video the frames that a table holds, or one from its middle, by the question's number."""
    image = row.get("image")
    if image is not None:
        return image if isinstance(image, list) else [image]
    if row["data_type"] == "video":
        return [place_of(folder, f"SEED-Bench-video-image/{row['question_id']}.png")]
    name = str(field(row, "data_id"))
    return [place_of(folder, f"SEED-Bench-image/{name}", name)]


def _seed(words: str, scorer: Scorer) -> Protocol:
    return Protocol(
        words=words,
        body=choice_body,
        suffix=LETTER,
        scorers={"accuracy": scorer},
        parse=of_answer(first_letter),
        max_new_tokens=64,
    )


_SEED_OWN = _seed("accuracy by the first character, in either case", SEED_ACCURACY)
SEED_ALL = Benchmark(
    title="SEED-Bench, images and videos",
    folder="seed",
    origin="from AILab-CVC/SEED-Bench, or lmms-lab/SEED-Bench, both of the Hugging Face hub",
    metric="accuracy",
    forms=(
        Form("SEED-Bench.json, SEED-Bench-image/, SEED-Bench-video-image/", _seed_json),
        parquet(
            ("data/test-*.parquet", "test-*.parquet"),
            ("question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_type"),
        ),
    ),
    item=_seed_item,
    images=_seed_images,
    protocols={
        "own": _SEED_OWN,
        "deepstack-paper": _seed("accuracy by the first character, case counts", SEED_PAPER_ACCURACY),
        "likelihood": _SEED_OWN.likelihood(),
    },
    paper={"DeepStack-L": "60.6", "DeepStack-V": "62.3", "DeepStack-L-HD": "63.6"},
)
SEED_IMAGE = replace(SEED_ALL, title="SEED-Bench, images only", keep=lambda item: item.kind == "image", paper={})


def _ai2d_json(folder: str, _limits: LimitsConfig) -> Rows | None:
    if (path := first_file(folder, ("ai2d_test_ids.csv",))) is None:
        return None
    rows = []
    for number in read_text(path).split():
        name = files.under(folder, f"questions/{number}.png.json")
        for words, one in field(read_object(name), "questions", dict, name).items():
            told = one if isinstance(one, dict) else {}
            image = f"{'abc_images' if told.get('abcLabel') is True else 'images'}/{number}.png"
            known = {"id": told.get("questionId"), "options": told.get("answerTexts"), "answer": told.get("correctAnswer")}
            rows.append(known | {"question": words, "image": image})
    return ListRows(f"{folder}/questions", rows)


def letter_of(answer: object, options: Sequence[str]) -> tuple[str, ...]:
    """The letter of the option that a file gives by its number from 0; nothing where it gives none.

    Raises:
      RecordError: there is no such option.
    """
    letters = {str(number): letter for number, letter in enumerate(ascii_uppercase[: len(options)])}
    if answer not in (None, "") and str(answer) not in letters:
        raise RecordError(f"answer is {answer!r:.80}, expected the number of an option; fetch the file again")
    return (letters[str(answer)],) if str(answer) in letters else ()


def _ai2d_item(row: Row, number: int) -> Item:
    options = tuple(map(str, field(row, "options", list)))
    right = letter_of(row.get("answer"), options)
    return Item(str(row.get("id") or number), field(row, "question", str), right, options)


def _ai2d(words: str, scorer: Scorer, parse: Callable[[str], str]) -> Protocol:
    return Protocol(
        words=words,
        body=choice_body,
        suffix=LETTER,
        scorers={"accuracy": scorer},
        parse=lambda _question, answer: parse(answer),
        max_new_tokens=16,
    )


_AI2D_OWN = _ai2d("accuracy by the letter in front", AI2D_ACCURACY, ai2d_letter)
AI2D = Benchmark(
    title="AI2D, test",
    folder="ai2d",
    origin="from the AI2D data of allenai.org (with ai2d_test_ids.csv), or lmms-lab/ai2d of the Hugging Face hub",
    metric="accuracy",
    forms=(
        Form("ai2d_test_ids.csv, questions/, images/, abc_images/", _ai2d_json),
        parquet(("data/test-*.parquet", "test-*.parquet"), ("question", "options", "answer")),
    ),
    item=_ai2d_item,
    images=one_image("image", "{}", "images/{file}"),
    protocols={
        "own": _AI2D_OWN,
        "deepstack-paper": _ai2d("accuracy of answers that are the letter alone", AI2D_PAPER_ACCURACY, str.strip),
        "likelihood": _AI2D_OWN.likelihood(),
    },
)


def _mmmu_item(row: Row, _number: int) -> Item:
    name, open_ended = field(row, "id", str), row.get("question_type") == "open"
    options = () if open_ended else tuple(map(str, read_literal(field(row, "options", str), "options")))
    answer = row.get("answer")
    right = read_literal(answer, "answer") if open_ended and isinstance(answer, str) and answer.startswith("[") else answer
    known = texts(right) if answer != "?" else ()
    about = {"kind": subject_of(name) or "all", "split": name.split("_")[0], "details": {"open": open_ended}}
    return Item(name, field(row, "question", str), known, options, **about)


def _mmmu_numbers(text: str) -> list[int]:
    return [int(number) for number in _IMAGE_NUMBER.findall(text)]


def _mmmu_images(row: Row, _folder: str) -> Sequence[object]:
    """Every image that question and options mention, once, in the order of their numbers."""
    numbers = sorted(set(_mmmu_numbers(f"{row['question']} {row['options']}")))
    if lost := [number for number in numbers if row.get(f"image_{number}") is None]:
        raise RecordError(f"mentions <image {lost[0]}>, which it does not hold; fetch the file again")
    return [row[f"image_{number}"] for number in numbers]


def mmmu_body(item: Item, *, paper: bool) -> str:
    """A question of MMMU; by the paper's base code its images are where the text mentions them."""
    words = item.question if item.details["open"] else choice_body(item)
    return _IMAGE_NUMBER.sub("<image>", words) if paper else words


def mmmu_parse(question: Question, answer: str) -> Any:
    """A letter, drawn by the question's id where none is named; of an open question all that may be its answer."""
    if question.details["open"]:
        return open_answers(answer.strip())
    return mmmu_letter(answer.strip(), question.options, random.Random(f"{SEED}:{question.id}"))


def _mmmu_aggregate(predictions: Sequence[Prediction], digits: int) -> dict[str, dict[str, Any]]:
    ids, scores = [one.id for one in predictions], [one.scores["accuracy"] for one in predictions]
    total, subjects = mmmu_numbers(ids, scores, digits)
    return {"accuracy": {"score": total, "by_kind": mmmu_disciplines(ids, scores, digits) | subjects}}


def _mmmu(words: str, *, paper: bool) -> Protocol:
    return Protocol(
        words=words,
        body=lambda item: mmmu_body(item, paper=paper),
        suffix=f"\n{_LETTER_OF_PAPER}" if paper else f"\n{LETTER}",  # MMMU's own code leaves a blank line before it
        open_suffix=PHRASE if paper else f"\n{PHRASE}",
        scorers={"accuracy": MMMU_ACCURACY},
        parse=mmmu_parse,
        aggregate=lambda predictions: _mmmu_aggregate(predictions, 3 if paper else 5),
        max_new_tokens=16 if paper else 128,
    )


_MMMU_OWN = _mmmu("accuracy over questions, images in front of the text", paper=False)
MMMU = Benchmark(
    title="MMMU, validation",
    folder="mmmu",
    origin="MMMU/MMMU (a folder per subject) or lmms-lab/MMMU, both of the Hugging Face hub",
    metric="accuracy",
    forms=(
        parquet(
            ("*/validation-*.parquet", "validation-*.parquet"),
            ("id", "question", "options", "answer", "question_type"),
            tuple(f"image_{number}" for number in range(1, 8)),
        ),
    ),
    item=_mmmu_item,
    images=_mmmu_images,
    protocols={
        "own": _MMMU_OWN,
        "deepstack-paper": _mmmu("accuracy over questions, images where the text mentions them", paper=True),
        "likelihood": _MMMU_OWN.likelihood(),
    },
    split="validation",
    paper={"DeepStack-L": "35.7", "DeepStack-V": "34.9", "DeepStack-L-HD": "35.6"},
)
