"""The registry of benchmarks, and each task over files in the forms in which its benchmark is published."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.task_table import OUTPUT, page
from deepstack_jax.config import LIMITS, Config
from deepstack_jax.data.encode.templates import get_template
from deepstack_jax.data.example import ExampleError, GroupedSource, SourceError
from deepstack_jax.data.formats.image_files import image_size
from deepstack_jax.data.open import MissingError
from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate.benchmarks.benchmark import Item
from deepstack_jax.evaluate.benchmarks.registry import TASKS, find_task
from deepstack_jax.evaluate.questions import Question
from deepstack_jax.evaluate.tasks import Prediction, Task
from tests.unit.made_benchmarks import ANSWERS, MADE, OPTIONS, as_json, as_parquet

PHRASE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LINES = "\nA. leaf\nB. cat\nC. dog\nD. sun"
# Task -> the words of its second question, its images, what is right, its letters
SECOND = {
    **dict.fromkeys(("vqav2", "gqa", "docvqa", "infovqa"), (f"Is it 1?{PHRASE}", 1, "no", "")),
    **dict.fromkeys(("vqav2_testdev", "docvqa_test", "infovqa_test"), (f"Is it 1?{PHRASE}", 1, None, "")),
    "okvqa": (
        f"Is it 1?\nWhen the provided information is insufficient, respond with 'Unanswerable'.{PHRASE}",
        *(1, "no", ""),
    ),
    "textvqa": (f"What u.s. word is 1?{PHRASE}", 1, "no", ""),
    "textvqa_ocr": (f"What u.s. word is 1?\nReference OCR token: STOP, 1{PHRASE}", 1, "no", ""),
    "multidocvqa": (f"Is it 1?{PHRASE}", 2, "no", ""),
    "chartqa": ("Is it 1?\nAnswer the question with a single word.", 1, "no", ""),
    **dict.fromkeys(("seed", "seed_image", "ai2d"), (f"Which is 1?{LINES}{LETTER}", 1, "B", "ABCD")),
    "mmmu": (f"See <image 1>. Which is 1?\nA. leaf\nB. cat\nC. dog\nD. <image 2>\n{LETTER}", 2, "B", "ABCD"),
    "pope": (f"Is there a dog in the image?{PHRASE}", 1, "yes", ""),
    "mmvet": ("Is it 1?", 1, "no", ""),
    "receipts": ("What is the address of the company on this receipt?\nAnswer briefly.", 1, "no", ""),
}


def made(tmp_path: Path, name: str, form: str = "json", protocol: str = "own") -> Task:
    MADE[name, form](tmp_path / TASKS[name].folder)
    return find_task(name, str(tmp_path), protocol)


def questions_of(task: Task) -> list[Question]:
    """All questions of all rows."""
    rows = [task.source[row] for row in range(len(task.source))]
    return [one for row in rows for one in task.questions(row, row.images, get_template("v1"))]


def predictions(task: Task, answers: list[str]) -> list[Prediction]:
    """What becomes of answers to all questions of a task."""
    found = []
    for row, (question, answer) in enumerate(zip(questions_of(task), answers, strict=True)):
        parsed = task.parse(question, answer)
        scores = {name: scorer.score(parsed, question.references) for name, scorer in task.scorers.items()}
        about: Any = (question.id, row, 0, question.kind, question.words, list(question.references), answer, 1, scores)
        found.append(Prediction(*about, parsed=parsed, details=dict(question.details)))
    return found


def scores(task: Task, answers: list[str]) -> dict[str, float]:
    found = predictions(task, answers)
    json.dumps([one.parsed for one in found])  # predictions.jsonl holds it
    return {name: round(entry["score"], 4) for name, entry in task.aggregate(found).items()}


@pytest.mark.parametrize(("name", "form"), MADE)
def test_a_task_reads_its_files(name, form, tmp_path):
    task = made(tmp_path, name, form)
    assert (task.name, task.protocol, len(task.source)) == (name, "own", 2 if name == "seed_image" else 3)
    found = questions_of(task)
    words, images, right, letters = SECOND[name]
    second = found[2 if form == "subjects" else 1]  # of a folder per subject, rows are in the order of their folders
    assert second.words == words
    assert second.turns[0].words.count("<image>") == images == len(second.turns[0].images)
    assert second.references[:1] == (() if right is None else (right,))
    assert "".join(second.letters) == letters
    assert second.turns[0].words.endswith(task.suffix) or "..." in task.suffix
    for row in range(len(task.source)):
        example = task.source[row]
        assert example.index == row
        assert all(image_size(image, Config().data) for image in example.images)
    assert len({one.id for one in found}) == len(found)
    json.dumps([dict(one.details) for one in found])
    with pytest.raises(IndexError):
        task.source[len(task.source)]


UNPACKED = {
    "gqa": ("testdev_balanced_questions.json", "questions1.2"),
    "docvqa": ("val_v1.0_withQT.json", "spdocvqa_qas"),
    "docvqa_test": ("test_v1.0.json", "spdocvqa_qas"),
    "infovqa": ("infographicsVQA_val_v1.0_withQT.json", "infographicsvqa_qas"),
    "infovqa_test": ("infographicsVQA_test_v1.0.json", "infographicsvqa_qas"),
}


@pytest.mark.parametrize("name", UNPACKED)
def test_files_are_found_where_their_archive_puts_them(name, tmp_path):
    file, place = UNPACKED[name]
    folder = tmp_path / TASKS[name].folder
    before = [one.words for one in questions_of(made(tmp_path, name))]
    (folder / place).mkdir()
    (folder / file).rename(folder / place / file)
    assert [one.words for one in questions_of(find_task(name, str(tmp_path)))] == before


RIGHT = {
    ("vqav2", "own"): (["Yes.", "no", "2"], {"vqa_accuracy": 1.0}),
    ("vqav2", "deepstack-paper"): (["Yes.", "no", "the two"], {"vqa_accuracy": 1.0}),
    ("okvqa", "own"): (["yes", "maybe", "x"], {"vqa_accuracy": round((1 + 0.6) / 3, 4)}),
    ("gqa", "own"): (["Yes. ", "no", "two"], {"exact_match": 0.6667}),
    ("textvqa", "own"): (["yes", "no", "two"], {"vqa_accuracy": 1.0}),
    ("textvqa_ocr", "deepstack-paper"): (["yes", "no", "two"], {"vqa_accuracy": 1.0}),
    ("docvqa", "own"): (["YES", "not", "2"], {"anls": round((1 + 2 / 3 + 1) / 3, 4)}),
    ("docvqa", "deepstack-paper"): (["YES", "not", "3"], {"anls": 0.6667}),
    ("multidocvqa", "own"): (["yes", "not", "2"], {"anls": round((1 + 2 / 3 + 1) / 3, 4), "accuracy": 0.6667}),
    ("chartqa", "own"): (["Yes", "nope", "2.05"], {"relaxed_accuracy": 0.6667}),
    ("seed", "own"): (["a", "B. cat", "(C)"], {"accuracy": 0.6667}),
    ("seed", "deepstack-paper"): (["a", "B. cat", "(C)"], {"accuracy": 0.3333}),
    ("ai2d", "own"): (["a", "B. cat", "(C)"], {"accuracy": 1.0}),
    ("ai2d", "deepstack-paper"): (["a", "B. cat", "(C)"], {"accuracy": 0.6667}),
    ("mmmu", "own"): (["(A)", "The answer is C", "it is 7"], {"accuracy": 0.66667}),
    ("mmvet", "own"): (["yes", "no", "2"], {}),
    ("receipts", "own"): (["yes", "a no", "3"], {"exact_match": 0.3333, "anls": 0.5, "word_f1": 0.5556}),
}


@pytest.mark.parametrize(("name", "protocol"), RIGHT)
def test_a_task_scores_answers_by_its_protocol(name, protocol, tmp_path):
    answers, expected = RIGHT[name, protocol]
    task = made(tmp_path, name, "parquet" if name == "mmmu" else "json", protocol)
    assert scores(task, answers) == pytest.approx(expected, abs=1e-4)


def test_pope_says_its_five_numbers_for_every_way_of_asking(tmp_path):
    task = made(tmp_path, "pope")
    found = task.aggregate(predictions(task, ["Yes, there is.", "no", "There is not one"]))
    assert {name: round(entry["score"], 3) for name, entry in found.items()} == {
        "accuracy": 0.333,
        "precision": 1.0,
        "recall": 0.333,
        "f1_score": 0.5,
        "yes_ratio": 0.333,
    }
    assert found["recall"]["by_kind"] == {"adversarial": 0.0, "popular": 0.0, "random": 1.0}
    assert all("POPE's own reading" in entry["protocol"] for entry in found.values())
    paper = find_task("pope", str(tmp_path), "deepstack-paper")
    found = paper.aggregate(predictions(paper, ["Yes, there is.", "no", "There is not one"]))
    assert {name: entry["score"] for name, entry in found.items()}["yes_ratio"] == 1.0  # that of the right answers
    assert found["accuracy"]["score"] == 0


@pytest.mark.parametrize("name", ["seed", "ai2d", "mmmu"])
def test_a_choice_by_likelihood_is_a_protocol_of_its_own(name, tmp_path):
    task = made(tmp_path, name, "parquet", "likelihood")
    assert task.by_likelihood
    assert task.protocol == "likelihood"
    letters = ["".join(one.letters) for one in questions_of(task)]
    assert letters == (["ABCD", "ABCD", ""] if name == "mmmu" else ["ABCD"] * 3)


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_an_oracle_shows_the_page_with_the_answer_alone(form, tmp_path):
    every = questions_of(made(tmp_path, "multidocvqa", form))[0]
    one = questions_of(find_task("multidocvqa", str(tmp_path), "oracle"))[0]
    assert one.turns[0].images == every.turns[0].images[1:]
    assert one.words == every.words


def test_the_paper_places_mmmus_images_where_the_text_mentions_them(tmp_path):
    task = made(tmp_path, "mmmu", "parquet", "deepstack-paper")
    first = questions_of(task)[0]
    assert first.turns[0].words.startswith(
        "See <image>. Which is 0?\nA. leaf\nB. cat\nC. dog\nD. <image>\nAnswer with the option l"
    )
    assert len(first.turns[0].images) == 2


def test_an_mmmu_letter_that_is_drawn_depends_on_the_question_alone(tmp_path):
    task = made(tmp_path, "mmmu", "parquet")
    questions = questions_of(task)
    assert [task.parse(one, "I see nothing") for one in questions] == [task.parse(one, "I see nothing") for one in questions]
    drawn = {task.parse(replace(questions[0], id=f"validation_Art_{number}"), "?") for number in range(40)}
    assert drawn == {"A", "B", "C", "D"}


def test_mmmu_is_told_by_subject_and_by_discipline(tmp_path):
    task = made(tmp_path, "mmmu", "parquet")
    found = task.aggregate(predictions(task, ["(A)", "The answer is C", "it is 7"]))["accuracy"]
    assert found == {"score": 0.66667, "by_kind": {"Art_and_Design": 0.66667, "Art_Theory": 0.66667}}
    assert {one.kind for one in questions_of(task)} == {"Art_Theory"}


def test_submission_files_are_in_the_servers_format(tmp_path):
    expected = {
        "vqav2_testdev": ("vqav2.json", [{"question_id": 70 + at, "answer": said} for at, said in enumerate(ANSWERS)]),
        "docvqa_test": ("submission.json", [{"questionId": 70 + at, "answer": said} for at, said in enumerate(ANSWERS)]),
        "infovqa_test": ("submission.json", [{"questionId": 70 + at, "answer": said} for at, said in enumerate(ANSWERS)]),
        "mmvet": ("mm-vet.json", {f"v1_{at}": said for at, said in enumerate(ANSWERS)}),
    }
    for name, (file, content) in expected.items():
        for form in ("json", "parquet"):
            task = made(tmp_path / name / form, name, form)
            assert task.submission is not None
            assert not task.scorers  # nothing here can score it
            files = task.submission(predictions(task, [f"{said} " for said in ANSWERS]))
            assert json.loads(files[file]) == content
    lines = files["mm-vet-judge.jsonl"].splitlines()
    assert json.loads(lines[1]) == {"question_id": "v1_1", "row": "\nIs it 1? | no | no |"}


def test_an_unknown_task_or_protocol_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="there is no task 'receipt'; nearest valid name: 'receipts'"):
        find_task("receipt", str(tmp_path))
    with pytest.raises(ConfigError, match="task receipts has no protocol 'papers'; valid names: own"):
        find_task("receipts", str(tmp_path), "papers")


@pytest.mark.parametrize("name", TASKS)
def test_missing_files_are_one_line_that_says_where_they_come_from(name, tmp_path):
    with pytest.raises(MissingError) as error:
        find_task(name, str(tmp_path))
    assert TASKS[name].origin in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json"),
        ("textvqa_ocr", "TextVQA_Rosetta_OCR_v0.2_val.json"),
        ("chartqa", "test/test_human.json"),
        ("pope", "output/coco/coco_pope_popular.json"),
        ("ai2d", "questions/1.png.json"),
    ],
)
def test_a_second_file_that_is_missing_is_named_with_where_it_comes_from(name, file, tmp_path):
    made(tmp_path, name)
    (tmp_path / TASKS[name].folder / file).unlink()
    with pytest.raises(MissingError) as error:
        find_task(name, str(tmp_path))
    assert file.removeprefix("output/coco/") in str(error.value)
    assert TASKS[name].origin in str(error.value)


def damaged(tmp_path: Path, name: str, file: str, change: Any) -> str:
    """What is said of a JSON file after a change to what it holds."""
    made(tmp_path, name)
    path = tmp_path / TASKS[name].folder / file
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))
    with pytest.raises(SourceError) as error:
        find_task(name, str(tmp_path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_question_that_stands_twice_is_one_line(tmp_path):
    said = damaged(tmp_path, "docvqa", "val_v1.0_withQT.json", lambda held: held["data"].append(held["data"][0]))
    assert "holds the question '70' twice, as records 0 and 3" in said
    rows = [
        {
            "id": "1",
            "question_id": "1",
            "question": "?",
            "answer": "no",
            "category": "random",
            "image": {"bytes": b"", "path": ""},
        }
    ]
    as_parquet(tmp_path / "pope", "data/test-00000-of-00001.parquet", rows * 2)
    with pytest.raises(SourceError, match="holds the question 'random_1' twice, as records 0 and 1"):
        find_task("pope", str(tmp_path))


def test_files_of_another_split_are_one_line(tmp_path):
    def as_train(held: Any) -> None:
        held["data"][1]["data_split"] = "train"

    said = damaged(tmp_path / "a", "docvqa", "val_v1.0_withQT.json", as_train)
    assert "record 1 is of the split 'train', expected 'val'; from the DocVQA challenge" in said
    file = "v2_OpenEnded_mscoco_val2014_questions.json"
    said = damaged(tmp_path / "b", "vqav2", file, lambda held: held.update(data_subtype="train2014"))
    assert "of the split 'train2014', expected 'val2014'" in said
    file = "v2_mscoco_val2014_annotations.json"
    said = damaged(tmp_path / "c", "vqav2", file, lambda held: held["annotations"][0].update(question_id=5))
    assert "answers 1 questions that" in said
    assert "give both files of one split" in said


def test_answers_that_are_missing_are_counted_and_a_file_without_any_is_one_line(tmp_path):
    task = made(tmp_path, "vqav2")
    path = tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"
    held = json.loads(path.read_text())
    del held["annotations"][0]
    path.write_text(json.dumps(held))
    task = find_task("vqav2", str(tmp_path))
    assert len(task.source) == 3
    with pytest.raises(ExampleError, match="has no right answer") as error:
        task.source[2]
    assert error.value.name == "72"
    path.write_text(json.dumps({"annotations": []}))
    with pytest.raises(SourceError, match="holds no answers, expected those of every question; from visualqa"):
        find_task("vqav2", str(tmp_path))


def test_images_that_are_missing_are_known_and_named(tmp_path):
    task = made(tmp_path, "gqa")
    (tmp_path / "gqa/images/n1.jpg").unlink()
    source: Any = task.source
    assert source.missing_images(3) == [str(tmp_path / "gqa/images/n1.jpg")]
    assert [one.images for one in source.metadata()] == [("images/n0.jpg",), ("images/n1.jpg",), ("images/n2.jpg",)]
    with pytest.raises(ValueError, match=r"n1\.jpg"):
        image_size(task.source[1].images[0], Config().data)
    parquet = tmp_path / "b"
    made(parquet, "gqa", "parquet")
    file = parquet / "gqa/testdev_balanced_images/testdev-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(ExampleError, match=r"names the image 'n2', which .* does not hold"):
        find_task("gqa", str(parquet)).source[2]


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("docvqa", "val_v1.0_withQT.json", '{"data": [', "is no JSON"),
        ("docvqa", "val_v1.0_withQT.json", '{"data": {}}', "is not a list under 'data'"),
        ("gqa", "testdev_balanced_questions.json", "[1]", "is no JSON object"),
        ("pope", "coco_pope_random.json", "{}\n{", "line 2 is no JSON"),
        ("seed", "SEED-Bench.json", '{"questions": []}', "holds no questions"),
        ("seed", "SEED-Bench.json", '{"questions": [1, null]}', "holds no answers"),
    ],
)
def test_a_damaged_file_is_one_line(name, file, text, said, tmp_path):
    folder = tmp_path / TASKS[name].folder
    folder.mkdir()
    (folder / file).write_text(text)
    with pytest.raises(SourceError, match=said) as error:
        find_task(name, str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_table_without_a_column_and_a_row_of_other_types_are_told(tmp_path):
    as_parquet(tmp_path / "chartqa", "data/test-00000-of-00001.parquet", [{"type": "human_test", "question": "?"}])
    with pytest.raises(SourceError, match="has no column answer, image, but type, question"):
        find_task("chartqa", str(tmp_path))
    rows = [{"questionId": at, "question": "?", "answers": ["a"], "image": "documents/0.png"} for at in (1, None, 3)]
    as_json(tmp_path / "docvqa", "val_v1.0.json", {"data": rows})
    task = find_task("docvqa", str(tmp_path))
    assert len(task.source) == 3
    with pytest.raises(ExampleError, match=r"record 1 \(id 'record 1'\): questionId is None, expected str or int"):
        task.source[1]
    as_json(tmp_path / "docvqa", "val_v1.0.json", {"data": [rows[0] | {"image": "../../etc/passwd"}]})
    task = find_task("docvqa", str(tmp_path))
    with pytest.raises(ExampleError, match="leaves the image root"):
        task.source[0]


def test_the_tables_of_the_page_are_as_the_script_writes_them():
    assert OUTPUT.read_text() == page(OUTPUT.read_text()), "run python -m benchmarks.task_table"


def test_tables_of_several_row_groups_and_their_limits(tmp_path):
    made(tmp_path, "docvqa", "parquet")
    file = tmp_path / "docvqa/DocVQA/validation-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file), file, row_group_size=1)
    task = find_task("docvqa", str(tmp_path))
    assert [one.references for one in questions_of(task)][2] == ("2", "2")
    assert isinstance(task.source, GroupedSource)
    assert [task.source.group(row) for row in range(3)] == [0, 1, 2]
    with pytest.raises(SourceError, match=r"allowed are config\.data\.limits\.group_bytes=10"):
        find_task("docvqa", str(tmp_path), limits=replace(LIMITS, group_bytes=10))
    file.rename(file.with_name("validation-00001-of-00002.parquet"))
    with pytest.raises(SourceError, match=r"validation-00000-of-00002\.parquet missing"):
        find_task("docvqa", str(tmp_path))


def test_options_of_a_choice_become_its_lines(tmp_path):
    item = Item("1", "Which?", (), tuple(OPTIONS))
    assert TASKS["ai2d"].protocols["own"].prompt(item) == f"Which?{LINES}{LETTER}"
    assert np.all([protocol.words for one in TASKS.values() for protocol in one.protocols.values()])
