"""Text in images: TextVQA, DocVQA, InfoVQA and MP-DocVQA, whose JSON files hold their questions under "data"."""

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.formats.styles import RecordError
from deepstack_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Protocol
from deepstack_jax.evaluate.benchmarks.coco_vqa import PHRASE
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
    texts,
)
from deepstack_jax.evaluate.scorers.texts import ANLS, BINARISED_ANLS, MP_DOCVQA_ACCURACY, MP_DOCVQA_ANLS
from deepstack_jax.evaluate.scorers.vqa import VQA_ACCURACY, vqa_answer
from deepstack_jax.evaluate.tasks import Prediction, of_answer

_MOST_DIGITS = 20  # of a number that a table holds as a text
PAGES = 20  # of a document of MP-DocVQA at most


def _files(names: Sequence[str], images: str, ocr: str = "") -> Form:
    """The first JSON file of the names; with the tokens of an OCR file, by image, where one is named."""

    def find(folder: str, _limits: LimitsConfig) -> Rows | None:
        if (path := first_file(folder, names)) is None:
            return None
        rows = read_list(path, "data")
        if ocr:
            found = read_list(first_file(folder, (ocr,)) or f"{folder}/{ocr}", "data")
            tokens = {str(one.get("image_id")): one.get("ocr_tokens") for one in found if isinstance(one, dict)}
            rows = [
                row | {"ocr_tokens": tokens.get(str(row.get("image_id")))} if isinstance(row, dict) else row for row in rows
            ]
        return ListRows(path, rows)

    return Form(", ".join(name for name in (names[0], ocr, f"{images}/") if name), find)


def _textvqa_item(row: Row, _number: int) -> Item:
    number, tokens, split = field(row, "question_id"), row.get("ocr_tokens"), row.get("set_name")
    details = {"question_id": number, "ocr_tokens": list(map(str, tokens)) if isinstance(tokens, list) else None}
    return Item(str(number), field(row, "question", str), texts(row.get("answers")), split=split or "", details=details)


def textvqa_body(item: Item, *, ocr: bool) -> str:
    """The question with a capital and the rest in lower case, as the base code puts it; with the tokens of an OCR if wanted."""
    tokens = item.details.get("ocr_tokens")
    if ocr and tokens is None:
        raise RecordError("has no ocr_tokens; give the file of them, or choose textvqa")
    shown = f"\nReference OCR token: {', '.join(tokens)}" if ocr and tokens is not None else ""
    return item.question.capitalize() + shown


def _textvqa(words: str, *, ocr: bool) -> Protocol:
    return Protocol(
        words=words,
        body=lambda item: textvqa_body(item, ocr=ocr),
        suffix=PHRASE,
        scorers={"vqa_accuracy": VQA_ACCURACY},
        parse=of_answer(vqa_answer),
        max_new_tokens=64,
    )


_TEXTVQA_JSON, _OCR_JSON = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json"
_TEXTVQA_PARQUET = ("data/validation-*.parquet", "validation-*.parquet")
_TEXTVQA_COLUMNS = ("question_id", "question", "answers", "set_name")
_SHOWN = "VQA accuracy, the tokens of an OCR in the prompt"
TEXTVQA = Benchmark(
    title="TextVQA, validation, without OCR tokens",
    folder="textvqa",
    origin="from textvqa.org, or lmms-lab/textvqa of the Hugging Face hub",
    metric="vqa_accuracy",
    forms=(
        _files((_TEXTVQA_JSON,), "train_images"),
        parquet(_TEXTVQA_PARQUET, _TEXTVQA_COLUMNS),
    ),
    item=_textvqa_item,
    images=one_image("image_id", "train_images/{}.jpg", "train_val_images/train_images/{}.jpg", "{}.jpg"),
    protocols={"own": _textvqa("VQA accuracy, no OCR tokens in the prompt", ocr=False)},
    split="val",
)
TEXTVQA_OCR = replace(
    TEXTVQA,
    title="TextVQA, validation, with OCR tokens",
    forms=(
        _files((_TEXTVQA_JSON,), "train_images", _OCR_JSON),
        parquet(_TEXTVQA_PARQUET, (*_TEXTVQA_COLUMNS, "ocr_tokens")),
    ),
    protocols={"own": _textvqa(_SHOWN, ocr=True), "deepstack-paper": _textvqa(_SHOWN, ocr=True)},
    paper={"DeepStack-L": "62.4", "DeepStack-V": "63.5", "DeepStack-L-HD": "66.7"},
)


def _document_item(row: Row, _number: int) -> Item:
    number, answers, split = field(row, "questionId"), row.get("answers"), row.get("data_split")
    if isinstance(answers, str) and answers.startswith("["):  # MP-DocVQA's tables hold lists as Python writes them
        answers = read_literal(answers, "answers")
    details = {"questionId": int(number) if str(number).isdecimal() and len(str(number)) < _MOST_DIGITS else number}
    return Item(str(number), field(row, "question", str), texts(answers), split=split or "", details=details)


