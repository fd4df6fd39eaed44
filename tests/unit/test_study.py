"""The injection laboratory: its table, the rule of its verdicts, what is never done twice, and the page made of results."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study import train
from benchmarks.study.report import page, write
from benchmarks.study.results import Run, add_run, digest_of, read_runs
from benchmarks.study.table import CARDS, CLAIMS, DIGITS, LINES, ROWS, Claim, above, near
from benchmarks.study.train import Job, RunError
from benchmarks.study.verdict import (
    BY_SPEED,
    CONTRADICTED,
    IN_PART,
    NO_RUNS,
    NOT_SHOWN,
    PART_CONTRADICTED,
    SHOWN,
    interval,
    judge,
    judge_claim,
)
from deepstack_jax.data.cards import KINDS
from deepstack_jax.printing import Console
from tests.docs.blocks import of_text, unfenced
from tests.e2e.verb import ask_fork

RUN = Run(
    study="cards",
    row="deepstack",
    seed=0,
    digest="",
    changes={},
    scores=dict.fromkeys(KINDS, 0.5),
    curve=[(10, 0.1), (20, 0.3), (30, 0.5)],
    steps=30,
    parameters=10**6,
    context=56,
    visual=80,
    flops=1e9,
    memory=2.0**24,
    seconds_per_step=0.25,
    seconds=100.0,
    versions={"jax": "0"},
)


def runs_of(**scores):
    """Runs of rows by name, a score a seed."""
    made = [
        replace(RUN, row=row, seed=seed, scores=dict.fromkeys(KINDS, score))
        for row, by_seed in scores.items()
        for seed, score in enumerate(by_seed)
    ]
    return {(run.study, run.row, run.seed): run for run in made}


@pytest.fixture(scope="module")
def configs():
    return {name: Job(CARDS, "cpu", row, 0).config for name, row in ROWS.items()}


@pytest.mark.filterwarnings("ignore:.*never used")
def test_every_row_is_a_configuration_of_its_own(configs):
    assert len({digest_of(config) for config in configs.values()}) == len(ROWS)
    for name, row in ROWS.items():
        assert Job(CARDS, "gpu", row, 0).digest != digest_of(configs[name])


@pytest.mark.filterwarnings("ignore:.*never used")
def test_rows_differ_in_what_is_compared_and_in_nothing_else(configs):
    """Equal tower, projector, decoder, optimizer, training and questions; rows that lose groups say so."""
    base = configs["deepstack"]
    for name, config in configs.items():
        assert (config.vision, config.projector, config.decoder) == (base.vision, base.projector, base.decoder), name
        assert (config.optimizer, config.train, config.evaluation) == (base.optimizer, base.train, base.evaluation), name
        assert replace(config.data.cards, grids=((2, 2),), unseen=(), sharp=True) == base.data.cards, name
        groups, layers = config.layout.groups, config.decoder.layers
        tower = config.deepstack.tower_schedule(config.vision, groups)
        if config.deepstack.into in ("input", "channels"):
            continue  # all groups at once
        used = [group for group in tower or config.deepstack.decoder_schedule(layers, groups) if group >= 0]
        assert used == list(range(groups)) or ROWS[name].note, name


def test_rows_of_real_images_differ_in_what_is_compared_and_in_nothing_else():
    low, deepstack, string = (Job(LINES, "cpu", row, 0).config for row in LINES.rows.values())
    for config in (low, string):
        assert (config.vision, config.projector, config.decoder) == (deepstack.vision, deepstack.projector, deepstack.decoder)
        assert (config.optimizer, config.train, config.data.sets) == (deepstack.optimizer, deepstack.train, deepstack.data.sets)
    assert (low.layout.groups, deepstack.layout.groups, string.layout.groups) == (0, 4, 0)
    assert (low.layout.max_tokens, string.layout.max_tokens) == (64, 5 * 64)
    for row in LINES.rows.values():
        assert Job(LINES, "gpu", row, 0).digest != Job(LINES, "cpu", row, 0).digest


def test_rows_whose_data_are_not_there_are_left_out_and_said(tmp_path, trained, monkeypatch, capsys):
    monkeypatch.setattr(study, "REPOSITORY", tmp_path)
    assert ask(tmp_path, "--only=lines_,baseline", "--seeds=1") == 0
    assert trained[0] == ["baseline-0"]
    assert "left out: rows of lines, for runs/study/lines-data is not there" in capsys.readouterr().out


def test_claims_compare_rows_that_are_there_and_shown():
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert set(claim.rows) <= set(ROWS)
        for comparison in claim.comparisons:
            assert {comparison.first.row, comparison.second.row} <= set(claim.rows)
    assert {name for claim in CLAIMS for name in claim.rows} == set(ROWS)


def test_the_interval_is_student_s():
    """Mean 0.2, deviation 0.1, n = 3: t = 4.303 of the published tables."""
    assert interval([0.1, 0.2, 0.3]) == pytest.approx((0.2, 4.303 * 0.1 / math.sqrt(3)))
    assert interval([0.1]) == (0.1, math.inf)


@pytest.mark.parametrize(
    ("first", "second", "comparison", "expected"),
    [
        ([0.9, 0.91, 0.92], [0.5, 0.52, 0.51], above, SHOWN),
        ([0.5, 0.52, 0.51], [0.9, 0.91, 0.92], above, CONTRADICTED),
        ([0.9, 0.5, 0.7], [0.5, 0.6, 0.4], above, NOT_SHOWN),  # more in the mean, within the noise
        ([0.91, 0.92, 0.93], [0.9, 0.91, 0.92], above, NOT_SHOWN),  # sure, and too little
        ([0.9], [0.1], above, NOT_SHOWN),  # one seed has no spread
        ([0.9, 0.91, 0.92], [0.91, 0.93, 0.92], near, SHOWN),
        ([0.99, 0.98, 0.99], [0.5, 0.52, 0.51], near, SHOWN),
        ([0.7, 0.71, 0.72], [0.9, 0.91, 0.92], near, CONTRADICTED),
        ([0.8, 0.95, 0.9], [0.9, 0.9, 0.95], near, NOT_SHOWN),
        ([], [0.9], near, NO_RUNS),
    ],
)
def test_verdicts_follow_from_the_differences(first, second, comparison, expected):
    assert judge(comparison("a", "b"), runs_of(a=first, b=second), "cards").verdict == expected


def test_rows_that_end_alike_are_compared_by_speed_where_the_claim_is_one_of_learning():
    slow = [(10, 0.1), (20, 0.95), (30, 0.95), (40, 0.95), (50, 0.99), (60, 0.99)]
    quick = [(10, 0.95), (20, 0.95), (30, 0.95), (40, 0.99), (50, 0.99), (60, 0.99)]
    runs = {
        key: replace(run, curve=quick if key[1] == "a" else slow)
        for key, run in runs_of(a=[0.99, 0.98, 0.99], b=[0.99, 0.99, 0.98]).items()
    }
    assert runs["cards", "a", 0].reached() == 30
    assert runs["cards", "b", 0].reached() == 40
    assert judge(above("a", "b", speed=True), runs, "cards").verdict == BY_SPEED
    assert judge(above("b", "a", speed=True), runs, "cards").verdict == CONTRADICTED
    assert judge(above("a", "b"), runs, "cards").verdict == NOT_SHOWN
    assert RUN.reached() is None


def test_a_claim_holds_in_part_where_its_comparisons_disagree():
    claim = Claim("c", "", "", ("a", "b", "c"), (above("a", "b"), above("b", "c")))
    good, bad = [0.9, 0.91, 0.92], [0.1, 0.12, 0.11]
    assert judge_claim(claim, runs_of(a=good, b=bad, c=good), "cards")[0] == PART_CONTRADICTED
    assert judge_claim(claim, runs_of(a=bad, b=good, c=[0.97, 0.98, 0.99]), "cards")[0] == CONTRADICTED
    assert judge_claim(claim, runs_of(a=good, b=bad, c=bad), "cards")[0] == IN_PART
    assert judge_claim(claim, runs_of(a=good, b=good, c=good), "cards")[0] == NOT_SHOWN
    assert judge_claim(claim, runs_of(a=good, b=bad), "cards")[0] == NO_RUNS
    assert judge_claim(claim, runs_of(a=good, b=[0.5, 0.51, 0.53], c=bad), "cards")[0] == SHOWN


def test_results_come_back_and_a_run_takes_the_place_of_its_own(tmp_path):
    file = tmp_path / "results.jsonl"
    assert read_runs(file) == {}
    add_run(RUN, file)
    add_run(replace(RUN, seed=1), file)
    add_run(replace(RUN, seconds=5.0), file)
    found = read_runs(file)
    assert [run.seconds for run in found.values()] == [5.0, 100.0]
    assert found["cards", "deepstack", 1] == replace(RUN, seed=1)


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that were trained, by something that is quicker than training; those of `failing` fail."""
    names, failing = [], set()

    def stand_in(job, folder, cores=()):
        names.append(job.name)
        if job.name in failing:
            raise RunError(f"{job.name} ended with exit code 1")
        return replace(RUN, row=job.row.name, seed=job.seed, digest=job.digest)

    monkeypatch.setattr(study, "train", stand_in)
    return names, failing


