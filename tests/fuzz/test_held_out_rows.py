"""Held-out rows of any shape: each is asked, or left out by its id with one line, by every evaluator alike; none ends a run."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepstack_jax.api import LMM
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.data.open import open_files
from deepstack_jax.evaluate.ask import Asked, prepare
from deepstack_jax.evaluate.held_out import HeldOut, run_options
from deepstack_jax.evaluate.questions import check_questions, check_rows
from deepstack_jax.evaluate.tasks import Task
from deepstack_jax.families.build import build_model
from deepstack_jax.parallel.mesh import make_mesh
from tests.unit.test_questions import SETTINGS, asked_with, silence
from tests.unit.tiny import tiny_config

CONFIG = tiny_config(SETTINGS)
MESH = make_mesh(CONFIG.mesh)

_text = st.lists(
    st.sampled_from(["<image>", "<image>\n", "A?", "b", "", " ", "</s>", "\ud800", "\0", "ü", "C" * 60]), max_size=4
)
_value = st.one_of(_text.map("".join), st.sampled_from([None, 5, ["A?"]]))
_speaker = st.sampled_from(["human", "gpt", "human", "gpt", "human", "gpt", "system", None])
_turns = st.one_of(
    st.lists(st.fixed_dictionaries({"from": _speaker, "value": _value}), max_size=5),
    st.lists(_text.map("".join), max_size=6).map(
        lambda said: [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(said)]
    ),
)
_image = st.sampled_from(["a.png", "a.png", "a.png", "cut.png", "gone.png", "text.png", "", "../a.png", "a\0.png", 5, None])
_rows = st.lists(
    st.fixed_dictionaries(
        {"conversations": _turns},
        optional={
            "id": st.sampled_from(["x", "x", "\ud800", "\x1b[2J", "", 7, 10**400, -0.5, None, True, ["x"], "long" * 200]),
            "image": st.one_of(_image, st.lists(_image, max_size=4)),
            "kinds": st.sampled_from([["fine"], "fine", 5, [None], {}]),
        },
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (20, 30)).save(folder / "a.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:48])
    (folder / "text.png").write_text("no image")
    return folder


@given(rows=_rows)
def test_any_row_is_asked_or_left_out_by_its_id(rows, folder):
    (folder / "val.json").write_text(json.dumps(rows))
    source = open_files(str(folder / "val.json"), str(folder))
    before = check_rows(source, CONFIG)
    answers, unasked = asked_with(silence, source, CONFIG)
    subject = HeldOut(source, CONFIG, lambda *_: None, build_model(CONFIG), MESH)
    unlearnt = [bad for delivered in subject._batches() for bad in delivered.bad]
    for bad in [*before, *unasked, *unlearnt, *check_questions(source, range(len(rows)), CONFIG.data)]:
        assert "\n" not in bad.reason
        assert bad.name.isprintable()
        assert 0 <= bad.index < len(rows)

    decoded = {number for number, row in enumerate(rows) if "cut.png" in str(row.get("image"))}
    late = {bad.index for bad in [*unasked, *unlearnt]} - {bad.index for bad in before}
    assert late <= decoded, "all but a damaged image shows before it is decoded"
    ours = {(one.row, one.turn): one.references for one in answers}
    for number, row in enumerate(rows):
        asked = [turn for place, turn in ours if place == number]
        if number not in {bad.index for bad in [*before, *unasked, *unlearnt]}:
            spoken: list[Any] = row["conversations"]
            assert len(asked) == sum(turn["from"] == "gpt" for turn in spoken[1:])

    answerer = LMM(CONFIG, {}, load_tokenizer("bytes"), CONFIG.data.template).answerer
    found = prepare(Task(source), answerer, run_options(CONFIG), range(len(rows)))
    theirs = {(one.question.row, one.question.turn): [*one.question.references] for one in found if isinstance(one, Asked)}
    assert ours.items() <= theirs.items()