def read_literal(text: str, key: str) -> list[object]:
    """A list that a table holds as Python writes it; RecordError where it is none."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise RecordError(f"{key} is {text!r:.80}, expected a list; fetch the file again") from error
    if not isinstance(value, list):
        raise RecordError(f"{key} is {text!r:.80}, expected a list; fetch the file again")
    return value


def _pages(row: Row, folder: str) -> Sequence[object]:
    """The pages of a document, in their order."""
    if isinstance(pages := row.get("page_ids"), list) and "image_1" not in row:
        return [place_of(folder, f"images/{page}.jpg", f"{page}.jpg") for page in pages]
    return [page for number in range(1, PAGES + 1) if (page := row.get(f"image_{number}")) is not None]


def _answer_page(row: Row, folder: str) -> Sequence[object]:
    """The page that holds the answer."""
    pages = {str(number): page for number, page in enumerate(_pages(row, folder))}
    number = str(field(row, "answer_page_idx"))
    if number not in pages:
        raise RecordError(f"answer_page_idx is {number:.20}, expected that of one of {len(pages)} pages; fetch the file again")
    return [pages[number]]


def document_submission(predictions: Sequence[Prediction]) -> dict[str, str]:
    """What the server of DocVQA and InfoVQA (rrc.cvc.uab.es) reads: [{"questionId", "answer"}]."""
    rows = [{"questionId": one.details["questionId"], "answer": one.prediction.strip()} for one in predictions]
    return {"submission.json": json.dumps(rows)}


def _short(words: str, **scorers) -> Protocol:
    return Protocol(words=words, suffix=PHRASE, scorers=scorers, max_new_tokens=32)


_HUB = "lmms-lab/DocVQA of the Hugging Face hub"


class _Documents(NamedTuple):
    """A part of the DocVQA challenge: what tells its files from those of another."""

    title: str
    folder: str
    number: int  # of the challenge's task
    table: str  # the folder of its tables
    prefix: str  # of its JSON files
    questions: str  # the folder that its archive puts them into
    shown: str  # the folder of its images, for people
    images: Callable[[Row, str], Sequence[object]]

    def validation(self, paper: Mapping[str, str]) -> Benchmark:
        """With answers."""
        names = ("val_v1.0_withQT.json", f"{self.questions}/val_v1.0_withQT.json", "val_v1.0.json")
        return self._benchmark("val", "validation", names, ("questionId", "question", "answers", "data_split"), paper)

    def test(self) -> Benchmark:
        """Whose answers are hidden."""
        names = ("test_v1.0.json", f"{self.questions}/test_v1.0.json")
        return self._benchmark("test", "test", names, ("questionId", "question", "data_split"), {})

    def _benchmark(
        self, split: str, words: str, names: Sequence[str], columns: Sequence[str], paper: Mapping[str, str]
    ) -> Benchmark:
        tables = tuple(f"{place}{words}-*.parquet" for place in (f"{self.table}/", "data/", ""))
        folders = [name.rpartition("/") for name in names]
        return Benchmark(
            title=f"{self.title}, {words}",
            folder=self.folder,
            origin=f"from the DocVQA challenge at rrc.cvc.uab.es (task {self.number}), or {_HUB}",
            metric="" if split == "test" else "anls",
            forms=(
                _files([f"{place}{slash}{self.prefix}{name}" for place, slash, name in folders], self.shown),
                parquet(tables, columns),
            ),
            item=_document_item,
            images=self.images,
            protocols={
                "own": _short("ANLS", anls=ANLS),
                "deepstack-paper": _short("share of questions with ANLS >= 0.5, called ANLS there", anls=BINARISED_ANLS),
            },
            split=split,
            hidden=split == "test",
            submission=document_submission,
            paper=paper,
        )


_DOCVQA = _Documents(
    title="DocVQA",
    folder="docvqa",
    number=1,
    table="DocVQA",
    prefix="",
    questions="spdocvqa_qas",
    shown="documents",
    images=one_image("image", "{}", "spdocvqa_images/{file}"),
)
_INFOVQA = _Documents(
    title="InfoVQA",
    folder="infovqa",
    number=3,
    table="InfographicVQA",
    prefix="infographicsVQA_",
    questions="infographicsvqa_qas",
    shown="infographicsvqa_images",
    images=one_image("image_local_name", "infographicsvqa_images/{}", "images/{}", "{}"),
)
DOCVQA = _DOCVQA.validation({"DeepStack-L": "39.1", "DeepStack-V": "41.0", "DeepStack-L-HD": "78.8"})
DOCVQA_TEST = _DOCVQA.test()
INFOVQA = _INFOVQA.validation({"DeepStack-L": "29.8", "DeepStack-V": "30.0", "DeepStack-L-HD": "41.2"})
INFOVQA_TEST = _INFOVQA.test()
_MULTIDOC = _short("ANLS and accuracy, MP-DocVQA's", anls=MP_DOCVQA_ANLS, accuracy=MP_DOCVQA_ACCURACY)
MULTIDOCVQA = Benchmark(
    title="MP-DocVQA, validation, all pages of a document",
    folder="multidocvqa",
    origin="from the DocVQA challenge at rrc.cvc.uab.es (task 4), or lmms-lab/MP-DocVQA of the Hugging Face hub",
    metric="anls",
    forms=(
        _files(("val.json",), "images"),
        parquet(
            ("data/val-*.parquet", "val-*.parquet"),
            ("questionId", "question", "answers", "data_split", "answer_page_idx"),
            tuple(f"image_{number}" for number in range(1, PAGES + 1)),
        ),
    ),
    item=_document_item,
    images=_pages,
    protocols={
        "own": _MULTIDOC,
        "oracle": replace(_MULTIDOC, words="the same, only the page with the answer shown", images=_answer_page),
    },
    split="val",
    paper={"DeepStack-L": "22.2 / 10.5", "DeepStack-V": "23.0 / 11.0", "DeepStack-L-HD": "48.2 / 37.7"},
)
