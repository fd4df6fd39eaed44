"""The train verb from the command line to its files: runs, stops, resumes, real images, and what it says to a mistake."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from deepstack_jax.train.run.lock import lock_workdir
from tests.e2e.receipts import draw_receipts
from tests.e2e.verb import (
    ENVIRONMENT,
    REPOSITORY,
    TIMEOUT,
    assert_same_bytes,
    command,
    contents,
    losses,
    read_json,
    read_lines,
    saved_state,
    train,
    train_until,
    verb,
)

STEPS = 8
DEMO = {
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 1,
    "data.synthetic.questions": 4,
    "data.max_length": 24,
    "evaluation.every": 3,
    "evaluation.examples": 4,
    "evaluation.batch_size": 16,
    "profile.steps": "4:5",
}
RECEIPTS = {
    "train.steps": 2,
    "train.batch_size": 2,
    "train.log_every": 1,
    "data.max_length": 400,  # the longest of drawn ones has 320
    "image.size": 32,
    "vision.width": 32,
    "vision.layers": 2,
    "vision.mlp": 32,
    "decoder.width": 32,
    "decoder.head_dim": 16,
    "decoder.mlp": 32,
    "evaluation.every": 1,
    "evaluation.examples": 2,
    "evaluation.batch_size": 4,
    "evaluation.max_new_tokens": 4,
}
REAL = REPOSITORY.parent / "shared" / "data" / "receipts"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The workdir of a demo run of STEPS steps that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "demo"
    done = train("configs/demo.py", workdir, DEMO)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A folder of drawn receipts in LLaVA JSON."""
    return draw_receipts(tmp_path_factory.mktemp("receipts"), train=6, validation=2)


def test_a_run_leaves_its_files(demo):
    config, results = (read_json(demo / name) for name in ("config.json", "results.json"))
    assert config["train"]["steps"] == STEPS
    assert config["name"] == results["name"] == "deepstack"
    assert results["steps"] == STEPS
    assert results["visual_tokens"] == 80  # 16 in the sequence, 4 groups of 16 stacked on them
    assert results["questions"] == 16
    assert {"validation_loss", "seconds_per_step", "parameters"} <= results.keys()
    assert results["scores"]["exact_match"]["by_kind"].keys() == {"fine", "coarse"}

    answers = read_lines(demo / "predictions.jsonl")
    assert len(answers) == 16
    assert {answer["kind"] for answer in answers} == {"fine", "coarse"}
    assert results["scores"]["exact_match"]["score"] == pytest.approx(
        np.mean([answer["scores"]["exact_match"] for answer in answers])
    )

    assert [*losses(demo)] == list(range(1, STEPS + 1))
    held_out = {
        record["step"]: record["validation_loss"] for record in read_lines(demo / "metrics.jsonl") if "loss" not in record
    }
    assert [*held_out] == [3, 6, STEPS]
    assert held_out[STEPS] == results["validation_loss"]
    assert any(path.name.startswith("events.out") for path in (demo / "tensorboard").iterdir())
    assert list((demo / "profile").rglob("*.xplane.pb"))

    manifest = read_json(demo / "manifest.json")
    assert {"command", "git", "versions", "devices", "hosts", "data", "config"} == manifest.keys()
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["devices"] == {"platform": "cpu", "kind": "cpu", "count": 1}
    stored = read_json(demo / "checkpoints" / str(STEPS) / "about" / "metadata")
    assert stored == manifest, "every checkpoint says what it was made from"
    last = [record for record in read_lines(demo / "metrics.jsonl") if "loss" in record][-1]
    shown = {
        "lr",
        "grad_norm",
        "examples_per_second",
        "supervised_tokens_per_second",
        "tflops_per_device",
        "data_wait",
        "padding",
    }
    assert shown <= last.keys()


def test_a_report_tells_where_the_time_went(demo):
    done = verb("train", f"--report={demo}")
    assert done.returncode == 0, done.stderr
    assert f"{STEPS} steps, 1 attempt, goodput" in done.stdout
    assert {path.name for path in (demo / "report").iterdir()} == {"time.png", "curves.png"}


