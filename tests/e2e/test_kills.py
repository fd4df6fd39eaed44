"""A run that is killed at any moment ends at the same bytes: parameters, optimizer, place in the data, next batch."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deepstack_jax as dsx
from deepstack_jax.config import from_stored
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.train.core.optimizer import flatten
from tests.e2e.receipts import draw_receipts
from tests.e2e.verb import assert_same_bytes, read_json, read_lines, saved_state, train, train_until, verb

STEPS = 40
CONFIG = '''
from pathlib import Path
import runpy


def get_config():
    """Packed rows of a mixture; widths and lengths small enough for a step in a few milliseconds."""
    config = runpy.run_path(RECEIPTS)["get_config"]()
    config.image.size = config.vision.width = config.vision.mlp = config.decoder.width = config.decoder.mlp = 32
    config.decoder.head_dim, config.vision.layers, config.decoder.layers = 16, 2, 5
    config.deepstack.stack, config.deepstack.taps = "crops_taps", ((0, 0),)  # crops enter layers 1 to 4
    config.data.root = DATA
    config.data.train, config.data.validation = "", ""
    config.data.sets = {
        "questions": {"file": "train.json", "repeat": 0.5},
        "others": {"file": "val.json", "repeat": 2.0},
    }
    config.data.packing.enabled = True
    config.data.template, config.data.max_length = "direct", 240  # two or three in a row
    config.train.steps, config.train.batch_size = STEPS, 3
    config.train.log_every, config.train.checkpoint_every = 1, 3
    return config
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("kills")
    root = draw_receipts(folder / "data", train=10, validation=4)
    receipts = Path(__file__).parents[2] / "configs" / "receipts.py"
    text = f"RECEIPTS, DATA, STEPS = {str(receipts)!r}, {str(root)!r}, {STEPS}\n{CONFIG}"
    (folder / "kills.py").write_text(text)
    return str(folder / "kills.py")


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> Path:
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    done = train(config, workdir, {})
    assert done.returncode == 0, done.stderr
    return workdir


def next_batch(workdir: Path) -> list[bytes]:
    """What the newest checkpoint would go on with, every array of it."""
    run = from_stored(read_json(workdir / "config.json"))
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    stream = TrainingStream(open_source(run.data, "train"), run.data_spec)
    stream.restore(read_json(workdir / "checkpoints" / str(newest) / "data" / "metadata"))
    batch = next(stream).batch
    stream.close()
    return [array.tobytes() for array in batch]


def while_saving(workdir: Path, after: int) -> Callable[[str], bool]:
    """True once a checkpoint beyond step `after` is being written and not yet whole."""

    def saving(_: str) -> bool:
        folders = (workdir / "checkpoints").glob("*tmp*") if (workdir / "checkpoints").exists() else ()
        return any(int(folder.name.split(".")[0]) > after for folder in folders)

    return saving


def some_time_after(step: int, seconds: float) -> Callable[[str], bool]:
    def reached(printed: str) -> bool:
        if f"step {step}/{STEPS} " not in printed:
            return False
        time.sleep(seconds)
        return True

    return reached


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_three_kills_at_random_moments_and_one_while_saving_change_no_byte(seed, config, straight, tmp_path):
    draw, workdir = random.Random(seed), tmp_path / "run"
    first, second, third = sorted(draw.sample(range(1, STEPS - 1), 3))
    moments = [
        some_time_after(first, draw.uniform(0, 0.05)),
        while_saving(workdir, first),
        some_time_after(second, draw.uniform(0, 0.05)),
        some_time_after(third, draw.uniform(0, 0.05)),
    ]
    for moment in moments:
        code, printed = train_until(moment, signal.SIGKILL, config, workdir, {})
        assert code == -signal.SIGKILL, printed
    last = train(config, workdir, {})
    assert last.returncode == 0, last.stderr
    assert "resumed from step " in last.stdout

    assert_same_bytes(saved_state(workdir), saved_state(straight))
    assert next_batch(workdir) == next_batch(straight)
    ours, theirs = ([line for line in read_lines(folder / "metrics.jsonl") if "loss" in line] for folder in (workdir, straight))
    assert [(line["step"], line["loss"]) for line in ours] == [(line["step"], line["loss"]) for line in theirs]
    assert [line["event"] for line in read_lines(workdir / "journal.jsonl")].count("start") == 5
    assert not (workdir / "damaged").exists(), "a kill leaves no checkpoint that counts and is damaged"


def family(tower: str, decoder: str) -> dict[str, Any]:
    return {"vision.architecture": tower, "decoder.architecture": decoder, "decoder.tied_head": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        family("siglip", "qwen3"),
        family("siglip", "llama"),
        family("clip", "qwen2"),
        family("clip", "granite"),
        {"image.mode": "stretch", "deepstack.stack": "taps", "deepstack.taps": "((0, 1), (-1, 3))"},
    ],
    ids=["Qwen3 over SigLIP", "SmolLM2 over SigLIP", "Qwen2", "Granite", "taps alone"],
)
def test_a_kill_changes_no_byte_of_another_form(flags, config, tmp_path):
    """And what it ends with is exported and read."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = train(config, whole, flags)
    assert done.returncode == 0, done.stderr
    code, printed = train_until(some_time_after(STEPS // 2, 0), signal.SIGKILL, config, killed, flags)
    assert code == -signal.SIGKILL, printed
    last = train(config, killed, flags)
    assert last.returncode == 0, last.stderr
    assert "resumed from step " in last.stdout
    assert_same_bytes(saved_state(killed), saved_state(whole))
    done = verb("convert", f"--from={killed}", f"--to={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    ours, theirs = (flatten(dsx.load(folder).params) for folder in (killed, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(theirs[path], leaf, err_msg=path)
