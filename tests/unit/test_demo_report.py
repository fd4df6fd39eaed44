"""The demo's report says what the runs say, shows it in pictures, and names the run that is missing."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.demo_report import COUNTS, LABELS, asked_box, box_of, load_runs, main, pick_pages, put_together
from deepstack_jax.config import build_config, to_stored
from deepstack_jax.data.encode.image import open_image
from deepstack_jax.data.open import open_source
from deepstack_jax.data.synthetic import CHANCE
from deepstack_jax.evaluate.results import flat_scores

REPOSITORY = Path(__file__).parents[2]
PAGES = 4
RIGHT = {"baseline": {"coarse"}, "dummy": {"coarse"}, "deepstack": {"fine", "coarse"}}
"""The kinds of question that each fake model answers; to the others it says "?"."""


def demo_config(argument: str):
    spec = importlib.util.spec_from_file_location("demo_under_report", REPOSITORY / "configs" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return build_config(module.get_config(argument))


def write_run(folder: Path, argument: str, right: set[str], pages: int = PAGES) -> dict:
    """A workdir as the train verb leaves it, of a model that answers the given kinds; returns its results, flat."""
    config = demo_config(argument)
    source = open_source(config.data, "validation")
    rows = []
    for index in range(pages):
        example = source[index]
        questions, answers = example.messages[::2], example.messages[1::2]
        for turn, (kind, question, answer) in enumerate(zip(example.info["kinds"], questions, answers, strict=True)):
            row = {"row": index, "turn": turn, "kind": kind, "question": question.text, "references": [answer.text]}
            scores = {"exact_match": float(kind in right)}
            rows.append(row | {"prediction": answer.text if kind in right else "?", "scores": scores})
    results = {
        "name": config.name,
        "steps": 30,
        "seconds_per_step": 0.125,
        "parameters": 1_000_000 + len(argument),
        "context_length": config.data.max_length,
        "visual_tokens": 16 if config.deepstack.stack == "none" else 80,
        "validation_loss": 1.0,
        "questions": len(rows),
        "scores": {"exact_match": {"score": len(right) / 2, "by_kind": {kind: float(kind in right) for kind in CHANCE}}},
    }
    steps = [{"step": step, "loss": 30 / step, "token_accuracy": step / 40} for step in (10, 20, 30)]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_stored(config)))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*steps, {"step": 30, "validation_loss": 1.0}])
    )
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return results | flat_scores(results)


@pytest.fixture
def demo(tmp_path):
    """Folder of three finished runs, and their results."""
    return tmp_path, {name: write_run(tmp_path / name, name, right) for name, right in RIGHT.items()}


def test_the_summary_holds_what_the_runs_measured(demo, capsys):
    folder, results = demo
    assert main([str(folder)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["baseline", "dummy", "deepstack"]
    copied = {"fine_exact_match", "coarse_exact_match", *COUNTS}
    for name, entry in summary.items():
        assert set(entry) == copied | {"chance", "coarse_chance"}
        assert {key: entry[key] for key in copied} == {key: results[name][key] for key in copied}
        assert (entry["chance"], entry["coarse_chance"]) == (CHANCE["fine"], CHANCE["coarse"])
    printed = capsys.readouterr().out
    rows = {label: next(line for line in printed.splitlines() if line.startswith(label)) for label in LABELS.values()}
    assert rows["low-res baseline"].split()[2:] == [
        "0.0%",
        "100.0%",
        "30",
        "0.12",
        "1.00M",
        str(results["baseline"]["context_length"]),
        "16",
    ]
    assert rows["DeepStack"].split()[1:3] == ["100.0%", "100.0%"]
    assert "blind by design" in printed
    assert "cannot be seen in the low-res view by construction" in printed
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("name", ["curves.png", "pages.png"])
def test_the_pictures_show_something(demo, name):
    folder, _ = demo
    assert main([str(folder)]) == 0
    with Image.open(folder / name) as image:
        pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    assert 800 <= width <= 2000
    assert 600 <= height <= 2000
    assert 0.02 < (pixels < 250).any(axis=2).mean() < 0.9
    assert len(np.unique(pixels @ np.array([1, 256, 65536]))) > 50, "more than a few colours"


def test_a_held_out_page_is_left_to_be_asked_about(demo):
    """As README does: the first held-out page, every pixel of it."""
    folder, _ = demo
    assert main([str(folder)]) == 0
    example = open_source(demo_config("deepstack").data, "validation")[0]
    with Image.open(folder / "page.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(open_image(example.images[0]).convert("RGB")))


def test_answers_decide_the_marks_and_the_pages_do_not_move(demo):
    """Two reports agree to the bit but for the answers of the model that changed."""
    folder, _ = demo
    main([str(folder)])
    first = np.asarray(Image.open(folder / "pages.png").convert("RGB")).astype(int)
    main([str(folder)])
    np.testing.assert_array_equal(first, np.asarray(Image.open(folder / "pages.png").convert("RGB")))
    rows = [json.loads(line) for line in (folder / "deepstack" / "predictions.jsonl").read_text().splitlines()]
    wrong = [row | {"prediction": "?", "scores": {"exact_match": 0.0}} for row in rows]
    (folder / "deepstack" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    main([str(folder)])
    second = np.asarray(Image.open(folder / "pages.png").convert("RGB")).astype(int)
    changed = (first != second).any(axis=2)
    assert changed.any()
    assert not changed[:, : first.shape[1] * 2 // 3].any(), "the views stay as they were"
    for picture, greener in ((first, True), (second, False)):
        red, green, _ = np.moveaxis(picture[changed], -1, 0)
        assert ((green - red > 60).sum() > (red - green > 60).sum()) == greener


def test_the_first_pages_are_shown_as_the_models_get_them(demo):
    folder, _ = demo
    pages = pick_pages(load_runs(folder))
    source = open_source(demo_config("deepstack").data, "validation")
    assert len(pages) == 3
    for index, page in enumerate(pages):
        example = source[index]
        (image,) = example.images
        assert isinstance(image, np.ndarray)
        np.testing.assert_array_equal(page.high, image, "the crops keep every pixel")
        means = image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        np.testing.assert_array_equal(page.low, means, "the low-res view is the area mean")
        assert page.blind
        assert [row["kind"] for row in page.asked] == ["fine", "coarse"]
        for row in page.asked:
            assert row["turn"] == example.info["kinds"].index(row["kind"]), "the first of its kind"
        digit, shade = (divmod(asked_box(row), 4) for row in page.asked)
        assert page.asked[0]["references"] == [str(example.info["digits"][digit])]
        same_shade = example.info["shades"] == example.info["shades"][shade]
        grays = page.low[::16, ::16, 0]
        np.testing.assert_array_equal(grays == box_of(page.low, asked_box(page.asked[1]))[0, 0, 0], same_shade)
        assert [page.said[0]["deepstack"]["prediction"]] == page.asked[0]["references"]
        assert page.said[0]["baseline"]["prediction"] == "?"


def test_other_runs_become_further_rows(demo, capsys):
    folder, _ = demo
    results = write_run(folder / "legible_baseline", "baseline,legible", {"fine", "coarse"}, pages=2)
    write_run(folder / "string", "string", {"coarse"})
    (folder / "string" / "results.json").unlink()
    assert main([str(folder)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["baseline", "dummy", "deepstack", "legible_baseline"]
    assert summary["legible_baseline"]["parameters"] == results["parameters"]
    printed, errors = capsys.readouterr()
    assert "\nlegible baseline " in printed
    assert errors.startswith("left out: run string is not finished")
    assert f"--config=configs/demo.py:string --workdir={folder / 'string'}" in errors


def test_legible_pages_are_not_called_blind(tmp_path, capsys):
    for name in LABELS:
        write_run(tmp_path / name, f"{name},legible", {"fine", "coarse"})
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "this is not the blind task" in printed
    assert "by construction" not in printed


@pytest.mark.parametrize("missing", ["config.json", "results.json", "metrics.jsonl", "predictions.jsonl"])
def test_an_unfinished_run_is_named_with_the_command_that_finishes_it(demo, capsys, missing):
    folder, _ = demo
    (folder / "dummy" / missing).unlink()
    assert main([str(folder)]) == 1
    errors = capsys.readouterr().err
    assert errors == (
        f"error: run dummy is not finished: {folder / 'dummy' / missing} does not exist; finish it with: "
        f"python -m deepstack_jax.train --config=configs/demo.py:dummy --workdir={folder / 'dummy'}\n"
    )
    assert not (folder / "summary.json").exists(), "nothing is written of half a comparison"


def test_an_empty_folder_asks_for_the_first_run(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "run baseline is not finished" in capsys.readouterr().err


def spoil_results(folder: Path) -> None:
    (folder / "results.json").write_text('{"steps": 3')


def spoil_measures(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    del results["scores"]["exact_match"]["by_kind"]["fine"]
    (folder / "results.json").write_text(json.dumps(results))


def spoil_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")


def spoil_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sead": 0}))


def spoil_questions(folder: Path) -> None:
    rows = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_text("".join(rows[:-1]))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_results, "run dummy in"),
        (spoil_measures, "lacks fine_exact_match"),
        (spoil_metrics, "metrics.jsonl holds nothing to show"),
        (spoil_config, "unknown key config.sead"),
        (spoil_questions, "were not asked the same held-out questions"),
    ],
)
def test_a_run_that_does_not_fit_is_one_line(demo, capsys, spoil, said):
    folder, _ = demo
    spoil(folder / "dummy")
    assert main([str(folder)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert said in errors


def test_runs_of_another_generator_are_refused(demo, capsys):
    """The picture would show one page and the answers to another."""
    folder, _ = demo
    for name in LABELS:
        path = folder / name / "predictions.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[0]["references"] = ["something else"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(folder)]) == 1
    assert "the generator changed since" in capsys.readouterr().err


def test_crops_are_put_together_row_major():
    picture = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)
    crops = np.stack([picture[y : y + 2, x : x + 2] for y in (0, 2) for x in (0, 2, 4)])
    np.testing.assert_array_equal(put_together(crops, (2, 3)), picture)


@pytest.mark.parametrize(("question", "box"), [("<image>\ndigit?07", 7), ("shade b15", 15), ("digit 0", 0)])
def test_the_number_that_ends_a_question_is_the_box(question, box):
    assert asked_box({"question": question}) == box


@pytest.mark.parametrize("question", ["digit?16", "which digit", ""])
def test_a_question_about_no_box_is_an_error(question):
    with pytest.raises(ValueError, match=r"does not end in a box number 0\.\.15"):
        asked_box({"question": question})


def test_every_picture_of_the_documents_is_shown_somewhere():
    root = Path(__file__).parents[2]
    text = "".join(file.read_text() for file in (root / "README.md", *(root / "docs").glob("*.md")))
    pictures = [picture.name for picture in (root / "docs" / "images").iterdir()]
    assert [name for name in pictures if f"images/{name})" not in text] == []