def ask(tmp_path, *flags):
    return study.main([f"--runs={tmp_path}", f"--results={tmp_path / 'results.jsonl'}", *flags])


def test_a_row_is_never_trained_twice_and_a_failed_one_again(tmp_path, trained, capsys):
    names, failing = trained
    failing.add("dummy-1")
    assert ask(tmp_path, "--only=baseline,dummy", "--seeds=2") == 1
    assert names == ["baseline-0", "dummy-0", "baseline-1", "dummy-1"]
    assert "failed: dummy-1 ended with exit code 1" in capsys.readouterr().out
    names.clear()
    failing.clear()
    assert ask(tmp_path, "--only=baseline,dummy", "--seeds=2", "--jobs=2") == 0
    assert names == ["dummy-1"]
    names.clear()
    assert ask(tmp_path, "--only=baseline,dummy", "--seeds=2") == 0
    assert ask(tmp_path, "--only=baseline", "--seeds=2", "--list") == 0
    assert names == []
    assert "0 runs to do" in capsys.readouterr().out


def test_a_row_whose_configuration_changed_is_trained_again(tmp_path, trained):
    names, _ = trained
    add_run(replace(RUN, row="baseline", digest="of another configuration"), tmp_path / "results.jsonl")
    assert ask(tmp_path, "--only=baseline", "--seeds=1") == 0
    assert names == ["baseline-0"]


