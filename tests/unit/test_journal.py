"""Where the time went: what an attempt spends, and what a kill makes a run do again."""

import json

import pytest

from deepstack_jax.printing import Console
from deepstack_jax.train.account.journal import Journal, read_journal
from deepstack_jax.train.account.report import LOST, ReportError, add_up, report


def record(event, time, **more):
    return {"event": event, "time": time, **more}


def test_time_is_counted_once_whoever_claims_it(tmp_path):
    now = [100.0]

    def goes_by(seconds: float) -> None:
        now[0] += seconds

    journal = Journal(tmp_path, lambda: now[0])
    journal.start({"command": ["train"]})
    goes_by(2)
    journal.begin_loop(0)
    with journal.spend("evaluation"):
        goes_by(3)
        with journal.spend("compile"):
            goes_by(5)
    with journal.spend("data"):
        goes_by(4)
    goes_by(6)
    assert journal.flush(3) == pytest.approx({"init": 2, "evaluation": 3, "compile": 5, "data": 4, "step": 6})
    assert sum(journal.flush(3).values()) == 0, "what was written does not count again"
    assert [line["event"] for line in read_journal(tmp_path)] == ["start", "resume", "time", "time"]


def test_steps_done_again_are_lost_and_what_came_before_is_not():
    """Killed at step 10, when the newest checkpoint was that of step 6: half of what the steps 3..10 took is done again."""
    spent = add_up(
        [
            record("start", 100.0),
            record("resume", 100.0, step=0),
            record("time", 110.0, step=2, seconds={"init": 4.0, "compile": 5.0, "step": 1.0}),
            record("time", 120.0, step=10, seconds={"step": 6.0, "data": 2.0, "checkpoint": 2.0}),
            record("start", 150.0),
            record("resume", 153.0, step=6),
            record("time", 160.0, step=10, seconds={"init": 3.0, "compile": 2.0, "step": 4.0, "data": 1.0}),
            record("stop", 160.0, step=10, why="done"),
        ]
    )
    assert (spent.attempts, spent.steps, spent.idle) == (2, 10, 30.0)
    assert spent.seconds[LOST] == pytest.approx(4.0)
    assert spent.seconds["step"] == pytest.approx(1 + 3 + 4)
    assert spent.seconds["data"] == pytest.approx(1 + 1)
    assert spent.seconds["checkpoint"] == pytest.approx(2.0)
    assert sum(spent.seconds.values()) == pytest.approx(30.0), "no second is lost or counted twice"
    assert spent.goodput == pytest.approx(8 / 30)


def test_work_is_lost_once_however_often_a_run_is_killed():
    lines = [record("start", 0.0), record("resume", 0.0, step=0), record("time", 10.0, step=10, seconds={"step": 10.0})]
    for attempt in range(3):
        lines += [record("start", 20.0 + attempt), record("resume", 20.0 + attempt, step=5)]
    spent = add_up(lines)
    assert spent.seconds[LOST] == pytest.approx(5.0)
    assert spent.seconds["step"] == pytest.approx(5.0)


def test_a_report_of_a_run_cut_in_the_middle_of_a_line(tmp_path, capsys):
    journal = Journal(tmp_path)
    journal.start({})
    journal.begin_loop(0)
    journal.flush(1)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"time": 1, "eve')
    metrics = [{"step": step, "loss": 1 / step, "grad_norm": float("nan"), "lr": 0.1} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    spent = report(tmp_path, Console(width=100))
    assert spent.steps == 1
    assert "1 steps, 1 attempt" in capsys.readouterr().out
    for name in ("time.png", "curves.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(ReportError, match=r"holds no run .*; name the --workdir of one"):
        report(tmp_path, Console())
