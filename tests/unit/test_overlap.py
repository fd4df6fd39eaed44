"""Held-out rows found among the training rows: by what they say and show, whatever they are called and wherever they lie."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepstack_jax.audit.__main__ import trained_on
from deepstack_jax.config import SetConfig
from deepstack_jax.data.example import MetadataSource
from deepstack_jax.data.open import open_files, open_source
from deepstack_jax.data.order.mixture import Mixture, MixturePart
from deepstack_jax.data.overlap import find_overlap, overlap_line
from deepstack_jax.printing import Console
from tests.unit.made_examples import MadeExamples
from tests.unit.tiny import tiny_config


def row(name: str, image: str, *turns: str) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(turns)]
    return {"id": name, "conversations": said} | ({"image": image} if image else {})


def write(file: Path, rows: list[dict[str, Any]]) -> MetadataSource:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(rows))
    return open_files(str(file), str(file.parent))


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        Image.new("L", (8, 8), 60 * number).save(tmp_path / name)
    shutil.copytree(tmp_path, tmp_path / "copy")
    return tmp_path


TRAIN = [
    row("1", "a.png", "<image>\nColour?", "red", "Size?", "big"),
    row("2", "b.png", "<image>\nColour?", "blue"),
    row("3", "", "2 + 2?", "4"),
    {"id": "4"},
    row("5", "gone.png", "<image>\nShape?", "round"),
]
HELD_OUT = {
    "the same row": (row("1", "a.png", "<image>\nColour?", "red", "Size?", "big"), True),
    "by another name": (row("x", "a.png", "<image>\nColour?", "red", "Size?", "big"), True),
    "with another answer": (row("x", "b.png", "Colour?\n<image>", "green"), True),
    "one question of several": (row("x", "a.png", "<image>\nSize?", "big"), True),
    "the same text": (row("3", "", "2 + 2?", "4"), True),
    "an image that is not there": (row("5", "gone.png", "<image>\nShape?", "round"), True),
    "another question": (row("1", "a.png", "<image>\nShape?", "red"), False),
    "another image": (row("1", "c.png", "<image>\nColour?", "red", "Size?", "big"), False),
    "the same question as text": (row("1", "", "Colour?", "red"), False),
    "another sum": (row("3", "", "2 + 2?", "5"), False),
    "no row": ({"id": "4"}, False),
}


@pytest.mark.parametrize("case", HELD_OUT)
def test_the_same_row_or_question_on_the_same_image(case, folder):
    given, shared = HELD_OUT[case]
    rows = [row("other", "c.png", "<image>\nColour?", "grey"), given]
    overlap = find_overlap(write(folder / "val.json", rows), 2, write(folder / "train.json", TRAIN))
    assert (overlap.rows, overlap.looked_at) == ([1] if shared else [], len(TRAIN))
    assert overlap.first == (given["id"] if shared else "")


def test_images_in_another_place_are_the_same_by_their_content(folder):
    train = write(folder / "train.json", TRAIN)
    assert find_overlap(write(folder / "copy" / "val.json", TRAIN[:3]), 3, train).rows == [0, 1, 2]
    Image.new("L", (8, 8), 250).save(folder / "copy" / "a.png")
    assert find_overlap(write(folder / "copy" / "val.json", TRAIN[:3]), 3, train).rows == [1, 2]


def test_images_inside_of_a_table_are_compared_with_those_of_a_folder(folder):
    inside = [given | {"image": {"bytes": (folder / given["image"]).read_bytes(), "path": None}} for given in TRAIN[:2]]
    pq.write_table(pa.Table.from_pylist(inside), folder / "train.parquet")
    train = open_files(str(folder / "train.parquet"), "")
    assert find_overlap(write(folder / "val.json", TRAIN[:3]), 3, train).rows == [0, 1]


def test_of_a_mixture_only_the_rows_that_are_trained_on_count_each_once(folder):
    source = write(folder / "train.json", TRAIN)
    parts = [MixturePart(name, source, np.array(rows), SetConfig()) for name, rows in (("a", [0, 1]), ("b", [1, 2]))]
    overlap = find_overlap(write(folder / "val.json", TRAIN), 5, Mixture(parts))
    assert (overlap.rows, overlap.looked_at) == ([0, 1, 2], 3)


def test_it_ends_in_time_and_says_what_it_has_looked_at(folder):
    train = write(folder / "train.json", [row(str(number), "", f"{number}?", "yes") for number in range(2500)])
    held_out = write(folder / "val.json", [row(str(number), "", f"{number}?", "yes") for number in (0, 700, 1800)])
    overlap = find_overlap(held_out, 3, train, seconds=-1.0)
    assert (overlap.rows, overlap.looked_at) == ([0, 1], 999)
    whole = find_overlap(held_out, 3, train)
    assert "3 of 3 held-out rows are also among the training rows, as" in overlap_line(whole, 3, len(train))
    assert "2 of 3 held-out rows are also among the training rows (999 of them were looked at), as the same row" in (
        said := overlap_line(overlap, 3, len(train))
    )
    assert "the first: 0; scores on them tell what was remembered" in said


def test_nothing_is_said_where_nothing_is_shared_or_could_be_looked_over(folder):
    found = find_overlap(write(folder / "val.json", TRAIN[:1]), 1, write(folder / "train.json", TRAIN[1:]))
    assert overlap_line(found, 1, 4) == ""
    assert overlap_line(find_overlap(MadeExamples(4), 4, MadeExamples(4)), 4, 4) == ""


def test_an_image_that_is_trained_on_with_another_question(folder):
    """By its path, by its content in another place, and inside of a table."""
    rows = [row("x", "a.png", "<image>\nShape?", "round"), row("y", "c.png", "<image>\nShape?", "round")]
    train = write(folder / "train.json", TRAIN)
    for held_out in (write(folder / "val.json", rows), write(folder / "copy" / "val.json", rows)):
        found = find_overlap(held_out, 2, train)
        assert (found.rows, found.image_rows) == ([], [0])
    assert overlap_line(found, 2, 5).startswith("1 of 2 held-out rows have an image that is trained on with other questions;")
    inside = [TRAIN[0] | {"image": {"bytes": (folder / "a.png").read_bytes(), "path": None}}]
    pq.write_table(pa.Table.from_pylist(inside), folder / "train.parquet")
    assert find_overlap(held_out, 2, open_files(str(folder / "train.parquet"), "")).image_rows == [0]
    both = find_overlap(write(folder / "val.json", [*rows, TRAIN[1]]), 3, train)
    assert (both.rows, both.image_rows) == ([2], [0, 2])
    assert "1 more have an image that is trained on" in overlap_line(both, 3, 5)


def test_the_audit_lists_them(folder):
    write(folder / "train.json", TRAIN)
    held_out = [row("x", "a.png", "<image>\nShape?", "round"), row("y", "c.png", "<image>\nShape?", "round"), TRAIN[1]]
    write(folder / "val.json", held_out)
    files = {"data.root": str(folder), "data.train": "train.json", "data.validation": "val.json"}
    config = tiny_config({"data.source": "files"} | files)
    found = trained_on(config, open_source(config.data, "train"), Console(quiet=True))
    assert [(one.index, one.name) for one in found] == [(0, "x"), (2, "2")]
    assert [one.reason for one in found] == ["an image of it", "the row, or a question with its image"]
    assert trained_on(tiny_config(), MadeExamples(2), Console(quiet=True)) == []
