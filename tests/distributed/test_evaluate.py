"""The evaluate verb in two real processes: the same files as in one, and what a kill left is not asked again."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.stand_in_sets import write_file
from tests.distributed.several import Several
from tests.e2e.verb import read_json, read_lines, verb
from tests.parity.goldens import GOLDEN, write_folder

pytestmark = pytest.mark.slow
ROWS = 7


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = write_folder("generate", tmp_path_factory.mktemp("model"))
    shutil.copytree(GOLDEN / "tokenizer" / "llama_legacy_false", folder, dirs_exist_ok=True)
    data = tmp_path_factory.mktemp("data")
    write_file(data / "val.json", data / "images", ROWS)
    rows = json.loads((data / "val.json").read_text())
    rows[3]["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    del rows[5]["image"]
    rows[5]["conversations"][0]["value"] = "What is 2 + 2?"
    (data / "val.json").write_text(json.dumps(rows))
    return [f"--model={folder}", f"--data={data / 'val.json'}", f"--images={data / 'images'}", "--max_new_tokens=4"]


def in_two(flags: list[str], folder: Path, devices: int = 1) -> str:
    line = [sys.executable, "-m", "deepstack_jax.evaluate", *flags, "--batch_size=4", f"--out={folder}"]
    with Several(line, 2, folder.with_suffix(".printed"), devices) as run:
        assert run.codes() == [0, 0], run.printed(0) + run.printed(1)
    assert "questions" not in run.printed(1), "the first process speaks for both"
    return run.printed(0)


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
