"""Damage apart from what fails just now: the one is passed over and put aside, for the other nothing is touched."""

import errno
import json
import os
import shutil
from pathlib import Path

import chex
import jax
import pytest

from deepstack_jax.config import TrainConfig
from deepstack_jax.train.account.journal import read_journal
from deepstack_jax.train.account.report import add_up
from deepstack_jax.train.checkpoint import manager, reading
from deepstack_jax.train.checkpoint import restore_params as restoring
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.checkpoint.reading import (
    CheckpointError,
    UnreadableError,
    is_damage,
    read_or_damage,
    read_workdir_json,
    saved_steps,
)
from deepstack_jax.train.run.metrics import Quarantine, read_metrics
from deepstack_jax.train.run.replay import ReplayError, read_bundle
from tests.unit.test_checkpoint import abstract, state_at
from tests.unit.test_restore_params import assert_holds
from tests.unit.test_restore_params import save as save_run

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory allocating 8000000000 bytes."


def of_number(number: int) -> OSError:
    return OSError(number, os.strerror(number), "checkpoints/3/state/d/ab")


def led_to(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


# What a file system, a network, memory or tensorstore says of a file that may be whole.
PASSING = [
    MemoryError(),
    jax.errors.JaxRuntimeError(OUT_OF_MEMORY),
    jax.errors.JaxRuntimeError("INTERNAL: stream did not block host until done"),
    *map(
        of_number,
        (
            *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EMFILE, errno.ENFILE),
            *(errno.EINTR, errno.ENOMEM, errno.EAGAIN, errno.ENOTCONN, errno.EBUSY, errno.EHOSTDOWN),
        ),
    ),
    TimeoutError("read timed out"),
    ConnectionResetError("reset"),
    OSError("the store does not answer"),
    *(
        ValueError(f'{code}: Error reading "step/.zarray" in OCDBT database at local file "state/": no answer')
        for code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED", "UNKNOWN")
    ),
    ValueError("UNKNOWN: Error reading local file \"manifest.ocdbt\": Input/output error [os_error_code='5']"),
    ValueError("PERMISSION_DENIED: Failed to open: \"manifest.ocdbt\": Permission denied [os_error_code='13']"),
    led_to(ValueError("cannot restore"), of_number(errno.EIO)),
    led_to(KeyError("state"), led_to(ValueError("no tree"), MemoryError())),
    ExceptionGroup("reading", [ValueError("cut"), of_number(errno.ESTALE)]),
    RuntimeError("a defect"),
]
# What they say of one that is not.
LASTING = [
    of_number(errno.ENOENT),
    of_number(errno.ENOTDIR),
    of_number(errno.EISDIR),
    of_number(errno.ELOOP),
    FileNotFoundError("File checkpoints/3/sums/metadata not found."),
    json.JSONDecodeError("Expecting value", "", 0),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ValueError('DATA_LOSS: Error decoding local file "manifest.ocdbt": Encoded length (0) is less than minimum length (16)'),
    ValueError('NOT_FOUND: Metadata at "step/.zarray" in OCDBT database at local file "state/" does not exist'),
    ValueError("OUT_OF_RANGE: Requested byte range [0, 370) is not valid for value of size 185"),
    ValueError("UNKNOWN: Failed to open: \"d/ab\": Too many levels of symbolic links [os_error_code='40']"),
    KeyError("params.a.kernel"),
    EOFError(),
    RecursionError("maximum recursion depth exceeded while decoding a JSON array"),
    CheckpointError("1 arrays changed: params.a.kernel"),
    led_to(ValueError("no tree"), StopIteration(0)),
]
names = [f"{number}-{type(error).__name__}" for number, error in enumerate(PASSING)]


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Seconds that were waited, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr("deepstack_jax.train.checkpoint.reading.time.sleep", waited.append)
    return waited


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("kept")
    checkpoints = Checkpoints(workdir, TrainConfig(keep=2))
    for step in (2, 3):
        checkpoints.save(state_at(step), {"next_batch": step}, {})
    checkpoints.finish(3)
    checkpoints.close()
    return workdir


