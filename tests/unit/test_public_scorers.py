"""Every scorer against what the public definitions gave, recorded answer by answer, to the last digit."""

import json
import random
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from deepstack_jax.evaluate.scorers import choices, judged, mmmu, vqa
from deepstack_jax.evaluate.scorers.short_answers import gqa_exact_match, relaxed_accuracy
from deepstack_jax.evaluate.scorers.texts import binarised_anls, mp_docvqa_accuracy, mp_docvqa_anls
from deepstack_jax.evaluate.scorers.yes_no import pope_numbers, pope_paper_numbers, whole_answer, yes_or_no

GOLDEN = Path(__file__).parents[1] / "golden" / "scorers"


def rows(name: str, fewest: int) -> list[dict[str, Any]]:
    found = json.loads((GOLDEN / f"{name}.json").read_text())
    assert len(found) >= fewest
    return found


def wrong(found: list[dict[str, Any]], ours: Any, theirs: Any) -> list[Any]:
    """The first rows on which the two functions of a row differ."""
    return [(row["pred"], row["refs"], ours(row), theirs(row)) for row in found if ours(row) != theirs(row)][:5]


def test_vqa_normalisation_step_by_step():
    found = rows("answer_processor", 500)
    assert not wrong(found, lambda row: vqa.vqa_answer(row["pred"]), lambda row: row["score"])
    assert not wrong(found, lambda row: vqa.split_possessives(row["pred"]), lambda row: row["extra"]["word_tokenize"])
    assert not wrong(found, lambda row: vqa.replace_marks(row["pred"]), lambda row: row["extra"]["process_punctuation"])
    last = [row["extra"]["punct_then_digit_article"] for row in found]
    assert [vqa.replace_words(vqa.replace_marks(row["pred"])) for row in found] == last


def test_vqa_accuracy_of_textvqa_okvqa_and_vqav2():
    found = [row for row in rows("vqa_accuracy", 350) if row["refs"]]
    textvqa = [vqa.vqa_accuracy(vqa.vqa_answer(row["pred"]), row["refs"]) for row in found]
    assert textvqa == [row["score"] for row in found] == [row["extra"]["okvqa"] for row in found]
    answer = {row["pred"]: vqa.vqav2_answer(row["pred"]) for row in found}
    assert not wrong(found, lambda row: vqa.vqav2_accuracy(answer[row["pred"]], row["refs"]), lambda row: row["extra"]["vqav2"])
    paper = [vqa.vqav2_paper_accuracy(vqa.vqa_answer(row["pred"]), row["refs"]) for row in found]
    assert paper == [row["extra"]["vqav2_deepstack"] for row in found]


def test_a_question_without_answers_is_refused():
    with pytest.raises(ValueError, match="no reference"):
        vqa.vqa_accuracy("a", [])


def test_anls_as_the_papers_code_binarises_it():
    found = [row for row in rows("anls", 350) if "task_deepstack_binarised" in row["extra"]]
    assert len(found) > 300
    ours = [binarised_anls(row["pred"].strip(), row["refs"]) for row in found]
    assert ours == pytest.approx([row["extra"]["task_deepstack_binarised"] for row in found], abs=1e-12)


def test_mp_docvqa():
    found = rows("multidocvqa_anls", 200)
    assert [mp_docvqa_anls(row["pred"], row["refs"]) for row in found] == [row["score"] for row in found]
    assert [mp_docvqa_accuracy(row["pred"], row["refs"]) for row in found] == [row["extra"]["accuracy"] for row in found]


def test_relaxed_accuracy():
    found = rows("relaxed_accuracy", 440)
    assert not wrong(found, lambda row: relaxed_accuracy(row["pred"], row["refs"]), lambda row: row["score"])
    assert not wrong(
        found, lambda row: relaxed_accuracy(row["pred"].strip(), row["refs"]), lambda row: row["extra"]["task_head"]
    )


def test_gqa_exact_match():
    found = rows("gqa_exact_match", 200)
    assert not wrong(found, lambda row: gqa_exact_match(row["pred"], row["refs"]), lambda row: row["score"])
    assert not wrong(
        found, lambda row: gqa_exact_match(row["pred"].strip(), row["refs"]), lambda row: row["extra"]["task_head"]
    )


