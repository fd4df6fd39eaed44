"""Lines of receipts as training data: what a line is, which receipts are held out, and that the same seed draws the same."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks.study.lines import DRAWN, FONTS, HEIGHT, HELD_OUT, LINES, LONGEST, TRAIN, WIDTH, Piece, lines_of, main
from benchmarks.study.table import LINES as STUDY
from benchmarks.study.table import SMOLLM2
from benchmarks.study.train import character_errors, read_run
from benchmarks.tiny_recipe import write_weights
from deepstack_jax.data.open import open_files
from deepstack_jax.train.checkpoint.init_weights import find_weights
from deepstack_jax.weights.load import absent_leaves
from tests.e2e.verb import verb
from tests.unit.test_study import tiny_job


@pytest.fixture(scope="module")
def receipts(tmp_path_factory):
    """Three receipts of seven lines, the third of two pieces; one of the receipts is held out."""
    folder = tmp_path_factory.mktemp("receipts")
    (folder / "images").mkdir()
    boxes = {}
    for name in ("001", "002", "003"):
        Image.effect_noise((200, 300), 40).save(folder / "images" / f"{name}.jpg")
        boxes[name] = [[10, 20 + 30 * at, 150, 40 + 30 * at, f"LINE {at} OF {name}"] for at in range(7)]
        boxes[name].append([160, 82, 190, 99, "SECRET" if name == "003" else "4.50"])
    (folder / "boxes.json").write_text(json.dumps(boxes))
    (folder / "val.json").write_text(json.dumps([{"image": "images/003.jpg"}]))
    return folder


def write(receipts, out, *flags):
    assert main([f"--receipts={receipts}", f"--out={out}", "--drawn=4", *flags]) == 0
    return {file: json.loads((out / file).read_text()) for file in (TRAIN, HELD_OUT, DRAWN)}


def test_pieces_beside_each_other_are_one_line():
    boxes = [[100, 12, 130, 30, "9.90"], [10, 10, 90, 32, "TEA"], [10, 40, 90, 60, "TOTAL"], [95, 41, 130, 62, "9.90"]]
    assert [[piece.text for piece in line] for line in lines_of([Piece(*box) for box in boxes])] == [
        ["TEA", "9.90"],
        ["TOTAL", "9.90"],
    ]


def test_every_row_is_a_picture_with_its_lines(receipts, tmp_path):
    files = write(receipts, tmp_path)
    assert {row["id"] for row in files[TRAIN]} == {f"{name}_{first}" for name in ("001", "002") for first in (0, 3)}
    assert {row["id"] for row in files[HELD_OUT]} == {"003_0", "003_3"}
    row = next(row for row in files[TRAIN] if row["id"] == "001_0")
    turns = [turn["value"] for turn in row["conversations"]]
    read = {question[-1]: text for question, text in zip(turns[::2], turns[1::2], strict=True)}
    assert read == {"1": "LINE 0 OF 001", "2": "LINE 1 OF 001", "3": "LINE 2 OF 001 4.50"}
    assert turns[0].startswith("<image>\nline ")
    for rows in files.values():
        for row in rows:
            assert Image.open(tmp_path / row["image"]).size == (WIDTH, HEIGHT)
            texts = [turn["value"] for turn in row["conversations"][1::2]]
            assert len(texts) == LINES
            assert all(0 < len(text) <= LONGEST for text in texts)
    source = open_files(str(tmp_path / DRAWN), str(tmp_path))
    assert len(source) == 4
    assert len(source[0].messages) == 2 * LINES


def test_drawn_lines_are_a_function_of_the_seed_and_never_of_held_out_words(receipts, tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    rows, again = write(receipts, one)[DRAWN], write(receipts, same)[DRAWN]
    assert rows == again
    assert rows != write(receipts, other, "--seed=1")[DRAWN]
    pictures = [[np.asarray(Image.open(out / row["image"])) for row in rows] for out in (one, same)]
    np.testing.assert_array_equal(*pictures)
    assert "SECRET" not in json.dumps(write(receipts, tmp_path / "more", "--drawn=40")[DRAWN])
    assert len({array.tobytes() for array in pictures[0]}) == 4


def test_what_is_there_is_not_written_again(receipts, tmp_path):
    write(receipts, tmp_path)
    (tmp_path / DRAWN).write_text("[]")
    assert write(receipts, tmp_path)[DRAWN] == []


def test_a_folder_without_receipts_is_said_in_one_line(tmp_path, capsys):
    assert main([f"--receipts={tmp_path}", f"--out={tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_fonts_are_those_with_letters():
    names = ["DejaVuSans.ttf", "DejaVuSansMono-Bold.ttf", "STIXGeneralBol.ttf", "STIXSizOneSymReg.ttf", "cmsy10.ttf"]
    assert [bool(FONTS.fullmatch(name)) for name in names] == [True, True, True, False, False]


@pytest.mark.slow
def test_a_finished_workdir_is_read(receipts, tmp_path):
    """Two steps of a tiny model on lines: the curve is that of the held-out ones."""
    write(receipts, tmp_path / "data")
    changes = {"data.root": str(tmp_path / "data"), "evaluation.every": 1, "evaluation.max_new_tokens": 2}
    study = replace(STUDY, needs={str(tmp_path / "data"): ""})
    job = tiny_job(study, "lines_deepstack", tmp_path, **changes)
    workdir = tmp_path / job.folder
    done = verb("train", *job.command(workdir)[2:])
    assert done.returncode == 0, done.stderr
    run = read_run(job, workdir, 1.0)
    assert job.is_of(run)
    assert run.scores["exact_match"] <= 1.0
    assert run.scores["character_errors"] == pytest.approx(character_errors(workdir), abs=1e-4)
    assert run.scores["character_errors"] > 0.5, "after two steps it cannot read"
    assert [step for step, _ in run.curve] == [1, 2]
    assert run.visual == 5 * 64
    (tmp_path / "data" / DRAWN).write_text("[]")
    assert not tiny_job(study, "lines_deepstack", tmp_path, **changes).is_of(run)


def over_parts(folder):
    """A job of DeepStack-L over a tiny bare language model and tower, which are written too."""
    parts = {"train.weights": "llm", "train.tower": "clip", "data.tokenizer": "llm", "data.root": "data"}
    changes = {key: str(folder / name) for key, name in parts.items()}
    changes |= {"decoder.vocab_size": 300, "data.max_length": 400, "evaluation.every": 1, "evaluation.max_new_tokens": 2}
    study = replace(SMOLLM2, needs={str(folder / name): "" for name in dict.fromkeys(parts.values())})
    job = tiny_job(study, "smollm2_deepstack", folder, **changes)
    write_weights(folder, job.config, job.config.data.template)
    return job


def test_a_language_model_and_a_tower_are_begun_with_and_only_the_projector_is_drawn(tmp_path):
    (tmp_path / "data").mkdir()
    job = over_parts(tmp_path)
    found = find_weights(job.config)
    assert {path.partition("/")[0] for path in absent_leaves(found.tensors, job.config)} == {"projector"}
    before = job.data
    with (tmp_path / "clip" / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert replace(job).data != before, "another tower is another beginning"


@pytest.mark.slow
def test_a_run_over_a_language_model_is_read(receipts, tmp_path):
    """Adapters, projector and tower learn; the words are those of the model's own template."""
    write(receipts, tmp_path / "data")
    job = over_parts(tmp_path)
    workdir = tmp_path / job.folder
    done = verb("train", *job.command(workdir)[2:])
    assert done.returncode == 0, done.stderr
    run = read_run(job, workdir, 1.0)
    assert job.is_of(run)
    assert [step for step, _ in run.curve] == [1, 2]
    assert run.scores["character_errors"] > 0.5
    table = {line.split("│")[1].strip() for line in done.stdout.splitlines() if line.count("│") == 6}
    assert {"lora", "projector", "tower", "frozen"} <= table


def test_character_errors_are_edits_per_character(tmp_path):
    rows = [{"prediction": "abc", "references": ["abc"]}, {"prediction": "abx ", "references": ["abcdefg"]}]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert character_errors(tmp_path) == 5 / 10
