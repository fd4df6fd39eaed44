"""The prepare verb as a user runs it: shards that train like the files, kills, a full disk, bad rows, and what it says."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.receipts import get_config
from deepstack_jax.config import SetConfig, build_config
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.data.shards.reader import ShardSource
from tests.e2e.receipts import draw_receipts
from tests.e2e.test_train import RECEIPTS
from tests.e2e.verb import (
    ENVIRONMENT,
    REPOSITORY,
    TIMEOUT,
    Done,
    contents,
    losses,
    members,
    read_json,
    read_lines,
    train,
    verb,
)
from tests.unit.test_open_mixtures import FINEVISION, finevision, picture, write
from tests.unit.test_tars import write as write_tar

TRAIN = 24


def command(root: Path | str, out: Path | None, *flags: str) -> list[str]:
    place = [] if out is None else [f"--out={out}"]
    config = ["--config=configs/receipts.py", f"--config.data.root={root}"]
    return [sys.executable, "-m", "deepstack_jax.prepare", *config, *place, *flags]


def prepare(root: Path | str, out: Path | None, *flags: str, **options) -> Done:
    words = command(root, out, *flags)
    return subprocess.run(words, cwd=REPOSITORY, env=ENVIRONMENT, timeout=TIMEOUT, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A folder of drawn receipts in LLaVA JSON."""
    return draw_receipts(tmp_path_factory.mktemp("receipts"), train=TRAIN, validation=4)