def test_stopped_three_ways_it_ends_at_the_same_bytes(demo, tmp_path):
    """SIGKILL, Ctrl-C and SIGTERM, each while it evaluates after the named step; the same command goes on every time."""
    run = ("configs/demo.py", tmp_path / "stopped", DEMO)
    code, _ = train_until(f"step 3/{STEPS} ", signal.SIGKILL, *run)
    assert code == -signal.SIGKILL
    code, printed = train_until(f"step 3/{STEPS} ", signal.SIGINT, *run)
    assert code == 130, printed
    assert "resumed from step " in printed
    assert "stopped at step 3, state saved" in printed
    code, printed = train_until(f"step 6/{STEPS} ", signal.SIGTERM, *run)
    assert code == 75, printed
    assert "resumed from step 3 " in printed
    last = train(*run)
    assert last.returncode == 0, last.stderr
    assert "resumed from step 6 " in last.stdout

    ours, theirs = saved_state(tmp_path / "stopped"), saved_state(demo)
    assert int(ours["['step']"]) == STEPS
    assert_same_bytes(ours, theirs)

    assert losses(tmp_path / "stopped") == losses(demo)
    results = [read_json(workdir / "results.json") for workdir in (tmp_path / "stopped", demo)]
    assert [result.pop("seconds_per_step") is None for result in results] == [False, False]
    assert results[0] == results[1]
    assert (tmp_path / "stopped" / "predictions.jsonl").read_bytes() == (demo / "predictions.jsonl").read_bytes()


def test_evaluated_by_its_workdir_alone_it_scores_as_the_run_did(demo, tmp_path):
    """The same rows, questions, answers and scores, in files of the same shape, though the verb has other batches."""
    done = verb("evaluate", f"--model={demo}", f"--out={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "predictions.jsonl").read_bytes() == (demo / "predictions.jsonl").read_bytes()
    verbs, runs = read_json(tmp_path / "again" / "results.json"), read_json(demo / "results.json")
    assert verbs.pop("name") == str(demo)
    drawn_rows = {"rows": 0, "image_rows": 0, "looked_at": 0, "training_rows": 1_000_000}
    assert verbs.pop("overlap") == drawn_rows  # only rows of files are compared, and a run does that before it begins
    assert len(verbs["protocol"].pop("checkpoint")) == 16  # a digest; a run's own weights lie beside its file
    assert runs["protocol"].pop("checkpoint") == ""
    assert verbs == {key: runs[key] for key in verbs}


def test_drawn_receipts_train_the_same_with_and_without_worker_processes(drawn, tmp_path):
    curves = []
    for workers in (0, 2):
        workdir = tmp_path / f"workers{workers}"
        done = train("configs/receipts.py", workdir, {**RECEIPTS, "data.root": drawn, "data.workers": workers})
        assert done.returncode == 0, done.stderr
        assert "step 1: validation loss" in done.stdout
        assert "'Transcribe this receipt.' -> " in done.stdout
        answers = read_lines(workdir / "predictions.jsonl")
        assert [(line["id"], line["turn"]) for line in answers] == [("val0", 0), ("val1", 0), ("val1", 1)]
        curves.append(losses(workdir))
    assert [*curves[0]] == [1, 2]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_it_goes_on_where_all_that_it_began_with_is_gone_or_moved(drawn, tmp_path):
    """The weights, which it has learned from since, and the data, of which there is a copy."""
    data, stage1, stage2 = (tmp_path / name for name in ("data", "stage1", "stage2"))
    shutil.copytree(drawn, data)
    options = RECEIPTS | {"data.root": data, "evaluation.every": 0}
    for workdir, weights in ((stage1, ""), (stage2, stage1)):
        done = train("configs/receipts.py", workdir, options | {"train.weights": weights})
        assert done.returncode == 0, done.stderr
    shutil.rmtree(stage1)
    (stage2 / "results.json").unlink()
    moved = options | {"data.root": data.rename(tmp_path / "moved"), "train.weights": stage1, "data.max_bad_fraction": 0.5}
    done = train("configs/receipts.py", stage2, moved | {"name": "renamed"})
    assert done.returncode == 0, done.stderr
    assert "resumed from step 2 " in done.stdout
    for key in ("data.root", "data.max_bad_fraction", "name"):
        assert f"goes on with another {key}: " in done.stdout
    assert read_json(stage2 / "results.json")["name"] == "renamed"

    other = shutil.copytree(drawn, tmp_path / "other")
    text = (other / "train.json").read_text()
    (other / "train.json").write_text(text.replace("SHOP", "SHIP"))
    refused("configs/receipts.py", stage2, moved | {"name": "renamed", "data.root": other}, ["other examples", "data.root: "])


@pytest.mark.slow
def test_it_outlives_the_reader_of_its_output_and_goes_on_with_changed_data_only_when_told(drawn, tmp_path):
    data, workdir = Path(shutil.copytree(drawn, tmp_path / "data")), tmp_path / "run"
    options = RECEIPTS | {"data.root": data, "data.workers": 0, "evaluation.every": 0}
    line = shlex.join(command("configs/receipts.py", workdir, options))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} | head -1"], cwd=REPOSITORY, env=ENVIRONMENT, timeout=TIMEOUT
    )
    assert done.returncode == 0
    assert read_json(workdir / "results.json")["steps"] == 2
    text = (data / "train.json").read_text()
    (data / "train.json").write_text(text.replace("SHOP", "SHIP"))
    refused("configs/receipts.py", workdir, options, ["other tokens", "train.json", "--config.train.changed_data=accept"])
    done = train("configs/receipts.py", workdir, options | {"train.changed_data": "accept"})
    assert done.returncode == 0, done.stderr
    assert "goes on with other examples: train data train.json" in done.stdout


