"""What a run shows of its numbers besides metrics.jsonl."""

import json
import math
import resource
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from deepstack_jax.data.example import BadExample
from deepstack_jax.errors import ConfigError
from deepstack_jax.train.run.metrics import MetricsLog, Quarantine, read_metrics, start_wandb
from deepstack_jax.train.run.replay import write_bundle


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


def test_quarantine_quotes_little_of_a_strangers_data(tmp_path):
    uri = "data:image/png;base64," + "QUJD" * 16_000
    bad = BadExample(3, f"id\n{uri}", f"image {uri} is not a file; give a path below the image root")
    Quarantine(tmp_path, 1.0, 9).add((bad,))
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert len(line) < 800
    said = json.loads(line)
    assert said["name"].startswith("id\\ndata:image"), "as it is shown, on one line"
    assert said["reason"].endswith("QUJD is not a file; give a path below the image root")


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


def test_any_text_is_shown(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.sample(3, "samples", "half \ud800, nothing \0, äöü", None)
    log.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert rb"half \ud800, nothing \u0000" in written
    assert "äöü".encode() in written


def test_other_hosts_write_nothing(tmp_path):
    log = MetricsLog(None, 0)
    log.write(1, {"loss": 1.0})
    log.sample(1, "samples", "text", None)
    log.close()
    assert not list(tmp_path.iterdir())


@contextmanager
def full_disk():
    """Every write to a file fails, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_once_for_each_file_and_nothing_waits_or_raises(tmp_path, caplog):
    log, quarantine = MetricsLog(tmp_path, 0), Quarantine(tmp_path, max_fraction=1.0, examples=9)
    with full_disk():
        for step in range(1, 60):  # more than any queue or buffer holds
            log.write(step, {f"number{name}": 1.0 for name in range(20)})
            quarantine.add((BadExample(step, f"id{step}", "reason"),))
        write_bundle(tmp_path, 3, [1], 0, {"loss": math.nan, "grad_norm": math.nan})
    assert not read_metrics(tmp_path)
    for file in ("metrics.jsonl", "tensorboard", "quarantine.jsonl", "replay/step-3.json"):
        assert caplog.text.count(f"cannot write to {tmp_path / file}: ") == 1, file
    log.write(60, {"loss": 1.0})
    assert quarantine.add((BadExample(59, "id59", "reason"),)) == 59
    assert [line["step"] for line in read_metrics(tmp_path)] == [60]
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["name"] == "id59"
    with full_disk():
        log.close()


def test_curves_that_find_no_room_at_the_end_are_a_warning(tmp_path, caplog):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 1.0})  # waits for the next flush
    with full_disk():
        log.close()
    assert "TensorBoard shows no more" in caplog.text


def test_curves_of_a_resumed_run_begin_behind_its_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, resume_step=4)
    log.write(5, {"loss": 0.5, "nothing": math.inf})
    log.close()
    data = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    events = []
    while data:  # length, its checksum, event, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (5, 1)
    assert [(event.step, value.tag, value.simple_value) for event in events[2:] for value in event.summary.value] == [
        (5, "loss", 0.5)
    ]


def test_lines_that_a_kill_or_a_damage_left_are_passed_over_and_spoil_none_that_follow(tmp_path):
    first, second = BadExample(5, "id5", "reason"), BadExample(9, "id9", "reason")
    Quarantine(tmp_path, 1.0, 9).add((first,))
    file = tmp_path / "quarantine.jsonl"
    with file.open("ab") as damaged:
        damaged.write(b'\0\0\xff\n[1]\n{"index": 7, "na')
    Quarantine(tmp_path, 1.0, 9).add((first, second))
    assert file.read_bytes().count(b"id5") == 1, "it is known"
    assert json.loads(file.read_text(errors="replace").splitlines()[-1])["name"] == "id9"
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n{"st')
    assert read_metrics(tmp_path) == [{"step": 1}]