@pytest.fixture
def saved(kept, tmp_path):
    return Path(shutil.copytree(kept, tmp_path / "run"))


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", PASSING, ids=names)
def test_what_passes_is_no_damage(error):
    assert not is_damage(error)


@pytest.mark.parametrize("error", LASTING, ids=[f"{number}-{type(error).__name__}" for number, error in enumerate(LASTING)])
def test_what_stays_is_damage(error, pauses):
    assert is_damage(error)

    def fail():
        raise error

    assert read_or_damage("a file", fail) == (None, reading.cause_line(error))
    assert pauses == []


@pytest.mark.parametrize("error", PASSING, ids=names)
def test_a_restore_that_fails_now_is_tried_again_and_raised_as_what_it_is(error, saved, monkeypatch, pauses):
    before = files_in(saved)
    checkpoints = Checkpoints(saved, TrainConfig(keep=2))

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises((UnreadableError, type(error))) as caught:
            checkpoints.restore(abstract())
    assert caught.value is error or reading.cause_line(error) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert pauses == list(reading.PAUSES)
    assert files_in(saved) == before
    restored = checkpoints.restore(abstract())
    assert restored is not None
    chex.assert_trees_all_equal(restored[0], state_at(3))
    checkpoints.close()


@pytest.mark.parametrize("where", ["restore", "checksums"])
def test_one_failure_costs_a_pause_and_nothing_else(where, saved, monkeypatch, pauses, caplog):
    checkpoints = Checkpoints(saved, TrainConfig(keep=2))
    target = checkpoints._manager if where == "restore" else manager
    real, errors = getattr(target, where), [of_number(errno.ESTALE), jax.errors.JaxRuntimeError(OUT_OF_MEMORY)]

    def fail_twice(*args, **options):
        if errors:
            raise errors.pop()
        return real(*args, **options)

    monkeypatch.setattr(target, where, fail_twice)
    restored = checkpoints.restore(abstract())
    assert restored is not None
    chex.assert_trees_all_equal(restored[0], state_at(3))
    assert pauses == list(reading.PAUSES[:2])
    assert "cannot be read now (RESOURCE_EXHAUSTED: Out of memory" in caplog.text
    assert not (saved / "damaged").exists()
    checkpoints.close()


def test_what_another_host_cannot_read_now_is_tried_again_here_too(pauses):
    answers = iter([["", f"{reading._NOW}Input/output error"], ["", "1 arrays missing: a"]])
    assert read_or_damage("a file", lambda: 5, lambda _: next(answers)) == (None, "1 arrays missing: a")
    assert pauses == list(reading.PAUSES[:1])
    with pytest.raises(UnreadableError, match=r"a file cannot be read now, in 4 tries: Stale file handle; nothing is known"):
        read_or_damage("a file", lambda: 5, lambda _: ["", f"{reading._NOW}Stale file handle"])


@pytest.mark.parametrize("change", ["cut", "empty", "gone", "zeros"])
def test_every_file_that_is_needed_is_damage_when_it_is(change, kept, tmp_path, pauses):
    needed = ("sums/metadata", "data/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/d/*")
    for number, pattern in enumerate(needed):
        run = Path(shutil.copytree(kept, tmp_path / str(number)))
        for file in (run / "checkpoints" / "3").glob(pattern):
            content = file.read_bytes()
            made = {"cut": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content)), "gone": None}[change]
            file.unlink() if made is None else file.write_bytes(made)
        checkpoints = Checkpoints(run, TrainConfig(keep=2))
        restored = checkpoints.restore(abstract())
        assert restored is not None, pattern
        chex.assert_trees_all_equal(restored[0], state_at(2))
        assert [path.name.split("-")[0] for path in (run / "damaged").iterdir()] == ["3"], pattern
        checkpoints.close()
    assert pauses == []


