"""What the laboratory says of rows on real images: how often they run, their tables and their curves."""

from dataclasses import replace

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study.report import page, write
from benchmarks.study.table import LINES, SMOLLM2
from benchmarks.study.train import Job
from deepstack_jax.printing import Console
from tests.docs.blocks import of_text, run_shell, scratch_folder
from tests.unit.test_study import RUN, ask, of_job, runs_of

CURVE = [(20, 0.2), (40, 0.3), (60, 0.3125)]


@pytest.fixture(autouse=True)
def no_parts(monkeypatch):
    """Whatever this machine has of receipts and weights, no run is of other ones."""
    monkeypatch.setattr(Job, "missing", "")
    monkeypatch.setattr(Job, "data", "")


def real_runs(of, exact, seeds):
    """A run a row and seed."""
    scores = {"exact_match": exact, "character_errors": 0.75}
    jobs = [Job(of, "cpu", row, seed) for row in of.rows.values() for seed in range(seeds)]
    about = {"study": of.name, "scores": scores, "curve": CURVE}
    return {job.key: replace(RUN, row=job.row.name, seed=job.seed, digest=job.digest, **about) for job in jobs}


def test_a_row_of_a_study_of_one_seed_is_run_once(tmp_path, monkeypatch):
    names = []

    def stand_in(job, folder, at_once=1):
        names.append(job.name)
        return replace(RUN, study=job.study.name, row=job.row.name, seed=job.seed, digest=job.digest)

    monkeypatch.setattr(study, "train", stand_in)
    assert ask(tmp_path, "--only=lines_baseline,smollm2_baseline") == 0
    assert names == ["lines_baseline-0", "smollm2_baseline-0", "lines_baseline-1", "lines_baseline-2"]


def test_rows_on_real_images_have_tables_and_curves_of_their_own(tmp_path):
    cards = {key: of_job(run) for key, run in runs_of(deepstack=[0.9]).items()}
    runs = cards | real_runs(LINES, 0.25, 3) | real_runs(SMOLLM2, 0.0, 1)
    assert write(runs, Console(), folder=tmp_path) == 0
    text = (tmp_path / "study.md").read_text()
    _, found = text.split("## Real images")
    lines, smollm2 = found.split("**SmolLM2-135M-Instruct**: ")
    row = "| DeepStack-L | 25.0% ± 0.0% | 75.0% ± 0.0% | 31.2% ± 0.0% | 1,000,000 | 1.0 | 16 | 0.250 |"
    assert row in lines
    assert row.replace("25.0%", "0.0%").replace(" ± 0.0%", "") in smollm2
    assert "30 steps of 16 examples" in lines
    assert "30 steps of 4 examples; scores of 24\nheld-out examples, three lines each; 1 seed. **Not learnt here**" in smollm2
    assert "Not learnt" not in lines
    assert (tmp_path / "images" / "study-real.png").stat().st_size > 5000
    assert "(images/study-real.png)" in text
    assert "Not run yet" in page(cards).split("## Real images")[1]
    done, calls = run_shell(list(of_text("study.md", text)), scratch_folder(tmp_path / "clone"))
    assert done.returncode == 0, done.stderr
    assert [call.words[2] for call in calls][-1] == "benchmarks.study"
