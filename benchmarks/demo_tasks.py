"""The demo's pages as files of three benchmarks, in published forms: `python -m benchmarks.demo_tasks runs/demo/benchmarks`.

The models of `make demo` know the demo's words alone, which no published question is written in. These held-out pages let them
go the way of any other model: VQAv2 and GQA as parquet files, DocVQA as its authors' JSON and images.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from deepstack_jax.data.synthetic import DocumentPages

PAGES, QUESTIONS, SEED = 64, 4, 0
ANNOTATORS = 10


def questions(pages: DocumentPages) -> list[dict[str, Any]]:
    """Every question of all pages, with its answer, the number and the PNG of its page."""
    found = []
    for page in pages:
        asked, said = page.messages[::2], page.messages[1::2]
        for turn, (question, answer) in enumerate(zip(asked, said, strict=True)):
            words = question.text.removeprefix("<image>\n")
            about = {"kind": page.info["kinds"][turn], "question": words, "answer": answer.text}
            found.append({"number": page.index * len(asked) + turn, "page": page.index, "png": png(page.images[0])} | about)
    return found


def png(pixels: Any) -> bytes:
    """Without loss: the digits are single pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def vqav2(folder: Path, rows: list[dict[str, Any]]) -> None:
    """As lmms-lab/VQAv2 has it; all annotators give the one right answer, and digits are told from shades by their type."""
    found = [
        {
            "question_id": row["number"],
            "question": row["question"],
            "image": {"bytes": row["png"], "path": f"{row['page']}.png"},
        }
        | {"answer_type": {"fine": "number", "coarse": "other"}[row["kind"]], "image_id": row["page"]}
        | {"answers": [{"answer": row["answer"], "answer_id": at + 1} for at in range(ANNOTATORS)]}
        for row in rows
    ]
    write_parquet(folder / "vqav2" / "data" / "validation-00000-of-00001.parquet", found)


def gqa(folder: Path, rows: list[dict[str, Any]]) -> None:
    """As lmms-lab/GQA has it: questions in one table, images in another."""
    asked = [
        {"id": str(row["number"]), "imageId": f"n{row['page']}", "question": row["question"], "answer": row["answer"]}
        for row in rows
    ]
    images = {row["page"]: {"bytes": row["png"], "path": f"n{row['page']}.png"} for row in rows}
    shown = [{"id": f"n{page}", "image": image} for page, image in images.items()]
    write_parquet(folder / "gqa" / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", asked)
    write_parquet(folder / "gqa" / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", shown)


def docvqa(folder: Path, rows: list[dict[str, Any]]) -> None:
    """As the DocVQA challenge publishes its validation set."""
    (folder / "docvqa" / "documents").mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows:
        image = f"documents/page_{row['page']}.png"
        (folder / "docvqa" / image).write_bytes(row["png"])
        about = {"questionId": row["number"], "question": row["question"], "answers": [row["answer"]], "image": image}
        found.append(about | {"docId": row["page"], "data_split": "val"})
    whole = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": found}
    (folder / "docvqa" / "val_v1.0_withQT.json").write_text(json.dumps(whole))


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def write(folder: Path, pages: int = PAGES) -> None:
    """All three, over the same held-out pages."""
    rows = questions(DocumentPages(SEED, pages, questions=QUESTIONS, split="validation"))
    for make in (vqav2, gqa, docvqa):
        make(folder, rows)


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/benchmarks"))
