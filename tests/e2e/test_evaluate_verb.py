"""The evaluate verb from the command line: files, scores, limits, bad rows, and what it says to a mistake."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import deepstack_jax as dsx
from benchmarks.stand_in_sets import write_file
from deepstack_jax.evaluate.benchmarks.registry import TASKS
from tests.e2e.verb import ENVIRONMENT, REPOSITORY, TIMEOUT, contents, read_json, read_lines, verb
from tests.parity.goldens import GOLDEN, write_folder
from tests.unit.made_benchmarks import MADE

ROWS = 5
HARD_ID = "\ud800\u2028\x1b[2J\0"


def evaluate(*flags: str) -> subprocess.CompletedProcess[str]:
    return verb("evaluate", *flags)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The golden checkpoint "generate" with its tokenizer."""
    folder = write_folder("generate", tmp_path_factory.mktemp("model"))
    shutil.copytree(GOLDEN / "tokenizer" / "llama_legacy_false", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Rows with images, one of them with a second question, and one of text; the first has a hard id."""
    write_file(tmp_path / "data" / "val.json", tmp_path / "data" / "images", ROWS)
    rows = json.loads((tmp_path / "data" / "val.json").read_text())
    rows[1]["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    rows[0]["id"] = HARD_ID
    del rows[3]["image"]
    rows[3]["conversations"][0]["value"] = "What is 2 + 2?"
    (tmp_path / "data" / "val.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def test_every_answered_turn_is_asked_and_scored(model, data, tmp_path):
    flags = (f"--model={model}", f"--data={data / 'val.json'}", f"--images={data / 'images'}", "--max_new_tokens=6")
    done = evaluate(*flags, "--batch_size=4", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    lines, results = read_lines(tmp_path / "out" / "predictions.jsonl"), read_json(tmp_path / "out" / "results.json")
    assert [(line["row"], line["turn"]) for line in lines] == [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0)]
    assert lines[0]["id"] == HARD_ID.replace("\ud800", r"\ud800")
    assert [lines[2][key] for key in ("question", "references")] == ["Sure?", ["Yes."]]
    assert (results["rows"], results["questions"], results["bad_examples"]) == (ROWS, 6, 0)
    assert results["protocol"]["template"] == "v1"
    assert results["protocol"]["max_new_tokens"] == 6
    for name, entry in results["scores"].items():
        assert entry["score"] == pytest.approx(sum(line["scores"][name] for line in lines) / 6)
        assert name in done.stdout
    for part in ("case and punctuation count", "0 below 0.5", "greedy", "max_new_tokens 6", "template v1"):
        assert done.stdout.count(part) >= 1
    lmm, rows = dsx.load(model), json.loads((data / "val.json").read_text())
    picture = str(data / "images" / rows[0]["image"])
    assert lines[0]["prediction"] == lmm.generate([picture], lines[0]["question"], max_new_tokens=6)
    assert lines[4]["prediction"] == lmm.generate(None, "What is 2 + 2?", max_new_tokens=6)


def test_a_configuration_names_the_validation_data(model, data):
    config = ("--config=configs/receipts.py", f"--config.data.root={data}", "--config.data.images=images")
    done = evaluate(f"--model={model}", *config, "--config.evaluation.max_new_tokens=3", "--limit=2")
    assert done.returncode == 0, done.stderr
    assert "receipts-deepstack: val.json: 3 questions of 2 rows, 0 left out" in done.stdout
    assert "max_new_tokens 3" in done.stdout


def test_a_limit_of_the_data_is_raised_on_the_command_line(model, data):
    flags = (
        f"--model={model}",
        f"--data={data / 'val.json'}",
        f"--images={data / 'images'}",
        "--max_new_tokens=2",
        "--limit=1",
    )
    refused = evaluate(*flags, "--config.data.limits.text_bytes=50")
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert "config.data.limits.text_bytes" in refused.stderr
    assert evaluate(*flags, "--config.data.limits.text_bytes=100_000").returncode == 0


def test_rows_that_cannot_be_asked_stop_it_before_anything_is_written(model, data, tmp_path):
    (data / "images" / "val2.jpg").unlink()
    done = evaluate(
        f"--model={model}", f"--data={data / 'val.json'}", f"--images={data / 'images'}", f"--out={tmp_path / 'out'}"
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "1 of 5 rows cannot be asked" in done.stderr
    assert "val2.jpg" in done.stderr
    assert "val2.jpg" in done.stdout
    assert contents(tmp_path / "out") == {}


MISTAKES = {
    "another suffix in the table": (
        ["--model=MODEL", "--tasks=docvqa", "--data=DATA", "--suffix=", "--into=docs/results.md"],
        "and --suffix asks otherwise; drop one of the two",
    ),
    "no model": ([], "--model is missing; e.g. --model=DIR"),
    "no data": (
        ["--model=MODEL", "--limit=3"],
        "--config=FILE whose validation data is asked, or neither with the workdir",
    ),
    "nothing there": (["--model=MODEL", "--data=/nowhere/val.json"], "/nowhere/val.json does not exist"),
    "key": (["--model=MODEL", "--data=DATA", "--config.data.limts.text_bytes=5"], "unknown key --config.data.limts"),
    "template": (["--model=MODEL", "--data=DATA", "--template=v9"], "unknown template 'v9'; nearest valid:"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case, model, data):
    flags, said = MISTAKES[case]
    done = evaluate(*(flag.replace("MODEL", str(model)).replace("DATA", str(data / "val.json")) for flag in flags))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_help_has_examples():
    done = evaluate("--help")
    assert done.returncode == 0
    assert "python -m deepstack_jax.evaluate --model=" in done.stdout


KILLED_AT_THE_THIRD_BATCH = """
import os, runpy, signal
from deepstack_jax.evaluate.checkpoint import EvalCheckpoint

whole, kept = EvalCheckpoint.add, []

def add(self, results):
    whole(self, results)
    kept.append(results)
    if len(kept) == 3:
        os.truncate(self.file, self.file.stat().st_size - 20)
        os.kill(os.getpid(), signal.SIGKILL)

EvalCheckpoint.add = add
runpy.run_module("deepstack_jax.evaluate", run_name="__main__")
"""


def test_killed_within_a_line_it_goes_on_to_the_same_bytes(model, data, tmp_path):
    flags = (f"--model={model}", f"--data={data / 'val.json'}", f"--images={data / 'images'}", "--max_new_tokens=6")
    flags = (*flags, "--batch_size=2")
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_AT_THE_THIRD_BATCH, *flags, f"--out={out}"]
    killed = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, timeout=TIMEOUT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = out.iterdir()
    assert (left.suffix, left.read_text().count("\n")) == (".unfinished", 2)
    again, alone = evaluate(*flags, f"--out={out}"), evaluate(*flags, f"--out={tmp_path / 'alone'}")
    assert again.returncode == alone.returncode == 0, again.stderr
    assert "goes on after 4 questions answered before" in again.stdout
    assert "questions 6/6 left 0s" in again.stdout
    assert contents(out) == contents(tmp_path / "alone")
    assert contents(out).keys() == {"predictions.jsonl", "results.json"}


def test_tasks_are_asked_scored_and_written_each_in_its_folder(model, tmp_path):
    for name in ("seed", "mmvet"):
        MADE[name, "parquet"](tmp_path / "root" / TASKS[name].folder)
    flags = (f"--model={model}", "--tasks=seed:likelihood,mmvet", f"--data={tmp_path / 'root'}", "--max_new_tokens=3")
    done = evaluate(*flags, f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    results = read_json(tmp_path / "out" / "results.json")
    assert results["tasks"].keys() == {"seed:likelihood", "mmvet"}
    assert results["tasks"]["mmvet"] == read_json(tmp_path / "out" / "mmvet" / "results.json")
    assert {line["prediction"] for line in read_lines(tmp_path / "out" / "seed-likelihood" / "predictions.jsonl")} <= set(
        "ABCD"
    )
    assert "likeliest letter" in results["tasks"]["seed:likelihood"]["protocol"]["decoding"]
    files = {file.name for file in (tmp_path / "out" / "mmvet").iterdir()}
    assert len(files) > 2, "and what its judge reads"
    assert "none here: see the files for its server or judge" in done.stdout


def test_two_are_compared(model, data, tmp_path):
    flags = (f"--model={model}", f"--data={data / 'val.json'}", f"--images={data / 'images'}", "--limit=2")
    for name, most in (("a", 2), ("b", 3)):
        assert evaluate(*flags, f"--max_new_tokens={most}", f"--out={tmp_path / name}").returncode == 0
    folders = (str(tmp_path / "a"), str(tmp_path / "b"))
    done = evaluate("--compare", *folders, *flags[1:3], f"--out={tmp_path / 'page'}")
    assert done.returncode == 0, done.stderr
    assert "warning: another protocol: max_new_tokens: 2 | 3" in done.stdout
    assert "95% interval" in done.stdout
    assert "data:image/webp" in (tmp_path / "page" / "compare.html").read_text()
    refused = evaluate("--compare", folders[0], str(tmp_path / "gone"))
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "give a folder that `evaluate --out=DIR` wrote" in refused.stderr
