"""Templates and spans: equal to the prompts recorded from the official code, and right where that code is not."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepstack_jax.data.encode.templates import TEMPLATES, get_template, images_to_front, render
from deepstack_jax.data.example import ConversationError, Message
from deepstack_jax.data.formats.styles import RecordError, to_example
from tests.unit.made_examples import turns_of

GOLDEN = Path(__file__).parents[1] / "golden" / "conversation"
PREPROCESS = json.loads((GOLDEN / "preprocess.json").read_text())
PROMPTS = json.loads((GOLDEN / "inference_prompts.json").read_text())
QUESTION, ANSWER = Message("human", "<image>\nWhat is it?"), Message("gpt", "A dog.")


def case_id(case):
    return "-".join(str(case[key]) for key in ("name", "version", "tokenizer", "model_max_length"))


@pytest.mark.parametrize("case", PREPROCESS, ids=case_id)
def test_normalised_turns_and_prompt_equal_the_official_ones(case):
    template = get_template(case["version"])
    messages = (
        images_to_front(turns_of(case["conversations"]), template) if case["has_image"] else turns_of(case["conversations"])
    )
    official = [(turn["from"], turn["value"]) for turn in case["after_preprocess_multimodal"]]
    assert [(message.role, message.text) for message in messages] == official
    if case["prompt"] is None:
        assert template.caption
    elif case["name"] == "empty_answer_then_more":
        # upstream leaves out the end of turn of an empty answer; ours keeps it, and is otherwise the same text
        ours = render(messages, template.prompting or template)
        start, end = ours.spans[0]
        assert ours.text[:start] + ours.text[end:] == case["prompt"]
    else:
        assert render(messages, template.prompting or template).text == case["prompt"]


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case["version"])
def test_generation_prompt_equals_the_official_one(case):
    assert render([QUESTION], get_template(case["version"]), complete=False).text == case["prompt"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_stands_before_the_first_trained_character(name):
    template = TEMPLATES[name].prompting or TEMPLATES[name]
    full = render([QUESTION, ANSWER, Message("human", "Sure?"), Message("gpt", "")], template)
    first = render([QUESTION], template, complete=False).text
    second = render([QUESTION, ANSWER, Message("human", "Sure?")], template, complete=False)
    assert full.text[: full.spans[0][0]] == first
    assert full.text[: full.spans[1][0]] == second.text
    assert second.spans == full.spans[:1]


@given(
    st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=4), st.sampled_from(sorted(TEMPLATES))
)
def test_every_span_is_one_answer_with_its_end_of_turn(exchanges, name):
    template = TEMPLATES[name]
    if template.caption:
        exchanges = [("<image>", exchanges[0][1])]
    messages = [message for q, a in exchanges for message in (Message("human", q), Message("gpt", a))]
    rendered = render(messages, template)
    spoken = [rendered.text[start:end] for start, end in rendered.spans]
    assert spoken == [template.lead + answer + template.end for _, answer in exchanges]
    silent = rendered.text
    for start, end in reversed(rendered.spans):
        silent = silent[:start] + silent[end:]
    fixed = template.start + "".join(template.again * (i > 0) + q + template.ask for i, (q, _) in enumerate(exchanges))
    assert silent == fixed + template.tail


def test_several_images_in_a_turn_keep_their_count():
    turn = Message("human", "first <image> then <image> what?")
    assert images_to_front([turn], TEMPLATES["v1"])[0].text == "<image>\n<image>\nfirst  then  what?"
    assert images_to_front([Message("human", " <image> ")], TEMPLATES["v1"])[0].text == "<image>"
    tagged = images_to_front([Message("human", "what? <image>")], TEMPLATES["v1_mmtag"])[0].text
    assert tagged == "<Image><image></Image>\nwhat?"
    assert render([turn, ANSWER], TEMPLATES["plain"]).text == "<image><image>A dog.\n"


@given(st.text(max_size=20), st.integers(0, 3))
def test_normalising_twice_changes_nothing(text, images):
    once = images_to_front([Message("human", text + "<image>" * images)], TEMPLATES["v1"])
    assert images_to_front(once, TEMPLATES["v1"]) == once
    assert once[0].text.count("<image>") == (text + "<image>" * images).count("<image>")


def test_a_text_without_images_is_not_touched():
    assert images_to_front([Message("human", "  spaced \n")], TEMPLATES["v1"])[0].text == "  spaced \n"


def test_an_empty_answer_is_kept_and_trained():
    rendered = render([QUESTION, Message("gpt", ""), Message("human", "Again?"), ANSWER], TEMPLATES["v1"])
    assert rendered.text.endswith("USER: <image>\nWhat is it? ASSISTANT: </s>USER: Again? ASSISTANT: A dog.</s>")
    assert [rendered.text[start:end] for start, end in rendered.spans] == [" </s>", " A dog.</s>"]


def test_a_leading_answer_is_dropped():
    """Upstream drops it too, but in template v0, which would train on an answer to nothing, and in plain, which fails."""
    for template in (TEMPLATES["v1"], TEMPLATES["v0"], TEMPLATES["plain"]):
        assert render([Message("gpt", "Hello!"), QUESTION, ANSWER], template) == render([QUESTION, ANSWER], template)


def test_direct_has_nothing_but_question_and_answer():
    rendered = render([Message("human", "which color"), Message("gpt", "red")], TEMPLATES["direct"])
    assert (rendered.text, rendered.spans) == ("which color red", ((11, 15),))


@pytest.mark.parametrize(
    ("messages", "complete", "said"),
    [
        ([QUESTION, QUESTION, ANSWER], True, "turn 1: got 'human', expected 'gpt'"),
        ([ANSWER, ANSWER, QUESTION], True, "turn 1: got 'gpt', expected 'human'"),
        ([QUESTION], True, "ends with 'human' at turn 0"),
        ([ANSWER, QUESTION, ANSWER], False, "ends with 'gpt' at turn 2"),
        ([ANSWER], True, "no human turn"),
        ([], False, "no human turn"),
    ],
)
def test_wrong_turns_are_refused_by_number(messages, complete, said):
    with pytest.raises(ConversationError, match=said):
        render(messages, TEMPLATES["v1"], complete=complete)


@pytest.mark.parametrize("messages", [[Message("human", "no picture"), ANSWER], [QUESTION, ANSWER, QUESTION, ANSWER]])
def test_a_caption_template_takes_one_exchange_with_an_image(messages):
    with pytest.raises(ConversationError, match="expected one human turn with <image>"):
        render(messages, TEMPLATES["plain"])


@pytest.mark.parametrize("turn", [{"from": "system", "value": "x"}, {"from": "human"}, {"from": "gpt", "value": None}])
def test_a_malformed_turn_is_refused_by_number(turn):
    with pytest.raises(RecordError, match=r"turn 1(: got| is a system prompt)"):
        to_example({"conversations": [{"from": "human", "value": "q"}, turn]}, 0, "")


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(ValueError, match="unknown template 'phi3_instuct'; nearest valid: 'phi3_instruct'"):
        get_template("phi3_instuct")
