"""The injection laboratory: its table, the rule of its verdicts, what is never done twice, and the page made of results."""

import math
import shutil
from dataclasses import replace

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study import train
from benchmarks.study.report import page, write
from benchmarks.study.results import WINDOW, Run, add_run, digest_of, read_runs
from benchmarks.study.table import CARDS, CLAIMS, LINES, ROWS, SMOLLM2, Claim, above, near
from benchmarks.study.train import Job, RunError
from benchmarks.study.verdict import (
    BY_SPEED,
    CONTRADICTED,
    IN_PART,
    NOT_SHOWN,
    PART_CONTRADICTED,
    SHOWN,
    TOO_FEW,
    interval,
    judge,
    judge_claim,
)
from deepstack_jax.data.cards import KINDS
from deepstack_jax.printing import Console
from tests.docs.blocks import of_text, unfenced
from tests.e2e.verb import REPOSITORY, ask_fork, read_json, verb

TINY = {
    "vision.width": 8,
    "vision.layers": 2,
    "vision.heads": 2,
    "vision.mlp": 16,
    "decoder.width": 16,
    "decoder.layers": 5,
    "decoder.mlp": 16,
    "decoder.heads": 2,
    "decoder.kv_heads": 2,
    "decoder.head_dim": 8,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.log_every": 1,
    "evaluation.examples": 12,
    "evaluation.batch_size": 4,
}
RUN = Run(
    study="cards",
    row="deepstack",
    seed=0,
    digest="",
    data="",
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
    at_once=1,
    cores=2,
    versions={"jax": "0"},
)


def of_job(run, size="cpu"):
    """The run as one of what the table is today."""
    job = Job(CARDS, size, ROWS[run.row], run.seed)
    return replace(run, digest=job.digest, data=job.data)


def tiny_job(of, row, folder, **changes):
    """A job of a row of a study whose base is made tiny."""
    file = folder / "tiny.py"
    file.write_text(f"""import runpy

def get_config(size):
    config = runpy.run_path({str(REPOSITORY / of.base)!r})["get_config"](size)
    config.update_from_flattened_dict({TINY | changes})
    return config
""")
    return Job(replace(of, base=str(file)), "cpu", of.rows[row], 0)


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


@pytest.mark.parametrize("of", [LINES, SMOLLM2], ids=lambda of: of.name)
def test_rows_of_real_images_differ_in_what_is_compared_and_in_nothing_else(of):
    low, deepstack, string = (Job(of, "cpu", row, 0).config for row in of.rows.values())
    for config in (low, string):
        assert (config.vision, config.projector, config.decoder) == (deepstack.vision, deepstack.projector, deepstack.decoder)
        assert (config.optimizer, config.train, config.data.sets) == (deepstack.optimizer, deepstack.train, deepstack.data.sets)
    assert (low.layout.groups, deepstack.layout.groups, string.layout.groups) == (0, 4, 0)
    assert (low.layout.max_tokens, string.layout.max_tokens) == (64, 5 * 64)
    assert string.data.max_length - deepstack.data.max_length == 4 * 64
    for row in of.rows.values():
        assert Job(of, "gpu", row, 0).digest != Job(of, "cpu", row, 0).digest


def test_rows_whose_data_are_not_there_are_left_out_and_said(tmp_path, trained, monkeypatch, capsys):
    monkeypatch.setattr(train, "REPOSITORY", tmp_path)
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    assert ask(tmp_path, "--only=lines_,smollm2_,baseline", "--seeds=1") == 0
    assert trained[0] == ["baseline-0"]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("left out: rows of lines, for runs/study/lines-data is not there; python -m benchmarks.study.l")
    assert said[1].startswith("left out: rows of smollm2, for runs/study/lines-data is not there")
    (tmp_path / "runs/study/lines-data").mkdir(parents=True)
    (tmp_path / "runs/study/pretrained/language").mkdir(parents=True)
    assert ask(tmp_path, "--only=lines_baseline,smollm2_", "--seeds=1") == 0
    assert trained[0] == ["baseline-0", "lines_baseline-0"]
    left_out, *_ = capsys.readouterr().out.splitlines()
    assert "runs/study/pretrained/cpu/clip is not there; python -m deepstack_jax.convert --from=WORKDIR --to=runs/" in left_out


def test_claims_compare_rows_that_are_there_and_shown():
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert set(claim.rows) <= set(ROWS)
        for comparison in claim.comparisons:
            assert {comparison.first.row, comparison.second.row} <= set(claim.rows)
    assert {name for claim in CLAIMS for name in claim.rows} == set(ROWS)


def test_the_interval_is_student_s():
    """Mean 0.2, deviation 0.1, n = 3: t = 4.303 of the published tables; 2.131 for 15 degrees of freedom."""
    assert interval([0.1, 0.2, 0.3]) == pytest.approx((0.2, 4.303 * 0.1 / math.sqrt(3)), rel=1e-4)
    assert interval([0.0, 1.0] * 8) == pytest.approx((0.5, 2.131 * math.sqrt(4 / 15) / 4), rel=1e-3)
    assert interval([0.1]) == (0.1, math.inf)


