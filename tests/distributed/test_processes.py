"""Several real processes: the same run as one, and what becomes of it when one of them dies or is told to stop."""

import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from deepstack_jax.errors import ConfigError
from deepstack_jax.parallel.processes import join_processes
from tests.distributed.several import free_port, train_in, trainers, workers
from tests.e2e.receipts import draw_receipts
from tests.e2e.test_train import RECEIPTS
from tests.e2e.verb import TIMEOUT, assert_same_bytes, losses, read_json, read_lines, saved_state, train

STEPS = 6
# 6 held-out examples over 2 or 4 processes: some have more questions than others.
DEMO = {
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "data.synthetic.questions": 4,
    "data.max_length": 24,
    "evaluation.every": 3,
    "evaluation.examples": 6,
    "evaluation.batch_size": 8,
}
MINUTE = 60


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of a run of one process."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    done = train("configs/demo.py", workdir, DEMO)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The workdir of a run of two processes that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    train_in(2, workdir, DEMO)
    return workdir


def assert_same_run(ours, theirs):
    """Losses, parameters and scores of two runs, up to the order of sums."""
    for step, (loss,) in losses(theirs).items():
        assert losses(ours)[step] == pytest.approx([loss], rel=1e-5, abs=1e-5), step
    a, b = saved_state(ours), saved_state(theirs)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_allclose(leaf, b[path], rtol=1e-3, atol=1e-4, err_msg=path)
    results = [read_json(workdir / "results.json") for workdir in (ours, theirs)]
    for name in ("scores", "questions", "bad_examples"):
        assert results[0][name] == results[1][name], name
    assert results[0]["validation_loss"] == pytest.approx(results[1]["validation_loss"], rel=1e-5)
    lines = [read_lines(workdir / "predictions.jsonl") for workdir in (ours, theirs)]
    margins = [[line.pop("margin") for line in found] for found in lines]
    assert margins[0] == pytest.approx(margins[1], rel=1e-3, abs=1e-3)
    assert lines[0] == lines[1]


def assert_same_files(ours, theirs):
    assert_same_bytes(saved_state(ours), saved_state(theirs))
    assert losses(ours) == losses(theirs)
    assert (ours / "predictions.jsonl").read_bytes() == (theirs / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize("number", [0, 1])
def test_processes_that_do_not_find_each_other_end_in_one_line(number):
    address = f"127.0.0.1:{free_port()}"
    code = "from deepstack_jax.parallel import processes; processes.CONNECT_SECONDS = 2; "
    code += f"processes.join_processes({address!r}, 2, {number})"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: process {number} of 2, coordinator {address}: not all processes of this run connected"
    )
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_coordinator_whose_port_is_taken_says_so():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{address}: process 0 cannot listen on port .* in use.*; choose a free one"):
            join_processes(address, 2, 0)


def test_two_processes_one_of_them_killed_end_like_one(alone, tmp_path):
    workdir = tmp_path / "killed"
    with trainers(2, workdir, DEMO) as run:
        run.wait_for(f"step 3/{STEPS} ")
        run.send(1, signal.SIGKILL)
        codes = run.codes(MINUTE)
        assert codes[1] == -signal.SIGKILL
        assert codes[0] not in (0, 75), codes
        assert "another process" in run.printed(0) or "another task died" in run.printed(0)
    again = train_in(2, workdir, DEMO)
    assert "resumed from step 2 " in again.printed(0)
    assert again.printed(1).count("step ") == 0  # the first process speaks for all
    assert_same_run(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_each_reads_its_part_and_no_example_comes_twice(count, tmp_path):
    with workers(count, "tests.distributed.reader", tmp_path) as run:
        assert run.codes() == [0] * count, run.printed(0)
    found = [read_json(tmp_path / f"{number}.json") for number in range(count)]
    seen = [row for one in found for batch in one["rows"] for row in batch]
    assert sorted(seen) == list(range(48)), "an epoch holds every example once"
    for one in found:
        assert sorted(one["asked"]) == sorted(row for batch in one["rows"] for row in batch)
        total = count * (count - 1) / 2
        assert one["said"] == [["é" * n for n in range(count)], count - 1, {"one": count, "me": total}, "host 0"]


@pytest.mark.slow
def test_four_processes_end_like_one(alone, tmp_path):
    train_in(4, tmp_path / "four", DEMO)
    assert_same_run(tmp_path / "four", alone)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"mesh.data": 1, "mesh.tensor": 4}, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}])
