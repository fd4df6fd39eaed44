"""VQAv2 and OK-VQA: questions and annotations in two JSON files over images of COCO."""

import json
from collections.abc import Callable, Mapping, Sequence

from deepstack_jax.config import LimitsConfig
from deepstack_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Protocol
from deepstack_jax.evaluate.benchmarks.rows import (
    Form,
    ListRows,
    Row,
    Rows,
    field,
    first_file,
    joined,
    one_image,
    parquet,
    read_list,
    read_object,
    texts,
)
from deepstack_jax.evaluate.scorers.texts import Scorer
from deepstack_jax.evaluate.scorers.vqa import VQA_ACCURACY, VQAV2_ACCURACY, VQAV2_PAPER_ACCURACY, vqa_answer, vqav2_answer
from deepstack_jax.evaluate.tasks import Prediction, of_answer

PHRASE = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def _files(questions: str, annotations: str, images: str) -> Form:
    """The authors' JSON files; `annotations` "" where answers are hidden."""

    def find(folder: str, _limits: LimitsConfig) -> Rows | None:
        path = first_file(folder, (questions,))
        if path is None:
            return None
        asked = read_list(path, "questions")
        if annotations:
            answers = first_file(folder, (annotations,)) or f"{folder}/{annotations}"
            asked = joined(asked, read_list(answers, "annotations"), "question_id", path, answers)
        subtype = read_object(path).get("data_subtype")
        return ListRows(path, [(row if isinstance(row, dict) else {}) | {"subtype": subtype} for row in asked])

    held = (questions, annotations, f"{images}/")
    return Form(", ".join(name for name in held if name), find)


def _item(row: Row, _number: int) -> Item:
    number, question = field(row, "question_id"), field(row, "question", str)
    kind, split = row.get("answer_type"), row.get("subtype") or ""
    return Item(
        id=str(number),
        question=question,
        answers=texts(row.get("answers")),
        kind=kind if isinstance(kind, str) else "all",
        split=str(split),
        details={"question_id": number},
    )


def _images(year: str) -> Callable[[Row, str], Sequence[object]]:
    """The image of a table, or the file of COCO by its number."""
    name = f"COCO_{year}_{{:012d}}.jpg"
    return one_image("image_id", f"{year}/{name}", name, kind=int)


def vqav2_submission(predictions: Sequence[Prediction]) -> dict[str, str]:
    """What the EvalAI server of VQAv2 reads: [{"question_id", "answer"}]."""
    rows = [{"question_id": one.details["question_id"], "answer": one.prediction.strip()} for one in predictions]
    return {"vqav2.json": json.dumps(rows)}


def _protocol(words: str, suffix: str, scorer: Scorer, parse: Callable[[str], str], most: int) -> Protocol:
    return Protocol(
        words=words,
        suffix=suffix,
        scorers={"vqa_accuracy": scorer},
        parse=of_answer(parse),
        max_new_tokens=most,
    )


_VQAV2: Mapping[str, Protocol] = {
    "own": _protocol("VQA accuracy, VQAv2's normalisation", PHRASE, VQAV2_ACCURACY, vqav2_answer, 16),
    "deepstack-paper": _protocol(
        "VQA accuracy, answers on which all annotators agree compared without normalisation",
        PHRASE,
        VQAV2_PAPER_ACCURACY,
        vqa_answer,
        16,
    ),
}
_ORIGIN = "from visualqa.org (and COCO's images), or lmms-lab/VQAv2 of the Hugging Face hub"
_COLUMNS = ("question_id", "question", "answers", "answer_type")

VQAV2 = Benchmark(
    title="VQAv2, validation",
    folder="vqav2",
    origin=_ORIGIN,
    metric="vqa_accuracy",
    forms=(
        _files("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014"),
        parquet(("data/validation-*.parquet", "validation-*.parquet"), _COLUMNS),
    ),
    item=_item,
    images=_images("val2014"),
    protocols=_VQAV2,
    split="val2014",
    submission=vqav2_submission,
)
VQAV2_TESTDEV = Benchmark(
    title="VQAv2, test-dev",
    folder="vqav2",
    origin=_ORIGIN,
    metric="",
    forms=(
        _files("v2_OpenEnded_mscoco_test-dev2015_questions.json", "", "test2015"),
        parquet(("data/testdev-*.parquet", "testdev-*.parquet"), ("question_id", "question")),
    ),
    item=_item,
    images=_images("test2015"),
    protocols=_VQAV2,
    split="test-dev2015",
    hidden=True,
    submission=vqav2_submission,
    paper={"DeepStack-L": "79.5", "DeepStack-V": "80.4", "DeepStack-L-HD": "82.0"},
)
OKVQA = Benchmark(
    title="OK-VQA, validation",
    folder="okvqa",
    origin="from okvqa.allenai.org (and COCO's images), or lmms-lab/OK-VQA of the Hugging Face hub",
    metric="vqa_accuracy",
    forms=(
        _files("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014"),
        parquet(("data/val2014-*.parquet", "val2014-*.parquet"), ("question_id", "question", "answers")),
    ),
    item=_item,
    images=_images("val2014"),
    protocols={
        "own": _protocol(
            "VQA accuracy, EvalAI's normalisation",
            UNANSWERABLE + PHRASE,
            VQA_ACCURACY,
            vqa_answer,
            64,
        )
    },
    split="val2014",
)