@pytest.fixture(scope="module")
def shards(drawn, tmp_path_factory) -> Path:
    """What prepare makes of them with one worker, undisturbed."""
    out = tmp_path_factory.mktemp("prepared") / "shards"
    done = prepare(drawn, out, "--shard_rows=1", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.strip("│ \n").split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert [cells["train"][column] for column in (0, 1, 2, 4)] == ["24", "0", "24", "24"]
    assert [cells["validation"][column] for column in (0, 1, 2, 4)] == ["4", "0", "4", "4"]
    assert f"to train on them: --config.data.train={out}/train --config.data.validation={out}/validation\n" in done.stdout
    return out


def config_of(root: Path, names: tuple[str, str]):
    config = get_config()
    config.data.root, (config.data.train, config.data.validation) = str(root), names
    return build_config(config)


def test_batches_from_shards_equal_those_from_the_files(drawn, shards):
    streams = []
    for root, names in ((drawn, ("train.json", "val.json")), (shards, ("train", "validation"))):
        config = config_of(root, names)
        streams.append(TrainingStream(open_source(config.data, "train"), config.data_spec))
    files, records = streams
    for _ in range(8):  # more than an epoch of 6
        one, other = next(files), next(records)
        assert (one.bad, other.bad) == ((), ())
        for name, theirs, ours in zip(one.batch._fields, one.batch, other.batch, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
            assert ours.tobytes() == theirs.tobytes(), name
        assert np.ptp(one.batch.pixels) > 100
    for stream in streams:
        stream.close()


def test_held_out_examples_are_those_of_the_file(drawn, shards):
    files, records = (
        open_source(config_of(root, ("", name)).data, "validation")
        for root, name in ((drawn, "val.json"), (shards, "validation"))
    )
    assert len(files) == len(records) == 4
    for row in range(4):
        (path,) = files[row].images
        assert records[row] == replace(files[row], images=(Path(str(path)).read_bytes(),))


def test_training_goes_on_shards(shards, tmp_path):
    changes = {**RECEIPTS, "train.steps": 3, "data.train": shards / "train", "data.validation": ""}
    done = train("configs/receipts.py", tmp_path / "run", changes)
    assert done.returncode == 0, done.stderr
    assert [*losses(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


def prepare_until(more: int, number: signal.Signals, root: Path, out: Path) -> tuple[int, str]:
    """Start a run, send the signal to all its processes once it has finished so many shards; returns exit code and output."""

    def shards() -> int:
        return len(list((out / "train").glob("shard-*.array_record")))

    before = shards()
    process = subprocess.Popen(
        command(root, out, "--shard_rows=1", "--workers=2"),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + TIMEOUT
        while shards() < before + more:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if number == signal.SIGKILL:
            process.kill()  # the others must notice by themselves
        else:
            os.killpg(process.pid, number)
        printed, _ = process.communicate(timeout=TIMEOUT)
        while members(process.pid):
            assert time.monotonic() < deadline, members(process.pid)
            time.sleep(0.01)
        return process.returncode, printed
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)


def test_killed_and_stopped_it_ends_with_the_same_bytes(drawn, shards, tmp_path):
    out = tmp_path / "stopped"
    code, _ = prepare_until(2, signal.SIGKILL, drawn, out)
    assert code == -signal.SIGKILL
    assert not (out / "train" / "manifest.json").exists()
    code, printed = prepare_until(2, signal.SIGINT, drawn, out)
    assert code == 130, printed
    code, printed = prepare_until(2, signal.SIGTERM, drawn, out)
    assert code == 75, printed
    assert f"of {TRAIN} train shards are finished and kept; the same command goes on" in printed
    assert "Traceback" not in printed
    assert not list(out.glob("*/.part-*"))
    last = prepare(drawn, out, "--shard_rows=1")
    assert last.returncode == 0, last.stderr
    kept = int(last.stdout.split("train: ")[1].split(f" of {TRAIN} shards were finished before")[0])
    assert 6 <= kept < TRAIN
    assert contents(out) == contents(shards)


def test_bad_rows_dry_run_report_and_mending(drawn, tmp_path):
    root, out = tmp_path / "data", tmp_path / "shards"
    draw_receipts(root, train=8, validation=1)
    image = root / "images"
    (image / "train1.jpg").unlink()
    sound = (image / "train6.jpg").read_bytes()
    (image / "train6.jpg").write_bytes(sound[:3000])  # cut after its header
    before = contents(tmp_path)

    decoded = prepare(root, out, "--shard_rows=4", "--dry-run", "--decode", "--split=train")
    said = "error: train: 2 of 8 records cannot be used, config.data.max_bad_fraction=0.01 allows 0; the first: train1: cannot"
    assert (decoded.returncode, decoded.stderr.count("\n"), decoded.stderr[: len(said)]) == (1, 1, said)
    assert f"train: missing: {image / 'train1.jpg'}" in decoded.stdout
    assert f"train: unusable: train6: cannot read image {image / 'train6.jpg'}: image file is truncated" in decoded.stdout
    headers = prepare(root, out, "--shard_rows=4", "--dry-run", "--split=train", "--config.data.max_bad_fraction=0.2")
    assert headers.returncode == 0, headers.stderr
    assert "train: unusable: train1: cannot read" in headers.stdout
    assert "train6" not in headers.stdout, "its header is whole"
    assert contents(tmp_path) == before
    assert not out.exists()

    refused = prepare(root, out, "--shard_rows=4")
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "error: 2 of 8 records cannot be used, config.data.max_bad_fraction=0.01 allows 0; the first: "
    )
    assert refused.stderr.count("\n") == 1
    report = read_lines(out / "train" / "bad.jsonl")
    assert [(line["row"], line["id"]) for line in report] == [(1, "train1"), (6, "train6")]
    assert str(image / "train1.jpg") in report[0]["reason"]
    (image / "train6.jpg").write_bytes(sound)
    allowed = prepare(root, out, "--shard_rows=4", "--config.data.max_bad_fraction=0.2")
    assert allowed.returncode == 0, allowed.stderr
    assert f"left out, with reasons: {out / 'train' / 'bad.jsonl'}" in allowed.stdout
    manifest = read_json(out / "train" / "manifest.json")
    assert (manifest["rows"], manifest["source"]["left_out"]) == (7, [1])


def test_a_disk_that_takes_no_more_is_one_line_and_costs_nothing_finished(tmp_path):
    """A limit on the size of files stands in for a full disk: the writer meets it at the same place."""
    limit = (1 << 20, 1 << 20)
    big = draw_receipts(tmp_path / "data", train=6, validation=1)
    (big / "images" / "train4.jpg").write_bytes((big / "images" / "train4.jpg").read_bytes() + b"\0" * (2 << 20))
    out = tmp_path / "shards"
    flags = ("--shard_rows=2", "--workers=1")
    full = prepare(big, out, *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert full.returncode == 1
    assert full.stderr.startswith(f"error: cannot write to {out / 'train'}: write() failed: File too large; about ")
    assert "are needed for 1 more of 3 shards" in full.stderr
    assert "make room and run the same command" in full.stderr
    assert full.stderr.count("\n") == 1
    assert {path.name for path in (out / "train").iterdir()} == {
        "prepare.json",
        "shard-00000.array_record",
        "shard-00000.json",
        "shard-00001.array_record",
        "shard-00001.json",
    }
    done = prepare(big, out, *flags)
    assert done.returncode == 0, done.stderr
    assert "train: 2 of 3 shards were finished before" in done.stdout


def test_verify(shards, tmp_path):
    def verify(folder: Path) -> Done:
        return verb("prepare", f"--verify={folder}")

    done = verify(shards)
    assert done.returncode == 0, done.stderr
    assert "every byte is as the manifest says" in done.stdout
    copy = tmp_path / "copy"
    for name, content in contents(shards / "train").items():
        copy.mkdir(exist_ok=True)
        (copy / name).write_bytes(content)
    shard = copy / "shard-00003.array_record"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    damaged = verify(copy)
    assert damaged.returncode == 1
    assert "shard-00003.array_record has other content than when it was written" in damaged.stderr
    assert damaged.stderr.count("\n") == 1


MISTAKES = {
    "no out": ([], ["--out is missing", "--dry-run"]),
    "a URL": (["--out=gs://bucket/x"], ["--out=gs://bucket/x is a URL", "local folder and copy it"]),
    "decode": (["--out=x", "--decode"], ["--decode belongs to --dry-run"]),
    "split": (["--out=x", "--split=test"], ["--split got 'test'", "train, validation or both"]),
    "verify": (["--verify=NOWHERE"], ["holds no manifest.json", "the --out of a run"]),
    "data": (["--out=x", "--config.data.train=none.json"], ["none.json does not exist", "--config.data.train=PATH"]),
    "images": (
        ["--out=x", "--config.data.images=images"],
        ["records drawn from the data can be used", "--config.data.images=FOLDER"],
    ),
    "flag": (["--dryrun"], ["Unknown command line flag 'dryrun'", "dry-run"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case, tmp_path):
    flags, expected = MISTAKES[case]
    root = draw_receipts(tmp_path, train=1, validation=1)
    if case == "images":  # a wrong image root, seen before hours are lost
        rows = json.loads((root / "train.json").read_text()) * 300
        (root / "train.json").write_text(json.dumps(rows))
    before = contents(tmp_path)
    done = verb("prepare", *command(root, None, *(flag.replace("NOWHERE", str(tmp_path)) for flag in flags))[3:])
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert [part for part in expected if part not in done.stderr] == [], done.stderr
    assert contents(tmp_path) == before


def test_help_has_examples():
    done = verb("prepare", "--help")
    assert done.returncode == 0
    assert "python -m deepstack_jax.prepare --config=configs/receipts.py --config.data.root=DIR --out=shards" in done.stdout


def test_finevision_by_its_table_with_ratings_from_the_command_line(tmp_path):
    """The published table in a configuration; what is expected, found and rated low is shown, and the shards hold the rest."""
    chartqa = SetConfig(file="FineVision/chartqa")
    write(tmp_path, chartqa, [finevision(number, worst=number) for number in (1, 3, 5)], FINEVISION)
    config = tmp_path / "mixed.py"
    config.write_text(
        "import dataclasses, runpy\n"
        "from configs.receipts import get_config as receipts\n\n"
        "def get_config():\n"
        "    config = receipts()\n"
        "    config.data.train = config.data.validation = ''\n"
        "    entry = runpy.run_path('configs/mixtures/finevision.py')['SETS']['chartqa']\n"
        "    config.data.sets = {'chartqa': dataclasses.asdict(entry)}\n"
        "    return config\n"
    )
    of_set = "--config.data.sets.chartqa"
    flags = [f"--config.data.root={tmp_path}", f"{of_set}.min_relevance=3", f"{of_set}.rows=3"]
    words = [sys.executable, "-m", "deepstack_jax.prepare", f"--config={config}", f"--out={tmp_path / 'shards'}", "--workers=1"]
    done = subprocess.run([*words, *flags], cwd=REPOSITORY, env=ENVIRONMENT, timeout=TIMEOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "FineVision/chartqa" in line)
    assert [cell.strip() for cell in line.split("│")[1:-1]] == ["chartqa", "FineVision/chartqa", "2", "1", "3", "1", "2", "ok"]
    shards = ShardSource(str(tmp_path / "shards" / "train"))
    assert [shards[row].messages[1].text for row in range(len(shards))] == ["It is 3a.", "It is 5a."]
    assert shards[0].info["set"] == "chartqa"
    assert shards[0].images == (picture(3)["bytes"],)


def test_webdataset_shards_are_prepared_as_the_records_in_them_are(drawn, shards, tmp_path):
    """The receipts again, as two tar files of image and record by key: the same shards, to the byte of every image and turn."""
    rows = json.loads((drawn / "train.json").read_text())
    for part in (0, 1):
        members: dict[str, object] = {}
        for row in rows[part * 12 : part * 12 + 12]:
            members[f"{row['id']}.jpg"] = (drawn / "images" / row["image"].split("/")[-1]).read_bytes()
            members[f"{row['id']}.json"] = row
        write_tar(tmp_path / f"receipts-{part}.tar", members)
    flags = ("--config.data.train=receipts-*.tar", "--config.data.validation=", "--config.data.images=", "--workers=1")
    done = prepare(tmp_path, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    ours, theirs = ShardSource(str(tmp_path / "out" / "train")), ShardSource(str(shards / "train"))
    assert len(ours) == TRAIN
    assert [ours[row] for row in range(TRAIN)] == [theirs[row] for row in range(TRAIN)]