@pytest.mark.parametrize("sums", ["[]", '"none"', '{"step": null}', '{"step": 1e400}'])
def test_checksums_of_another_kind_are_damage(sums, saved):
    (saved / "checkpoints" / "3" / "sums" / "metadata").write_text(sums)
    restored = Checkpoints(saved, TrainConfig(keep=2)).restore(abstract())
    assert restored is not None
    assert int(restored[0].step) == 2


def test_a_checkpoint_that_cannot_be_read_back_now_stays_and_so_do_those_before_it(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path, TrainConfig(keep=1))
    checkpoints.save(state_at(1), {}, {})
    checkpoints.settle()

    def fail(_):
        raise of_number(errno.EIO)

    with monkeypatch.context() as patch:
        patch.setattr(manager, "checksums_on_disk", fail)
        checkpoints.save(state_at(2), {}, {})
        checkpoints.finish(2)
    assert "checkpoint 2 stays, and all before it: " in caplog.text
    assert saved_steps(tmp_path) == [1, 2]
    checkpoints.save(state_at(3), {}, {})
    checkpoints.finish(3)
    assert saved_steps(tmp_path) == [3]
    checkpoints.close()


def test_what_a_checkpoint_is_kept_for_is_not_forgotten_for_want_of_an_answer(tmp_path, monkeypatch, caplog):
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "step-2.json").write_text('{"checkpoint": 1}')
    (tmp_path / "replay" / "step-3.json").write_text('{"checkpoint": "../1"}')
    checkpoints = Checkpoints(tmp_path, TrainConfig(keep=1, keep_best=1))
    checkpoints.save(state_at(1), {}, {})
    checkpoints.settle()
    real = Path.read_text

    def fail(path, *args, **options):
        if path.name in ("step-2.json", "metadata"):
            raise of_number(errno.EACCES)
        return real(path, *args, **options)

    checkpoints.save(state_at(2), {}, {}, 0.5)
    checkpoints._pending.read_back.result()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        checkpoints.finish(2)
        assert "no checkpoint is deleted now: " in caplog.text
        with pytest.raises(UnreadableError, match="Permission denied"):  # rather than without the loss that keeps the best
            Checkpoints(tmp_path, TrainConfig(keep=1, keep_best=1))
    assert saved_steps(tmp_path) == [1, 2]
    checkpoints.close()


def test_what_cannot_be_moved_or_deleted_is_said_in_a_line(saved, monkeypatch, caplog):
    (saved / "checkpoints" / "3" / "sums" / "metadata").unlink()
    checkpoints = Checkpoints(saved, TrainConfig(keep=1))

    def fail(*_):
        raise of_number(errno.EACCES)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(CheckpointError, match=r"checkpoint 3 cannot be moved to .*/damaged/3-.*: Permission denied; move"):
            checkpoints.restore(abstract())
    checkpoints.restore(abstract())
    monkeypatch.setattr(checkpoints._manager, "delete", fail)
    checkpoints.save(state_at(4), {}, {})
    checkpoints.finish(4)
    assert "checkpoint 2 cannot be deleted now: [Errno 13] Permission denied" in caplog.text
    checkpoints.close()


@pytest.mark.parametrize("error", [MemoryError(), of_number(errno.EIO), ValueError("UNAVAILABLE: no answer")])
def test_parameters_that_cannot_be_read_now_are_not_those_of_the_checkpoint_before(error, tmp_path, monkeypatch, pauses):
    run = save_run(tmp_path / "run", 1, 2)
    real = restoring._read
    with monkeypatch.context() as patch:

        def fail(*_):
            raise error

        patch.setattr(restoring, "_read", fail)
        with pytest.raises((UnreadableError, MemoryError)):
            restoring.restore_params(run)
    assert pauses == list(reading.PAUSES)
    errors = [error]

    def fail_once(*args):
        if errors:
            raise errors.pop()
        return real(*args)

    monkeypatch.setattr(restoring, "_read", fail_once)
    step, _, params = restoring.restore_params(run)
    assert step == 2
    assert_holds(params, 2)


