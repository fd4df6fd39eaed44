"""Four fields of scanned receipts, in rows of LLaVA JSON as `train` reads them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deepstack_jax.data.encode.templates import Template
from deepstack_jax.data.example import Example
from deepstack_jax.data.formats import files
from deepstack_jax.data.open import MissingError, open_files
from deepstack_jax.evaluate.benchmarks.benchmark import Benchmark
from deepstack_jax.evaluate.questions import Question, answered_turns
from deepstack_jax.evaluate.scorers.texts import ANLS, EXACT_MATCH, WORD_F1
from deepstack_jax.evaluate.tasks import Task

FIELDS = ("company", "date", "total", "address")
ORIGIN = "scans of ICDAR 2019 SROIE as LLaVA JSON, a row of questions for every receipt"


def field_of(question: str) -> str:
    """Which field a question asks for, by the one that its words name last; "" where it is another question.

    "What is the name of the company ...?", "What is the address of the company ...?": an address is always a company's.
    """
    words = question.splitlines()[0].lower() if question else ""
    return next((name for name in ("address", "date", "total", "company") if name in words), "")


def questions(example: Example, images: Sequence[Any], template: Template) -> list[Question]:
    """Those of a row that ask for a field, the true answers of the turns before given; none of a transcription."""
    found = answered_turns(example, images, template)
    return [replace(one, kind=name) for one in found if (name := field_of(one.words))]


def _open(folder: str, _protocol: str) -> Task:
    rows = files.under(folder, "val.json")
    try:
        source = open_files(rows, folder)
    except MissingError as error:
        raise MissingError(f"{rows} does not exist; it holds {ORIGIN}") from error
    scorers = {"exact_match": EXACT_MATCH, "anls": ANLS, "word_f1": WORD_F1}
    return Task(source, questions, scorers, max_new_tokens=64)


RECEIPTS = Benchmark(
    title="company, date, total and address of scanned receipts",
    folder="receipts",
    files=("val.json, images/",),
    origin=ORIGIN,
    metric="exact_match",
    open=_open,
)