def test_pope_by_its_own_definition_and_by_the_papers_code():
    for row in rows("pope", 200):
        paper = pope_paper_numbers([whole_answer(said) for said in row["pred"]], row["refs"])
        assert paper == row["score"], row
        said = [yes_or_no(answer) for answer in row["pred"]]
        assert said == row["extra"]["llava_parsed"], row
        ours = pope_numbers(said, row["refs"])
        if isinstance(theirs := row["extra"]["llava"], dict):
            assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=1e-15), row
        else:
            assert 0.0 in ours.values(), row


def test_seed_and_ai2d_letters():
    found = rows("seed", 170)
    assert not wrong(found, lambda row: choices.first_letter(row["pred"]), lambda row: row["extra"]["parsed"])
    for row in found:
        letter = choices.first_letter(row["pred"])
        assert choices.same_letter(letter, row["refs"]) == row["score"], row
        assert choices.very_letter(letter, row["refs"]) == row["extra"]["deepstack"], row
    found = rows("ai2d", 180)
    scores = [gqa_exact_match(choices.ai2d_letter(row["pred"]), row["refs"]) for row in found]
    assert scores == [row["score"] for row in found]
    paper = [gqa_exact_match(row["pred"].strip(), row["refs"]) for row in found]
    assert paper == [row["extra"]["task_deepstack_no_filter"] for row in found]


def test_mmmu_letters():
    for row in rows("mmmu_multi_choice", 380):
        drawn = row["extra"]["random"]
        letter = mmmu.mmmu_letter(row["pred"], row["extra"]["options"], random.Random(42))
        assert letter == row["extra"]["parsed_seed42" if drawn else "parsed"], row
        gold = [row["refs"]] if isinstance(row["refs"], str) else row["refs"]
        assert mmmu.mmmu_accuracy(letter, gold) == (row["extra"]["score_seed42"] if drawn else row["score"]), row


def test_mmmu_open_answers():
    def told(found: list[str | float]) -> list[list[Any]]:
        numbers = [["f", one if abs(one) < float("inf") else str(one)] for one in found if isinstance(one, float)]
        return sorted([*numbers, *(["s", one] for one in found if isinstance(one, str))], key=str)

    for row in rows("mmmu_open", 340):
        gold = [row["refs"]] if isinstance(row["refs"], str) else row["refs"]
        parsed = mmmu.open_answers(row["pred"])
        assert told(parsed) == sorted(row["extra"]["parsed"], key=str), row
        assert mmmu.find_numbers(row["pred"]) == row["extra"]["numbers"], row
        assert mmmu.mmmu_accuracy(parsed, gold) == row["score"], row


def test_mmmu_numbers():
    for row in rows("mmmu_aggregate", 15):
        scores = [float(said == right) for said, right in zip(row["pred"], row["refs"], strict=True)]
        total, subjects = mmmu.mmmu_numbers(row["extra"]["ids"], scores)
        assert total == row["score"] == round(mean(scores), 5), row
        assert mmmu.mmmu_numbers(row["extra"]["ids"], scores, 3)[0] == row["extra"]["deepstack_round3"]
        assert set(subjects) == {mmmu.subject_of(one) for one in row["extra"]["ids"]}


def test_mmmu_disciplines_are_means_over_their_questions():
    subjects = [subject for names in mmmu.DISCIPLINES.values() for subject in names]
    assert len(subjects) == len(set(subjects)) == 30
    ids = [f"validation_{name}_{number}" for number, name in enumerate(("Art", "Art_Theory", "Art_Theory", "Math", "Cooking"))]
    found = mmmu.mmmu_disciplines(ids, [1.0, 1.0, 0.0, 0.0, 1.0])
    assert found == {"Art_and_Design": 0.66667, "Science": 0.0}


def test_mmvet_files():
    found = rows("mmvet_judge_input", 20)
    for row in found:
        if "prompt_after_header" in row["extra"]:
            line = judged.mmvet_judge_line(row["extra"]["question"], row["refs"][0], row["pred"])
            assert line == row["extra"]["prompt_after_header"]
    last = found[-1]
    replies = {f"v1_{number}": said for number, said in zip(last["refs"], last["pred"], strict=True)}
    assert judged.mmvet_file(replies) == last["score"]
