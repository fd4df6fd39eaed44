"""Two evaluations side by side: known numbers, another protocol named, and a page that asks nobody for anything."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepstack_jax.atomic import write_json, write_lines
from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate.compare import compare, comparison_table, paired_bootstrap
from deepstack_jax.evaluate.compare_page import render_page
from deepstack_jax.evaluate.pictures import data_uri
from deepstack_jax.evaluate.tasks import Prediction
from deepstack_jax.printing import Console

PROTOCOL = {"decoding": "greedy", "template": "v1", "image": {"mode": "pad", "size": 336}, "checkpoint": "01"}


def written(folder: Path, scores: list[float], name: str = "a", kinds: tuple[str, ...] = ("all",), **protocol: Any) -> str:
    """An evaluation of one's own rows with these scores, of these kinds in turn."""
    lines = [
        Prediction(
            f"id{row}",
            row,
            0,
            kinds[row % len(kinds)],
            f"Question {row}?",
            ["yes"],
            f"answer {score}",
            1,
            {"exact_match": score},
        )
        for row, score in enumerate(scores)
    ]
    known = {"exact_match": {"score": float(np.mean(scores)), "protocol": "equal"}}
    results = {"name": name, "data": "val.json", "questions": len(lines), "rows": len(lines), "bad_examples": 0}
    folder.mkdir(parents=True)
    write_lines(folder / "predictions.jsonl", map(asdict, lines))
    write_json(folder / "results.json", results | {"protocol": PROTOCOL | protocol, "scores": known})
    return str(folder)


def as_task(folder: Path, **tasks: str) -> str:
    """Evaluations as tasks of one."""
    parts = {}
    for title, path in tasks.items():
        parts[title] = json.loads((Path(path) / "results.json").read_text())
        Path(path).rename((folder.mkdir(exist_ok=True), folder / title)[1])
    write_json(folder / "results.json", {"name": folder.name, "tasks": parts})
    return str(folder)


def test_groups_of_kinds_have_intervals_too(tmp_path):
    """Subjects of MMMU, and the disciplines that they belong to."""
    kinds = ("Art", "Music", "Physics")
    a, b = (written(tmp_path / name, scores, kinds=kinds) for name, scores in (("a", [0.0, 1, 0]), ("b", [1.0, 1, 0])))
    (found,) = compare(a, b)
    gains = {name: interval.difference for name, interval in found.intervals.items()}
    assert gains == {
        "exact_match": pytest.approx(1 / 3),
        "Art_and_Design_exact_match": 0.5,
        "Science_exact_match": 0,
        "Art_exact_match": 1,
        "Music_exact_match": 0,
        "Physics_exact_match": 0,
    }


def test_known_numbers(tmp_path):
    a, b = written(tmp_path / "a", [0, 1, 0, 1, 1]), written(tmp_path / "b", [1, 1, 0, 0, 1, 1, 1], "b")
    (found,) = compare(a, f"{b}/results.json")
    assert list(found.scores()) == [("exact_match", 0.6, pytest.approx(5 / 7))]
    interval = found.intervals["exact_match"]
    assert (interval.difference, interval.worse, interval.better, len(found.pairs)) == (0, 1, 1, 5)
    assert found.warnings == ["2 questions of the second alone, which the interval is not of"]


@pytest.mark.parametrize(("share", "sure"), [(0.04, False), (0.2, True)])
def test_the_interval_is_that_of_the_normal_approximation(share, sure):
    """Efron's percentile interval of a mean of many is mean +- 1.96 standard errors."""
    gains = np.zeros(400)
    gains[: int(share * 400)] = 1
    gains[-10:] = -1
    found = paired_bootstrap(gains.tolist())
    error = 1.96 * gains.std() / 20
    assert found.difference == gains.mean()
    assert [found.low, found.high] == pytest.approx([gains.mean() - error, gains.mean() + error], abs=0.15 * error)
    assert found.sure == sure
    assert paired_bootstrap(gains.tolist()) == found, "the same in every run"


def test_another_protocol_is_named_and_another_checkpoint_is_not(tmp_path):
    a = written(tmp_path / "a", [0, 1])
    b = written(tmp_path / "b", [1, 1], template="chatml", checkpoint="02", image={"mode": "pad", "size": 224})
    (found,) = compare(a, b)
    assert found.warnings == ["another protocol: template: v1 | chatml", "another protocol: image.size: 336 | 224"]
    assert compare(a, a)[0].warnings == []
    assert "another protocol: template: v1 | chatml" in render_page([found], {})


def test_tasks_that_both_have_are_compared(tmp_path):
    a = as_task(tmp_path / "a", pope=written(tmp_path / "1", [0, 1]), gqa=written(tmp_path / "2", [1]))
    b = as_task(tmp_path / "b", pope=written(tmp_path / "3", [1, 1]))
    (found,) = compare(a, b)
    assert (found.title, found.intervals["exact_match"].difference) == ("pope", 0.5)
    assert found.warnings == ["only one of them has gqa, which is left out"]
    with pytest.raises(ConfigError, match="expected a task of both"):
        compare(as_task(tmp_path / "c", gqa=written(tmp_path / "4", [1])), b)


def test_the_table_has_both(tmp_path, capsys):
    a, b = written(tmp_path / "a", [0] * 60), written(tmp_path / "b", [1] * 60, "b")
    Console(width=80).print(comparison_table(compare(a, b)))
    printed = capsys.readouterr().out
    assert re.search(r"exact_match.*0\.0000.*1\.0000.*\+1\.0000.*0 : 60.*\n.*\+1\.000 to \+1\.000", printed)


def test_a_group_has_an_interval_of_its_own(tmp_path):
    a, b = written(tmp_path / "a", [0, 0, 1, 1]), written(tmp_path / "b", [1, 1, 1, 0], "b")
    for folder in (a, b):
        file = Path(folder) / "predictions.jsonl"
        lines = [json.loads(line) | {"kind": "odd" if at % 2 else "even"} for at, line in enumerate(file.open())]
        write_lines(file, lines)
    (found,) = compare(a, b)
    told = {name: (one.difference, one.worse, one.better) for name, one in found.intervals.items()}
    assert told == {"exact_match": (0.25, 1, 2), "even_exact_match": (0.5, 0, 1), "odd_exact_match": (0.0, 1, 1)}


@pytest.mark.parametrize("damage", ["gone", "cut", "list", "predictions"])
def test_what_cannot_be_compared_is_one_line(damage, tmp_path):
    a = written(tmp_path / "a", [1])
    file = tmp_path / "a" / ("predictions.jsonl" if damage == "predictions" else "results.json")
    if damage in ("gone", "predictions"):
        file.unlink()
    else:
        file.write_text('{"name": ' if damage == "cut" else "[1]")
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        compare(a, a)


def test_the_page_needs_no_other_file_and_obeys_no_answer(tmp_path):
    a, b = written(tmp_path / "a", [0, 1, 1]), written(tmp_path / "b", [1, 1, 0], "<script>alert(1)</script>")
    page = render_page(compare(a, b), {"": lambda row: [data_uri(Image.new("RGB", (4, 4), (row, 0, 0)))]})
    assert "<script>" not in page
    assert page.count("<article") == page.count("data:image/webp") == 2
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert 'class="panel b"' in page
    assert 'class="panel a"' in page
    assert "Question 1?" not in page, "both have the same answer there"
