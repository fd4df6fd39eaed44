"""The evaluate verb in several real processes: the same files as in one, and what a kill left is not asked again."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.stand_in_sets import write_file
from tests.distributed.several import Several
from tests.e2e.verb import read_json, read_lines, verb
from tests.parity.goldens import GOLDEN, write_folder
from tests.unit.made_benchmarks import MADE, as_json, images

pytestmark = pytest.mark.slow
ROWS = 7


MANY = 600  # questions, so that a kill after the first batches comes before the last
TASKS = ("docvqa", "ai2d:likelihood", "mmmu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = write_folder("generate", tmp_path_factory.mktemp("model"))
    shutil.copytree(GOLDEN / "tokenizer" / "llama_legacy_false", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def flags(model, tmp_path_factory) -> list[str]:
    data = tmp_path_factory.mktemp("data")
    write_file(data / "val.json", data / "images", ROWS)
    rows = json.loads((data / "val.json").read_text())
    rows[3]["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    del rows[5]["image"]
    rows[5]["conversations"][0]["value"] = "What is 2 + 2?"
    (data / "val.json").write_text(json.dumps(rows))
    return [f"--model={model}", f"--data={data / 'val.json'}", f"--images={data / 'images'}", "--max_new_tokens=4"]


@pytest.fixture(scope="module")
def benchmarks(model, tmp_path_factory) -> list[str]:
    """Three tasks: one of many questions about one picture, letters by likelihood, and tables of several pictures."""
    root = tmp_path_factory.mktemp("benchmarks")
    for name, form in (("ai2d", "json"), ("mmmu", "parquet")):
        MADE[name, form](root / name)
    shown = {"image": "documents/0.png", "docId": 1, "data_split": "val", "answers": ["yes"]}
    rows = [shown | {"questionId": at, "question": "So " * (at % 5) + f"is it {at}?"} for at in range(MANY)]
    as_json(root / "docvqa", "val_v1.0_withQT.json", {"dataset_split": "val", "data": rows})
    images(root / "docvqa", "documents/0.png")
    return [f"--model={model}", f"--tasks={','.join(TASKS)}", f"--data={root}", "--max_new_tokens=4", "--suffix="]


def several(flags: Sequence[str], folder: Path, count: int, devices: int = 1) -> Several:
    line = [sys.executable, "-m", "deepstack_jax.evaluate", *flags, "--batch_size=4", f"--out={folder}"]
    return Several(line, count, folder.with_suffix(".printed"), devices)


def in_two(flags: Sequence[str], folder: Path, devices: int = 1, count: int = 2) -> str:
    with several(flags, folder, count, devices) as run:
        assert run.codes() == [0] * count, "".join(map(run.printed, range(count)))
    assert all("questions" not in run.printed(other) for other in range(1, count)), "the first process speaks for all"
    return run.printed(0)


@pytest.fixture(scope="module")
def alone(benchmarks, tmp_path_factory) -> Path:
    """What one process answers."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    done = verb("evaluate", *benchmarks, "--batch_size=4", f"--out={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_tasks(ours: Path, theirs: Path) -> None:
    """The same scores, answers and files; margins but for rounding."""
    for title in TASKS:
        one, two = (folder / title.replace(":", "-") for folder in (ours, theirs))
        assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
        assert without_margins(one) == without_margins(two)
        assert read_json(one / "results.json") == read_json(two / "results.json")
        assert len(without_margins(one)) == (MANY if title == "docvqa" else 3)
    assert read_json(ours / "results.json") == read_json(theirs / "results.json")


def without_margins(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "margin"} for line in read_lines(folder / "predictions.jsonl")]


def test_two_processes_give_the_same_files_as_one(flags, tmp_path):
    assert verb("evaluate", *flags, f"--out={tmp_path / 'one'}").returncode == 0
    in_two(flags, tmp_path / "two", devices=2)
    one, two = tmp_path / "one", tmp_path / "two"
    assert without_margins(two) == without_margins(one)
    assert len(without_margins(one)) == ROWS + 1
    margins = [[line["margin"] for line in read_lines(folder / "predictions.jsonl")] for folder in (one, two)]
    assert margins[0] == pytest.approx(margins[1], rel=1e-3, abs=1e-4)
    assert read_json(one / "results.json") == read_json(two / "results.json")
    assert {file.name for file in two.iterdir()} == {"predictions.jsonl", "results.json"}


@pytest.mark.parametrize(("count", "devices", "mesh"), [(2, 1, ()), (2, 2, ("--config.mesh.tensor=4",))])
def test_tasks_over_several_processes(count, devices, mesh, benchmarks, alone, tmp_path):
    """With four devices along tensor both processes hold the same rows, and one of them speaks for both."""
    in_two([*benchmarks, *mesh], tmp_path / "out", devices, count)
    assert_same_tasks(tmp_path / "out", alone)


@pytest.mark.parametrize(("victim", "after"), [(0, 2), (1, 2), (1, 1), (1, 4)])
def test_a_killed_process_costs_no_answer_whatever_number_goes_on(victim, after, benchmarks, alone, tmp_path):
    folder = tmp_path / "out"
    with several(benchmarks, folder, 2) as run:
        run.wait_for(f"/{MANY} left")
        run.send(victim, signal.SIGKILL)
        codes = run.codes()
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] != 0
    (unfinished,) = (folder / "docvqa").glob("*.unfinished")
    kept = unfinished.read_text().count('"questionId"')
    assert 0 < kept < MANY
    printed = in_two(benchmarks, folder, count=after)
    (told,) = re.findall(r"goes on after (\d+) questions", printed)
    assert int(told) >= kept - 4  # a line may have been cut short
    assert_same_tasks(folder, alone)