@pytest.mark.parametrize(
    ("first", "second", "comparison", "expected"),
    [
        ([0.9, 0.91, 0.92], [0.5, 0.52, 0.51], above, SHOWN),
        ([0.5, 0.52, 0.51], [0.9, 0.91, 0.92], above, CONTRADICTED),
        ([0.9, 0.5, 0.7], [0.5, 0.6, 0.4], above, NOT_SHOWN),  # more in the mean, within the noise
        ([0.91, 0.92, 0.93], [0.9, 0.91, 0.92], above, NOT_SHOWN),  # sure, and too little
        ([0.9, 0.9], [0.1, 0.1], above, TOO_FEW),
        ([0.9, 0.91, 0.92], [0.91, 0.93, 0.92], near, SHOWN),
        ([0.99, 0.98, 0.99], [0.5, 0.52, 0.51], near, SHOWN),
        ([0.7, 0.71, 0.72], [0.9, 0.91, 0.92], near, CONTRADICTED),
        ([0.8, 0.95, 0.9], [0.9, 0.9, 0.95], near, NOT_SHOWN),
        ([], [0.9], near, TOO_FEW),
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


@pytest.mark.parametrize(("later", "verdict"), [(1, NOT_SHOWN), (3, BY_SPEED)])
def test_a_speed_within_a_tenth_is_no_difference(later, verdict):
    """90% at step 200, and at 210 and 230: sure, as no seed differs, but worth a claim from 1.1 times on."""
    curves = {"a": 20, "b": 20 + later}
    runs = {
        key: replace(run, curve=[(10 * at, 0.95 if at > curves[key[1]] - WINDOW else 0.0) for at in range(1, 30)])
        for key, run in runs_of(a=[0.99, 0.98, 0.99], b=[0.99, 0.99, 0.98]).items()
    }
    assert judge(above("a", "b", speed=True), runs, "cards").verdict == verdict


def test_a_claim_holds_in_part_where_its_comparisons_disagree():
    claim = Claim("c", "", "", ("a", "b", "c"), (above("a", "b"), above("b", "c")))
    good, bad = [0.9, 0.91, 0.92], [0.1, 0.12, 0.11]
    assert judge_claim(claim, runs_of(a=good, b=bad, c=good), "cards")[0] == PART_CONTRADICTED
    assert judge_claim(claim, runs_of(a=bad, b=good, c=[0.97, 0.98, 0.99]), "cards")[0] == CONTRADICTED
    assert judge_claim(claim, runs_of(a=good, b=bad, c=bad), "cards")[0] == IN_PART
    assert judge_claim(claim, runs_of(a=good, b=good, c=good), "cards")[0] == NOT_SHOWN
    assert judge_claim(claim, runs_of(a=good, b=bad), "cards")[0] == TOO_FEW
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
    """Names of the runs that were trained, by something that is quicker than training; those of `failing` raise its errors."""
    names, failing = [], {}

    def stand_in(job, folder, at_once=1):
        names.append(job.name)
        if job.name in failing:
            raise failing[job.name]
        return replace(RUN, row=job.row.name, seed=job.seed, digest=job.digest, data=job.data)

    monkeypatch.setattr(study, "train", stand_in)
    return names, failing


def ask(tmp_path, *flags):
    return study.main([f"--runs={tmp_path}", f"--results={tmp_path / 'results.jsonl'}", *flags])


def test_a_row_is_never_trained_twice_and_a_failed_one_again(tmp_path, trained, capsys):
    names, failing = trained
    failing |= {"dummy-0": KeyError("steps"), "baseline-1": RunError("baseline-1 ended with exit code 1")}
    assert ask(tmp_path, "--only=baseline,dummy", "--seeds=2") == 1
    assert names == ["baseline-0", "dummy-0", "baseline-1", "dummy-1"]
    printed = capsys.readouterr().out
    assert "failed: baseline-1 ended with exit code 1" in printed
    assert "failed: dummy-0: KeyError('steps')" in printed
    names.clear()
    failing.clear()
    assert ask(tmp_path, "--only=baseline,dummy", "--seeds=2", "--jobs=2") == 0
    assert sorted(names) == ["baseline-1", "dummy-0"]
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


def test_quick_trains_the_headline_rows_with_cards_of_their_own(tmp_path, trained, capsys, monkeypatch):
    names, _ = trained
    monkeypatch.setattr(study, "committed", lambda size: tmp_path / f"nothing-{size}.jsonl")
    assert ask(tmp_path, "--quick") == 0
    assert names == [f"{name}-{study.QUICK_SEED}" for name, row in ROWS.items() if row.quick]
    assert "no runs to compare" in capsys.readouterr().out


def test_a_quick_run_is_compared_with_the_study_s_mean_and_spread():
    """0.5 beside 0.46 and 0.5 (mean 0.48, within the slack), and beside 0.8 and 0.82."""
    quick = {name: Job(CARDS, "cpu", ROWS[name], study.QUICK_SEED) for name in ("baseline", "deepstack", "dummy")}
    runs = {job.key: replace(RUN, row=name, seed=study.QUICK_SEED) for name, job in quick.items()}
    table = study.compared(list(quick.values()), runs, runs_of(baseline=[0.46, 0.5], deepstack=[0.8, 0.82]))
    assert list(table.columns[3].cells) == ["yes", "no", "no runs to compare"]
    assert list(table.columns[2].cells) == ["48.0% ± 2.8%", "81.0% ± 1.4%", "-"]


@pytest.mark.parametrize("flags", [["--only=bas,nothing"], ["--seeds=0"], ["--jobs=0"], ["--report", "--size=slice"]])
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
    runs = {key: of_job(run) for key, run in runs.items()}
    runs["cards", "deepstack", 0] = replace(
        runs["cards", "deepstack", 0], at_once=2, cores=1, seconds_per_step=0.5, versions={"jax": "1"}
    )
    assert write(runs, Console(), folder=tmp_path) == 0
    text = (tmp_path / "study.md").read_text()
    assert text == page(runs)
    assert f"**Not finished**: 15 of {3 * len(ROWS)} runs are done" in text
    assert "| [High resolution in the stack](#high-resolution-in-the-stack) | **holds** |" in text
    assert "| [Information, not additions](#information-not-additions) | **contradicted in part** |" in text
    assert "| [Order of sampling](#order-of-sampling) | **too few runs yet** |" in text
    assert "| DeepStack-L more than nothing in the sequence, low-res injected | +0.0% ± 0.0% | not shown |" in text
    assert "| DeepStack-L | 96.0% ± 1.0% |" in text
    assert "the mean is 0.02 or more" in text
    assert "0.500 (2 at once), 0.250 (1 at once)" in text
    assert "1 run at once of 2 cores each, or 2 runs at once of 1 core each" in text
    assert text.endswith("Versions: jax 0 and 1.\n")
    for name in ("scores", "curves"):
        assert f"images/study-{name}.png" in text
        assert (tmp_path / "images" / f"study-{name}.png").stat().st_size > 5000
    assert {block.language for block in of_text("study.md", text)} == {"sh"}
    assert unfenced(text) == []


def test_the_larger_size_has_a_page_of_its_own(tmp_path):
    runs = {key: of_job(run, "gpu") for key, run in runs_of(deepstack=[0.9], baseline=[0.1]).items()}
    assert write(runs, Console(), "gpu", tmp_path) == 0
    text = (tmp_path / "study-gpu.md").read_text()
    assert "configs/study.py:gpu" in text
    assert "results_gpu.jsonl" in text
    assert "(images/study-gpu-curves.png)" in text
    assert (tmp_path / "images" / "study-gpu-scores.png").exists()
    assert not (tmp_path / "study.md").exists()


def test_runs_of_another_configuration_are_left_out_and_said(tmp_path, capsys):
    old = {key: replace(of_job(run), data="of other cards") for key, run in runs_of(baseline=[0.1]).items()}
    assert write(old | {key: of_job(run) for key, run in runs_of(deepstack=[0.9]).items()}, Console(), folder=tmp_path) == 0
    assert "left out: 1 run of configurations" in capsys.readouterr().out
    assert "| low-res alone (LLaVA's form) | - |" in (tmp_path / "study.md").read_text()
    assert write(old, Console(), folder=tmp_path / "none") == 1
    assert not (tmp_path / "none").exists()


def test_no_run_is_no_page(tmp_path, capsys):
    assert write({}, Console(), folder=tmp_path) == 1
    assert "nothing to write" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_finished_workdir_is_read(tmp_path):
    """Two steps of a tiny model on cards: what is kept is what its files and the plan say."""
    job = tiny_job(CARDS, "deepstack", tmp_path)
    workdir = tmp_path / job.folder
    done = verb("train", *job.command(workdir)[2:])
    assert done.returncode == 0, done.stderr
    run = train.read_run(job, workdir, 12.34, at_once=2)
    assert job.is_of(run)
    assert run.scores.keys() == set(KINDS)
    assert [step for step, _ in run.curve] == [1, 2]
    assert (run.steps, run.context, run.visual, run.seconds, run.at_once) == (2, 35, 45, 12.3, 2)
    assert run.parameters > 1000
    assert run.flops > 6 * run.parameters * 35  # of one row, forward and backward
    assert run.memory > 16 * run.parameters
    assert read_json(workdir / "results.json")["scores"]["exact_match"]["by_kind"] == pytest.approx(run.scores, abs=1e-4)
    (workdir / "results.json").unlink()
    with pytest.raises(RunError, match="has no scores"):
        train.read_run(job, workdir, 1.0)