def test_parameters_over_processes(mesh, alone, tmp_path):
    """Two processes of two devices: with four along tensor both hold the same rows, and read them both."""
    train_in(2, tmp_path / "cut", DEMO | mesh | {"decoder.vocab_size": 64}, devices=2)
    done = train("configs/demo.py", tmp_path / "whole", DEMO | {"decoder.vocab_size": 64})
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_whoever_is_killed_and_whenever_it_ends_at_the_same_bytes(attempt, two, tmp_path):
    """The first or the second process, while it trains, saves or evaluates."""
    workdir, victim, step = tmp_path / "killed", attempt % 2, 1 + attempt // 2
    with trainers(2, workdir, DEMO) as run:
        run.wait_for(f"step {step}/{STEPS} ")
        run.send(victim, signal.SIGKILL)
        codes = run.codes(MINUTE)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] not in (0, 75), codes
    train_in(2, workdir, DEMO)
    assert_same_files(workdir, two)


@pytest.mark.slow
def test_a_process_that_hangs_stops_the_others_within_a_minute(tmp_path):
    with trainers(2, tmp_path / "hung", DEMO | {"train.steps": 1000}) as run:
        run.wait_for("step 3/1000 ")
        run.send(1, signal.SIGSTOP)
        codes = run.codes(MINUTE, but=[1])
        assert codes[0] not in (0, 75, None), codes
        assert "heartbeat" in run.printed(0)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_told_one_all_save_at_one_step(number, code, two, tmp_path):
    workdir = tmp_path / "told"
    with trainers(2, workdir, DEMO) as run:
        run.wait_for(f"step 2/{STEPS} ")
        run.send(1, number)
        assert run.codes() == [75, code], run.printed(0)
        assert "state saved; the same command goes on from here" in run.printed(0)
    saved = int(saved_state(workdir)["['step']"])
    again = train_in(2, workdir, DEMO)
    assert f"resumed from step {saved} " in again.printed(0)
    assert_same_files(workdir, two)


def test_told_before_the_first_step_they_stop_there(tmp_path):
    with workers(2, "tests.distributed.stopper", tmp_path) as run:
        assert run.codes(MINUTE) == [0, 0], run.printed(0)
    assert [(tmp_path / f"{number}.txt").read_text() for number in (0, 1)] == ["[True, False, False]"] * 2


@pytest.mark.slow
def test_told_while_they_resume_they_stop_where_they_were(two, tmp_path):
    workdir = tmp_path / "told"
    with trainers(2, workdir, DEMO) as run:
        run.wait_for(f"step 3/{STEPS} ")
        run.send(0, signal.SIGTERM)
        assert run.codes(MINUTE) == [75, 75], run.printed(0)
    saved = int(saved_state(workdir)["['step']"])
    with trainers(2, workdir, DEMO | {"train.keep": 3}) as run:
        run.wait_for("goes on with another train.keep")
        run.send(1, signal.SIGTERM)
        assert run.codes(MINUTE) == [75, 75], run.printed(0)
    assert f"stopped at step {saved}, state saved" in run.printed(0)
    train_in(2, workdir, DEMO)
    assert_same_files(workdir, two)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_told_in_the_last_step_they_end_before_they_evaluate(number, code, two, tmp_path):
    workdir = tmp_path / "told"
    with trainers(2, workdir, DEMO) as run:
        run.wait_for(f"step {STEPS}/{STEPS} ")  # saving it comes next
        run.send(1, number)
        assert run.codes(MINUTE) == [75, code], run.printed(0)
        assert f"stopped at step {STEPS}, state saved" in run.printed(0)
    assert not (workdir / "results.json").exists()
    train_in(2, workdir, DEMO)
    assert_same_files(workdir, two)


@pytest.mark.slow
@pytest.mark.parametrize("told", [(0, 1), (1,)])
def test_told_in_the_last_evaluation_they_end_and_evaluate_again(told, two, tmp_path):
    """All of them, as a scheduler does it, or one, for which the other then waits in vain."""
    workdir = tmp_path / "told"
    with trainers(2, workdir, DEMO | {"evaluation.examples": 2000}) as run:
        run.wait_for(f"step {STEPS}/{STEPS} ")
        time.sleep(1)
        for number in told:
            run.send(number, signal.SIGTERM)
        assert run.codes(MINUTE) == [75 if number in told else 1 for number in (0, 1)], run.printed(0)
        assert "stopped with the state saved; the same command goes on from here" in run.printed(1)
    assert not (workdir / "results.json").exists()
    train_in(2, workdir, DEMO)
    assert_same_files(workdir, two)


@pytest.mark.slow
def test_what_cannot_be_read_is_judged_by_all_together(tmp_path):
    root = draw_receipts(tmp_path / "data", train=6, validation=2)
    broken = root / "images" / "train2.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    changes = RECEIPTS | {"data.root": root, "train.batch_size": 6, "data.max_bad_fraction": 0}
    with trainers(2, tmp_path / "run", changes, "configs/receipts.py") as run:
        assert run.codes() == [1, 1], run.printed(0)
        for number in (0, 1):
            assert "error: 1 of 6 examples cannot be used" in run.printed(number)