def test_a_config_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    for content, said in ((b"{", "Expecting"), (b"[]", "it holds a list, expected an object"), (b"\xff\x00", "utf-8")):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            read_workdir_json(file)

    def fail(*_, **__):
        raise of_number(errno.ESTALE)

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(UnreadableError, match="Stale file handle"):
        read_workdir_json(file)


def test_a_link_that_leads_out_of_a_checkpoint_is_refused_by_whoever_reads_it(kept, tmp_path):
    private = tmp_path / "private"
    private.write_bytes(b"nobody else's")
    run = save_run(tmp_path / "run", 1)
    (file, *_) = (path for path in (run / "checkpoints" / "1" / "state" / "d").iterdir())
    file.unlink()
    file.symlink_to(private)
    with pytest.raises(
        CheckpointError, match=r"state/d/\w+ is a link out of its checkpoint, to .*/private; put the file there"
    ):
        restoring.restore_params(run)
    checkpoints = Checkpoints(run, TrainConfig())
    with pytest.raises(CheckpointError, match="is a link out of its checkpoint"):
        checkpoints.restore(abstract())
    checkpoints.close()
    assert not (run / "damaged").exists()


def test_links_to_whole_checkpoints_and_within_them_are_followed(saved, tmp_path):
    elsewhere = shutil.move(saved / "checkpoints", tmp_path / "large_disk")
    (saved / "checkpoints").symlink_to(elsewhere)
    (saved / "checkpoints" / "3" / "data" / "metadata").rename(saved / "checkpoints" / "3" / "kept")
    (saved / "checkpoints" / "3" / "data" / "metadata").symlink_to("../kept")
    restored = Checkpoints(saved, TrainConfig(keep=2)).restore(abstract())
    assert restored is not None
    assert int(restored[0].step) == 3


@pytest.mark.parametrize(
    "content",
    [
        '{"step": "3", "examples": [1], "checkpoint": 0, "loss": 1.0, "grad_norm": 1.0}',
        '{"step": 3, "examples": [1], "checkpoint": "../../3", "loss": 1.0, "grad_norm": 1.0}',
        '{"step": 3, "examples": ["/etc/passwd"], "checkpoint": 0, "loss": 1.0, "grad_norm": 1.0}',
        '{"step": 3, "examples": 1, "checkpoint": 0, "loss": 1.0, "grad_norm": 1.0}',
        '{"step": 3, "examples": [1], "checkpoint": -1, "loss": 1.0, "grad_norm": 1.0}',
        '{"step": 3, "examples": [1], "checkpoint": 0, "loss": [], "grad_norm": 1.0}',
        "[]",
    ],
)
def test_a_bundle_holds_numbers(content, tmp_path):
    file = tmp_path / "step-3.json"
    file.write_text(content)
    with pytest.raises(ReplayError, match="is not a replay bundle"):
        read_bundle(file)


def test_lines_that_are_no_records_of_ours_are_passed_over(tmp_path):
    good = [
        {"time": 1.0, "event": "start", "command": []},
        {"time": 2.0, "event": "resume", "step": 0},
        {"time": 9.0, "event": "time", "step": 4, "seconds": {"step": 7.0}},
    ]
    bad = [
        *(
            {},
            {"event": "start"},
            {"time": "now", "event": "start"},
            {"time": 3.0, "event": "resume"},
            {"time": 3.0, "event": []},
        ),
        *({"time": 3.0, "event": "time", "step": 1}, {"time": 3.0, "event": "time", "step": 1, "seconds": {"tea": 1}}),
    ]
    lines = [*bad[:3], good[0], *bad[3:], *good[1:]]
    (tmp_path / "journal.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "metrics.jsonl").write_text('{"step": "9"}\n{"step": 1}\n{"step": [2]}\n')
    (tmp_path / "quarantine.jsonl").write_text('{"index": [1]}\n{"index": 5}\n')
    assert read_journal(tmp_path) == good
    assert add_up(read_journal(tmp_path)).seconds["step"] == 7.0
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert Quarantine(tmp_path, 1.0, 10)._known == {5}