def test_worker_processes_outlast_a_signal_and_end_with_the_run(drawn, tmp_path):
    run = (
        "configs/receipts.py",
        tmp_path / "run",
        {**RECEIPTS, "data.root": drawn, "data.workers": 2, "train.steps": 200, "evaluation.every": 0},
    )
    code, printed = train_until("step 2/200 ", signal.SIGINT, *run, group=True)
    assert code == 130, printed
    assert printed.rstrip().endswith("state saved; the same command goes on from here")
    assert "Traceback" not in printed
    code, printed = train_until("step 5/200 ", signal.SIGKILL, *run)
    assert code == -signal.SIGKILL, printed


def test_real_receipts(tmp_path):
    if not (REAL / "train.json").is_file():
        pytest.skip(f"no receipts in {REAL}")
    done = train("configs/receipts.py:baseline", tmp_path / "run", {**RECEIPTS, "data.max_length": 864, "data.root": REAL})
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run" / "results.json")["bad_examples"] == 0
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
    assert all(3 < loss < 10 for values in losses(tmp_path / "run").values() for loss in values)  # near log(259) = 5.6


IMPOSSIBLE = {
    "unknown key": ({"decoder.layrs": 3}, ["--config.decoder.layrs", "nearest valid name: 'layers'"]),
    "wrong type": ({"decoder.layers": "many"}, ["--config.decoder.layers=many"]),
    "start beyond depth": ({"deepstack.start": 9}, ["config.deepstack.start 9", "0..4", "lower it"]),
    "stack without crops": ({"image.mode": "pad"}, ["config.image.mode='pad'", "config.deepstack.stack='none'"]),
    "batch and accumulation": (
        {"train.accumulation": 3},
        ["config.train.batch_size 32", "accumulation 3", "nearest valid: 30"],
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_configuration(case, precious):
    changes, expected = IMPOSSIBLE[case]
    refused("configs/demo.py", precious, changes, expected)


def test_a_config_file_that_is_not_there_and_arguments_that_are_not_known(precious):
    refused("configs/dmo.py", precious, {}, ["--config=configs/dmo.py names no readable file"])
    refused("configs/receipts.py:baselin", precious, {}, ["baselin", "deepstack, baseline"])


def test_missing_data(precious, tmp_path):
    refused("configs/receipts.py", precious, {}, ["train.json does not exist", "--config.data.root=DIR"])
    nowhere = tmp_path / "nowhere"
    refused("configs/receipts.py", precious, {"data.root": nowhere}, [str(nowhere / "train.json"), "--config.data.root=DIR"])


def test_full_size_recipe_names_what_to_give(precious):
    """Weights, tower, stage 1 and data, one a line; the ways to give them are in test_recipes."""
    said = ["hf download lmsys/vicuna-7b-v1.5 --local-dir checkpoints/lmsys/vicuna-7b-v1.5", "--config.train.weights=DIR"]
    said += ["openai/clip-vit-large-patch14-336", "--config.train.tower=DIR", "--config.train.projector=PATH"]
    said += ["llava_v1_5_mix665k.json (sets coco", "--config.data.root=DIR", "tokenizer"]
    lines = refused("configs/llava15.py:finetune", precious, {}, said, lines=12).splitlines()[1:]
    assert all(line.startswith("  ") and len(line) < 400 for line in lines)


@pytest.mark.parametrize("name", ["train2", "val1"])
def test_missing_image(name, precious, tmp_path):
    root = draw_receipts(tmp_path / "data", train=6, validation=2)
    (root / "images" / f"{name}.jpg").unlink()
    refused(
        "configs/receipts.py",
        precious,
        {"data.root": root},
        [f"images/{name}.jpg", "1 image missing among the first ", "--config.data.images"],
    )


def test_corrupt_image(tmp_path):
    root = draw_receipts(tmp_path / "data", train=6, validation=2)
    broken = root / "images" / "train2.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    changes = {**RECEIPTS, "data.root": root, "train.batch_size": 6, "data.max_bad_fraction": 0}
    refused(
        "configs/receipts.py",
        tmp_path / "run",
        changes,
        [str(broken), "1 of 6", "config.data.max_bad_fraction=0", "quarantine.jsonl"],
    )
    assert [record["name"] for record in read_lines(tmp_path / "run" / "quarantine.jsonl")] == ["train2"]


def test_malformed_json(precious, tmp_path):
    root = draw_receipts(tmp_path / "data", train=6, validation=2)
    text = (root / "train.json").read_text().splitlines()
    text[3] = text[3].replace('"image":', '"image"')
    (root / "train.json").write_text("\n".join(text))
    refused("configs/receipts.py", precious, {"data.root": root}, ["train.json line 4 ", "'train1'", "malformed JSON", "; fix"])


def test_unwritable_workdir(tmp_path):
    (tmp_path / "taken").write_text("a file")
    refused("configs/demo.py", tmp_path / "taken", {}, [str(tmp_path / "taken"), "--workdir=DIR"])
    assert (tmp_path / "taken").read_text() == "a file"
    refused("configs/demo.py", None, {}, ["--workdir is missing"])


def test_workdir_of_another_configuration(demo):
    changes = {**DEMO, "train.batch_size": 4, "image.global_filter": "nearest", "train.log_every": 5}
    line = refused(
        "configs/demo.py",
        demo,
        changes,
        ["train.batch_size: 8 there, 4 now", "image.global_filter: 'box' there", "new --workdir"],
    )
    assert "log_every" not in line  # it changes what is shown, not what is computed


def test_a_run_is_prolonged_with_its_moments_by_the_schedule_of_its_new_length(demo, tmp_path):
    """Two more steps: the schedule of 10 has the highest rate until step 8, that of 8 fell from step 7 on."""
    workdir = shutil.copytree(demo, tmp_path / "demo")
    done = train("configs/demo.py", workdir, DEMO | {"train.steps": STEPS + 2})
    assert done.returncode == 0, done.stderr
    assert "goes on to step 10, begun for 8: moments are kept, learning rates are those of a schedule of 10" in done.stdout
    rates = {record["step"]: record["lr"] for record in read_lines(workdir / "metrics.jsonl") if "loss" in record}
    assert [rates[step] / rates[7] for step in (8, 9, 10)] == pytest.approx([0.51, 1, 0.51])
    assert "steps: 1 of their highest at step 9, 0.51 at step 10 (it was 0.51 at step 8)" in done.stdout
    counts = [leaf for path, leaf in saved_state(workdir).items() if "count" in path]
    assert counts
    assert all(count == STEPS + 2 for count in counts)
    assert read_json(workdir / "results.json")["steps"] == read_json(workdir / "config.json")["train"]["steps"] == STEPS + 2
    refused("configs/demo.py", workdir, DEMO, [f"{workdir} is at step 10", "give 8; give at least 10"])


@pytest.mark.slow
def test_a_prolonged_run_ends_at_the_bytes_of_one_of_that_length(demo, tmp_path):
    """Until step 7 the schedules of 8 and of 9 steps are one."""
    workdir = shutil.copytree(demo, tmp_path / "demo")
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    for place in (workdir, tmp_path / "straight"):
        done = train("configs/demo.py", place, DEMO | {"train.steps": STEPS + 1})
        assert done.returncode == 0, done.stderr
    assert_same_bytes(saved_state(workdir), saved_state(tmp_path / "straight"))


def test_workdir_of_a_run_that_goes_on(precious):
    with lock_workdir(precious):
        refused("configs/demo.py", precious, DEMO, [f"another run is at work in {precious}", "--workdir"])


@pytest.fixture
def precious(tmp_path) -> Path:
    """A workdir that holds something already."""
    workdir = tmp_path / "precious"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 900, "loss": 0.1}\n')
    (workdir / "results.json").write_text("{}")
    return workdir


def refused(config: str, workdir: Path | None, changes: dict[str, Any], expected: list[str], lines: int = 1) -> str:
    """Run the verb; it must end with 1 and `lines` lines with every expected part, and leave an old workdir as it is."""
    before = contents(workdir) if workdir is not None and workdir.is_dir() else {}
    done = train(config, workdir, changes)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == lines
    assert [part for part in expected if part not in done.stderr] == [], done.stderr
    if before:
        assert contents(workdir) == before  # pyright: ignore[reportArgumentType]
    return done.stderr


@pytest.mark.slow
def test_too_little_memory_is_one_line_with_what_was_asked_for_and_the_next_moves(tmp_path):
    changes = DEMO | {"data.max_length": 1_000_000, "train.batch_size": 1}  # attention scores of terabytes
    done = train("configs/demo.py", tmp_path / "run", changes)
    assert done.returncode == 1, done.stdout
    assert re.fullmatch(r"error: out of memory: .*\d GB; raise config\.train\.accumulation, .*\n", done.stderr), done.stderr