def test_quick_trains_the_headline_rows_with_cards_of_their_own(tmp_path, trained, capsys):
    names, _ = trained
    assert ask(tmp_path, "--quick") == 0
    assert names == [f"{name}-{study.QUICK_SEED}" for name, row in ROWS.items() if row.quick]
    assert "within its spread" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--only=bas,nothing"], ["--seeds=0"], ["--jobs=0"]])
def test_wrong_arguments_are_said(tmp_path, flags, trained):
    with pytest.raises(SystemExit) as ended:
        ask(tmp_path, *flags)
    assert ended.value.code == 2
    assert trained[0] == []


READ_FLAGS = """
import runpy, sys
from benchmarks.study.results import digest_of
from deepstack_jax import cli

run = cli.run
cli.run = lambda _, *rest: run(lambda: print(digest_of(cli.parse_config())) or 0, *rest)
sys.argv = {arguments}
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("row", ["wide_letterboxed", "groups_2", "taps"])
def test_what_is_typed_is_the_configuration_whose_digest_is_remembered(tmp_path, row):
    job = Job(CARDS, "cpu", ROWS[row], 2)
    code = READ_FLAGS.format(arguments=job.command(tmp_path / "run")[1:])
    done = ask_fork(code=code, folder=str(train.REPOSITORY), variables={})
    assert done["out"].split() == [job.digest], done


def test_the_page_says_what_the_numbers_say(tmp_path):
    high, low = [0.95, 0.96, 0.97], [0.1, 0.1, 0.11]
    runs = runs_of(deepstack=high, baseline=low, dummy=low, only_global=high, upsampled=low)
    assert write(runs, Console(), tmp_path) == 0
    text = (tmp_path / "study.md").read_text()
    assert text == page(runs)
    assert f"**Not finished**: 15 of {3 * len(ROWS)} runs are done" in text
    assert "| [High resolution in the stack](#high-resolution-in-the-stack) | **holds** |" in text
    assert "| [Information, not additions](#information-not-additions) | **contradicted in part** |" in text
    assert "| [Order of sampling](#order-of-sampling) | **not run yet** |" in text
    assert "| DeepStack-L more than nothing in the sequence, low-res injected | +0.0% ± 0.0% | not shown |" in text
    assert "| DeepStack-L | 96.0% ± 1.0% |" in text
    assert "the mean is 0.02 or more" in text
    for name in ("scores", "curves"):
        assert f"images/study-{name}.png" in text
        assert (tmp_path / "images" / f"study-{name}.png").stat().st_size > 5000
    assert {block.language for block in of_text("study.md", text)} == {"sh"}
    assert unfenced(text) == []


def test_no_run_is_no_page(tmp_path, capsys):
    assert write({}, Console(), Path(tmp_path)) == 1
    assert not (tmp_path / "study.md").exists()
    assert DIGITS == ("fine", "cued", "before")
