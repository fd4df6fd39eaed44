"""What a run shows of its numbers besides metrics.jsonl."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from deepstack_jax.config_checks import ConfigError
from deepstack_jax.training.metrics import MetricsLog, read_metrics, start_wandb


class StubRun:
    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, [], False

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """In place of the package: what it is asked for."""
    ids = iter(("first", "second"))
    stub = SimpleNamespace(init=lambda **settings: StubRun(**settings), util=SimpleNamespace(generate_id=lambda: next(ids)))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_weights_and_biases_sees_the_numbers_and_one_run_over_all_attempts(tmp_path, wandb):
    runs = [start_wandb("project", tmp_path, "name", {"seed": 0}) for _ in range(2)]
    assert [run.settings["id"] for run in runs] == ["first", "first"]
    assert runs[0].settings["project"] == "project"
    assert runs[0].settings["resume"] == "allow"
    log = MetricsLog(tmp_path, 0, runs[0])
    log.write(1, {"loss": 2.0, "note": "text", "grad_norm": math.nan})
    log.close()
    assert runs[0].logged == [(1, {"loss": 2.0})]
    assert runs[0].finished
    assert read_metrics(tmp_path)[0]["note"] == "text"


def test_a_missing_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"config\.train\.wandb='project' needs the package wandb: pip install wandb"):
        start_wandb("project", tmp_path, "name", {})


def test_samples_are_shown_as_text_and_picture(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.sample(3, "samples", "right: 'a' -> 'b'", np.zeros((4, 6, 3), np.uint8))
    log.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"right: 'a' -> 'b'" in written
    assert b"\x89PNG" in written


def test_other_hosts_write_nothing(tmp_path):
    log = MetricsLog(None, 0)
    log.write(1, {"loss": 1.0})
    log.sample(1, "samples", "text", None)
    log.close()
    assert not list(tmp_path.iterdir())
