"""Tiny files of every benchmark, in the forms in which they are published: three questions, three images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ANSWERS = ["yes", "no", "2"]
OPTIONS = ["leaf", "cat", "dog", "sun"]


def png(number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8 + number, 6), (40 * number, 90, 10)).save(file, "PNG")
    return file.getvalue()


def struct(number: int) -> dict[str, Any]:
    return {"bytes": png(number), "path": f"{number}.png"}


def images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def as_json(folder: Path, name: str, value: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def as_parquet(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / name)


def ten(answer: str) -> list[str]:
    return [answer] * 8 + ["maybe"] * 2


def _coco(questions: str, annotations: str, subtype: str, year: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = [{"image_id": 7 + at, "question": f"Is it {at}?", "question_id": 70 + at} for at in range(3)]
        as_json(folder, questions, {"data_subtype": subtype, "task_type": "Open-Ended", "questions": rows})
        found = []
        for at, answer in enumerate(ANSWERS):
            given = [{"answer": said, "answer_confidence": "yes", "answer_id": n} for n, said in enumerate(ten(answer), 1)]
            found.append({"question_id": 70 + at, "image_id": 7 + at, "answer_type": "other", "answers": given})
        if annotations:
            as_json(folder, annotations, {"data_subtype": subtype, "annotations": found[::-1]})
        images(folder, *(f"{year}/COCO_{year}_{7 + at:012d}.jpg" for at in range(3)))

    return make


def _vqa_parquet(name: str, *, structs: bool, answered: bool = True) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = []
        for at, answer in enumerate(ANSWERS):
            given: Any = [{"answer": one, "answer_id": n} for n, one in enumerate(ten(answer))] if structs else ten(answer)
            row = {"question_id": 70 + at, "question": f"Is it {at}?", "image_id": 7 + at, "image": struct(at)}
            rows.append(row | ({"answers": given, "answer_type": "other"} if answered else {}))
        as_parquet(folder, name, rows)

    return make


def _gqa_json(folder: Path) -> None:
    rows = {f"20{at}": {"question": f"Is it {at}?", "imageId": f"n{at}", "answer": ANSWERS[at]} for at in range(3)}
    as_json(folder, "testdev_balanced_questions.json", rows)
    images(folder, *(f"images/n{at}.jpg" for at in range(3)))


def _gqa_parquet(folder: Path) -> None:
    rows = [{"id": f"20{at}", "imageId": f"n{at}", "question": f"Is it {at}?", "answer": ANSWERS[at]} for at in range(3)]
    as_parquet(folder, "testdev_balanced_instructions/testdev-00000-of-00001.parquet", rows)
    held = [{"id": f"n{at}", "image": struct(at)} for at in (2, 0, 1)]
    as_parquet(folder, "testdev_balanced_images/testdev-00000-of-00001.parquet", held)


def _textvqa_rows() -> list[dict[str, Any]]:
    rows = [{"question": f"What U.S. word is {at}?", "image_id": f"a{at}", "question_id": 70 + at} for at in range(3)]
    return [row | {"answers": ten(answer), "set_name": "val"} for row, answer in zip(rows, ANSWERS, strict=True)]


def _textvqa_json(folder: Path) -> None:
    as_json(folder, "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": _textvqa_rows()})
    tokens = [{"image_id": f"a{at}", "ocr_tokens": ["STOP", str(at)]} for at in range(3)]
    as_json(folder, "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    images(folder, *(f"train_images/a{at}.jpg" for at in range(3)))


def _textvqa_parquet(folder: Path) -> None:
    rows = [row | {"image": struct(at), "ocr_tokens": ["STOP", str(at)]} for at, row in enumerate(_textvqa_rows())]
    as_parquet(folder, "data/validation-00000-of-00001.parquet", rows)


def _documents(split: str, name: str, image: str, place: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = [{"questionId": 70 + at, "question": f"Is it {at}?", image: place.format(at)} for at in range(3)]
        given = [{"answers": [answer, answer.upper()]} if split == "val" else {} for answer in ANSWERS]
        rows = [row | {"docId": 1, "data_split": split} | answers for row, answers in zip(rows, given, strict=True)]
        as_json(folder, name, {"dataset_name": "x", "dataset_split": split, "data": rows})
        images(folder, *(place.format(at) if "/" in place else f"infographicsvqa_images/{place.format(at)}" for at in range(3)))

    return make


def _documents_parquet(split: str, name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = [{"questionId": str(70 + at), "question": f"Is it {at}?", "image": struct(at)} for at in range(3)]
        given = [[answer, answer.upper()] if split == "val" else None for answer in ANSWERS]
        as_parquet(folder, name, [row | {"answers": one, "data_split": split} for row, one in zip(rows, given, strict=True)])

    return make


def _pages_json(folder: Path) -> None:
    rows = [{"questionId": 70 + at, "question": f"Is it {at}?", "page_ids": ["d_p1", "d_p2"]} for at in range(3)]
    rows = [
        row | {"answers": [answer], "answer_page_idx": 1, "data_split": "val"}
        for row, answer in zip(rows, ANSWERS, strict=True)
    ]
    as_json(folder, "val.json", {"dataset_split": "val", "data": rows})
    images(folder, "images/d_p1.jpg", "images/d_p2.jpg")


def _pages_parquet(folder: Path) -> None:
    rows = []
    for at, answer in enumerate(ANSWERS):
        row: dict[str, Any] = {"questionId": str(70 + at), "question": f"Is it {at}?", "answers": repr([answer])}
        pages = {f"image_{number}": struct(number) if number < 3 else None for number in range(1, 21)}
        rows.append(row | {"data_split": "val", "answer_page_idx": "1"} | pages)
    kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.Table.from_pylist(rows)
    fields = [pa.field(one.name, kinds if one.name.startswith("image_") else one.type) for one in table.schema]
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), folder / "data" / "val-00000-of-00001.parquet")


def _chartqa_json(folder: Path) -> None:
    rows = [{"imgname": f"{at}.png", "query": f"Is it {at}?", "label": ANSWERS[at]} for at in range(3)]
    as_json(folder, "test/test_human.json", rows[:2])
    as_json(folder, "test/test_augmented.json", rows[2:])
    images(folder, *(f"test/png/{at}.png" for at in range(3)))


def _chartqa_parquet(folder: Path) -> None:
    kinds = ("human_test", "human_test", "augmented_test")
    rows = [{"type": kinds[at], "question": f"Is it {at}?", "answer": [ANSWERS[at]], "image": struct(at)} for at in range(3)]
    as_parquet(folder, "data/test-00000-of-00001-abc.parquet", rows)


def _seed_rows() -> list[dict[str, Any]]:
    kinds = ("image", "image", "video")
    rows = []
    for at in range(3):
        row: dict[str, Any] = {"question_id": str(70 + at), "question": f"Which is {at}?", "answer": "ABC"[at]}
        row |= {f"choice_{letter}": option for letter, option in zip("abcd", OPTIONS, strict=True)}
        rows.append(row | {"data_type": kinds[at], "data_id": f"i{at}.png", "question_type_id": 1})
    return rows


def _seed_json(folder: Path) -> None:
    as_json(folder, "SEED-Bench.json", {"questions": _seed_rows(), "question_type": {"x": 1}})
    images(folder, "SEED-Bench-image/i0.png", "SEED-Bench-image/i1.png", "SEED-Bench-video-image/72.png")


def _seed_parquet(folder: Path) -> None:
    rows = [row | {"image": [struct(at)] * (1 + (at == 2))} for at, row in enumerate(_seed_rows())]
    as_parquet(folder, "data/test-00000-of-00001.parquet", rows)


def _ai2d_json(folder: Path) -> None:
    (folder / "questions").mkdir(parents=True)
    (folder / "ai2d_test_ids.csv").write_text("0\n1\n2\n")
    for at in range(3):
        one = {"abcLabel": at == 2, "answerTexts": OPTIONS, "correctAnswer": at, "questionId": f"{at}.png-0"}
        as_json(folder, f"questions/{at}.png.json", {"imageName": f"{at}.png", "questions": {f"Which is {at}?": one}})
    images(folder, "images/0.png", "images/1.png", "abc_images/2.png")


def _ai2d_parquet(folder: Path) -> None:
    rows = [{"question": f"Which is {at}?", "options": OPTIONS, "answer": str(at), "image": struct(at)} for at in range(3)]
    as_parquet(folder, "data/test-00000-of-00001.parquet", rows)


def _mmmu(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = []
        for at in range(3):
            row: dict[str, Any] = {"id": f"validation_Art_Theory_{at}", "question": f"See <image 1>. Which is {at}?"}
            open_ended = {"options": "[]", "answer": "['7', 'seven']", "question_type": "open"}
            choice = {"options": repr([*OPTIONS[:3], "<image 2>"]), "answer": "ABC"[at], "question_type": "multiple-choice"}
            held = {f"image_{number}": struct(number) if number < 3 else None for number in range(1, 8)}
            rows.append(row | (open_ended if at == 2 else choice) | held)
        kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.Table.from_pylist(rows)
        schema = pa.schema([(one.name, kinds if one.name.startswith("image_") else one.type) for one in table.schema])
        for number, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True)
            part = rows if len(names) == 1 else rows[number :: len(names)]
            pq.write_table(pa.Table.from_pylist(part, schema), folder / name)

    return make


def _pope_json(folder: Path) -> None:
    for kind in ("random", "popular", "adversarial"):
        rows = [{"question_id": 1, "image": "c0.jpg", "text": "Is there a dog in the image?", "label": "yes"}]
        (folder / "output" / "coco").mkdir(parents=True, exist_ok=True)
        (folder / f"output/coco/coco_pope_{kind}.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    images(folder, "val2014/c0.jpg")


def _pope_parquet(folder: Path) -> None:
    kinds = ("adversarial", "popular", "random")
    rows = [{"id": str(at), "question_id": "1", "question": "Is there a dog in the image?", "answer": "yes"} for at in range(3)]
    rows = [row | {"category": kind, "image": struct(0), "image_source": "c0"} for row, kind in zip(rows, kinds, strict=True)]
    as_parquet(folder, "data/test-00000-of-00001.parquet", rows)


def _mmvet_json(folder: Path) -> None:
    rows = {f"v1_{at}": {"imagename": f"v1_{at}.png", "question": f"Is it {at}?", "answer": ANSWERS[at]} for at in range(3)}
    as_json(folder, "mm-vet.json", rows)
    images(folder, *(f"images/v1_{at}.png" for at in range(3)))


def _mmvet_parquet(folder: Path) -> None:
    rows = [{"question_id": f"v1_{at}", "question": f"Is it {at}?", "answer": ANSWERS[at]} for at in range(3)]
    rows = [row | {"image": struct(at), "capability": ["ocr"]} for at, row in enumerate(rows)]
    as_parquet(folder, "data/test-00000-of-00001.parquet", rows)


def _receipts_json(folder: Path) -> None:
    asked = ("name of the company that issued this", "address of the company on this", "total amount on this", "lines of this")
    turns = []
    for number, words in enumerate(asked):
        turns.append({"from": "human", "value": f"{'<image>' * (not number)}\nWhat is the {words} receipt?\nAnswer briefly."})
        turns.append({"from": "gpt", "value": [*ANSWERS, "x"][number]})
    as_json(folder, "val.json", [{"id": "r0", "image": "images/0.png", "conversations": turns}])
    images(folder, "images/0.png")


_VAL = ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")
_OK = ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")
_DEV = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
MADE: dict[tuple[str, str], Callable[[Path], None]] = {
    ("vqav2", "json"): _coco(*_VAL, "val2014", "val2014"),
    ("vqav2", "parquet"): _vqa_parquet("data/validation-00000-of-00001.parquet", structs=True),
    ("vqav2_testdev", "json"): _coco(_DEV, "", "test-dev2015", "test2015"),
    ("vqav2_testdev", "parquet"): _vqa_parquet("data/testdev-00000-of-00001.parquet", structs=True, answered=False),
    ("okvqa", "json"): _coco(*_OK, "val2014", "val2014"),
    ("okvqa", "parquet"): _vqa_parquet("data/val2014-00000-of-00001.parquet", structs=False),
    ("gqa", "json"): _gqa_json,
    ("gqa", "parquet"): _gqa_parquet,
    ("textvqa", "json"): _textvqa_json,
    ("textvqa", "parquet"): _textvqa_parquet,
    ("textvqa_ocr", "json"): _textvqa_json,
    ("textvqa_ocr", "parquet"): _textvqa_parquet,
    ("docvqa", "json"): _documents("val", "val_v1.0_withQT.json", "image", "documents/{}.png"),
    ("docvqa", "parquet"): _documents_parquet("val", "DocVQA/validation-00000-of-00001.parquet"),
    ("docvqa_test", "json"): _documents("test", "test_v1.0.json", "image", "documents/{}.png"),
    ("docvqa_test", "parquet"): _documents_parquet("test", "DocVQA/test-00000-of-00001.parquet"),
    ("infovqa", "json"): _documents("val", "infographicsVQA_val_v1.0_withQT.json", "image_local_name", "{}.jpeg"),
    ("infovqa", "parquet"): _documents_parquet("val", "InfographicVQA/validation-00000-of-00001.parquet"),
    ("infovqa_test", "json"): _documents("test", "infographicsVQA_test_v1.0.json", "image_local_name", "{}.jpeg"),
    ("infovqa_test", "parquet"): _documents_parquet("test", "InfographicVQA/test-00000-of-00001.parquet"),
    ("multidocvqa", "json"): _pages_json,
    ("multidocvqa", "parquet"): _pages_parquet,
    ("chartqa", "json"): _chartqa_json,
    ("chartqa", "parquet"): _chartqa_parquet,
    ("seed", "json"): _seed_json,
    ("seed", "parquet"): _seed_parquet,
    ("seed_image", "json"): _seed_json,
    ("seed_image", "parquet"): _seed_parquet,
    ("ai2d", "json"): _ai2d_json,
    ("ai2d", "parquet"): _ai2d_parquet,
    ("mmmu", "subjects"): _mmmu("Art/validation-00000-of-00001.parquet", "Music/validation-00000-of-00001.parquet"),
    ("mmmu", "parquet"): _mmmu("data/validation-00000-of-00001.parquet"),
    ("pope", "json"): _pope_json,
    ("pope", "parquet"): _pope_parquet,
    ("mmvet", "json"): _mmvet_json,
    ("mmvet", "parquet"): _mmvet_parquet,
    ("receipts", "json"): _receipts_json,
}
