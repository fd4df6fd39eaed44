"""Scores against what the public definitions gave, recorded row by row; and what the table promises of every scorer."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepstack_jax.evaluate.scorers.texts import anls, levenshtein
from deepstack_jax.evaluate.tasks import SCORERS

GOLDEN = Path(__file__).parents[1] / "golden" / "scorers"
ROWS = json.loads((GOLDEN / "anls.json").read_text())
WORDS = st.text(alphabet="ab C", max_size=6)


def test_anls_is_lmms_evals():
    assert len(ROWS) == 356
    for row in ROWS:
        threshold = row["extra"].get("thresh_hold", 0.5)
        assert anls(row["pred"], row["refs"], threshold) == pytest.approx(row["score"], abs=1e-12), row


def test_anls_of_a_stripped_answer_is_the_tasks():
    """lmms-eval strips the answer, and not the references, before the score; so does what answers here."""
    rows = [row for row in ROWS if "task_head" in row["extra"]]
    assert len(rows) > 300
    for row in rows:
        assert SCORERS["anls"].score(row["pred"].strip(), row["refs"]) == pytest.approx(row["extra"]["task_head"], abs=1e-12), (
            row
        )


def test_anls_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="no reference"):
        anls("a", [])


@given(WORDS, WORDS, WORDS)
def test_levenshtein_is_a_distance(a, b, c):
    assert levenshtein(a, b) == levenshtein(b, a) <= max(len(a), len(b))
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
@pytest.mark.parametrize("name", SCORERS)
def test_every_score_lies_in_0_to_1_and_the_best_reference_counts(name, said, references):
    score = SCORERS[name].score
    assert score(said, references) == max(score(said, [reference]) for reference in references)
    assert 0 <= score(said, references) <= 1
    assert score(said, [*references, said]) == 1
    assert SCORERS[name].protocol


@pytest.mark.parametrize(("said", "reference", "score"), [("a b ", "\na b", 1), ("A", "a", 0), ("a.", "a", 0), ("", "", 1)])
def test_exact_match(said, reference, score):
    assert SCORERS["exact_match"].score(said, [reference]) == score
