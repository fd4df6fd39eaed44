"""Rows of every style become the same Example; what is refused names the row and the next move."""

import json
from pathlib import Path

import pytest

from deepstack_jax.data.encode.templates import get_template, images_to_front, render
from deepstack_jax.data.example import IMAGE_MARK, ConversationError, ExampleError, Message, RecordMetadata
from deepstack_jax.data.formats.file_source import FileSource
from deepstack_jax.data.formats.styles import RecordError, to_example, to_metadata
from deepstack_jax.data.open import open_files

ROOT = "/images"
TURNS = (Message("human", "<image>\nWhat?"), Message("gpt", "This."))
LLAVA = {"image": "x.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]}
TRL = {"images": ["x.jpg"], "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]}
CAULDRON = {"images": ["x.jpg"], "texts": [{"user": "What?", "assistant": "This.", "source": "made"}]}


def user(*parts: object) -> dict:
    return {"role": "user", "content": list(parts)}


def text(words: object) -> dict:
    return {"type": "text", "text": words}


IMAGE = {"type": "image", "text": None}  # arrow gives every part every key
ANSWER = {"role": "assistant", "content": "This."}


@pytest.mark.parametrize("row", [LLAVA, TRL, CAULDRON], ids=["llava", "trl", "cauldron"])
def test_styles_agree(row):
    example = to_example({"id": 7} | row, 3, ROOT)
    assert (example.index, example.name, example.images, example.messages) == (3, "7", ("/images/x.jpg",), TURNS)
    assert example.info == {}


@pytest.mark.parametrize("row", [LLAVA, TRL, CAULDRON], ids=["llava", "trl", "cauldron"])
def test_turns_may_be_stored_column_by_column(row):
    style = next(key for key in ("conversations", "messages", "texts") if key in row)
    columns = {key: [turn[key] for turn in row[style]] for key in row[style][0]}
    assert to_example(row | {style: columns}, 3, ROOT) == to_example(row, 3, ROOT)


@pytest.mark.parametrize("row", [LLAVA, TRL, CAULDRON], ids=["llava", "trl", "cauldron"])
def test_other_keys_are_kept_and_nulls_are_absent(row):
    keys = {"id": None, "data_source": "vqa", "difficulty": 3, "nothing": None, "image": None, "images": None}
    keys |= dict.fromkeys(("conversations", "messages", "texts"))  # a table has every column in every row
    example = to_example(keys | row, 5, ROOT)
    assert example.info == {"data_source": "vqa", "difficulty": 3}
    assert (example.name, example.messages) == ("record 5", TURNS)


EMBEDDED = [
    ("image", b"raw", (b"raw",)),
    ("image", {"bytes": b"raw", "path": "/their/disk.jpg"}, (b"raw",)),
    ("image", {"bytes": None, "path": "x.jpg"}, ("/images/x.jpg",)),
    ("images", [{"bytes": b"raw", "path": None}], (b"raw",)),
    ("images", [b"raw"], (b"raw",)),
    ("image", ["./a/../x.jpg"], ("/images/x.jpg",)),
]


@pytest.mark.parametrize(("key", "value", "expected"), EMBEDDED)
@pytest.mark.parametrize("style", [LLAVA, TRL, CAULDRON], ids=["llava", "trl", "cauldron"])
def test_images_are_paths_or_bytes_single_or_in_a_list(style, key, value, expected):
    row = {name: turns for name, turns in style.items() if name not in ("image", "images")} | {key: value}
    assert to_example(row, 0, ROOT).images == expected


def test_image_parts_become_placeholders_in_their_order():
    row = {
        "images": [b"1", b"2", b"3"],
        "messages": [user(IMAGE, text("a "), IMAGE, text("b")), ANSWER, user(text("c"), IMAGE), ANSWER],
    }
    example = to_example(row, 0, ROOT)
    assert [message.text for message in example.messages] == ["<image>a <image>b", "This.", "c<image>", "This."]
    assert [message.role for message in example.messages] == ["human", "gpt", "human", "gpt"]


@pytest.mark.parametrize("row", [TRL, CAULDRON], ids=["trl", "cauldron"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_placeholders_images_stand_before_the_first_question(row, count):
    example = to_example(row | {"images": [b"x"] * count}, 0, ROOT)
    assert example.messages[0].text == f"{IMAGE_MARK}\n" * count + "What?"
    template = get_template("v1")
    assert render(images_to_front(example.messages, template), template).text.count(IMAGE_MARK) == count


def test_placeholders_in_plain_content_stay_where_they_are():
    row = {
        "images": [b"1"],
        "messages": [{"role": "user", "content": "Hello."}, ANSWER, {"role": "user", "content": "<image> This?"}, ANSWER],
    }
    assert [message.text for message in to_example(row, 0, ROOT).messages][::2] == ["Hello.", "<image> This?"]


def test_a_system_turn_comes_first():
    """What becomes of it, the template decides: a model's own takes it, one with a name does not."""
    expected = (Message("system", "Be kind."), *TURNS)
    llava = LLAVA | {"conversations": [{"from": "system", "value": "Be kind."}, *LLAVA["conversations"]]}
    trl = TRL | {"messages": [{"role": "system", "content": "Be kind."}, *TRL["messages"]]}
    assert [to_example(row, 0, ROOT).messages for row in (llava, trl)] == [expected, expected]
    with pytest.raises(ConversationError, match=r"turn 0 is a system prompt.*remove the turn"):
        render(expected, get_template("v1"))


BAD = [
    (
        LLAVA | {"conversations": [*LLAVA["conversations"], {"from": "system", "value": "Be kind."}]},
        "turn 2 is a system prompt, expected it first; .*remove the turn",
    ),
    (
        TRL | {"messages": [*TRL["messages"], {"role": "system", "content": "Be kind."}]},
        "turn 2 is a system prompt, expected it first; .*remove the turn",
    ),
    (TRL | {"messages": [{"role": "tool", "content": "4"}, ANSWER]}, "turn 0: role is 'tool', expected 'user' or 'assistant'"),
    (TRL | {"messages": [{"role": "user", "content": None}, ANSWER]}, "turn 0: content is null, expected a text or a list"),
    (TRL | {"messages": [user(text(None)), ANSWER]}, r"turn 0: part \{'type': 'text', 'text': None\}.*expected"),
    (TRL | {"messages": [user({"type": "video"}), ANSWER]}, "turn 0: part .*video.*expected"),
    (TRL | {"messages": [user("hi"), ANSWER]}, "turn 0: part 'hi' of content"),
    (TRL | {"messages": [user(IMAGE, IMAGE, text("?")), ANSWER]}, "has 2 <image> for 1 image, expected 1; name the missing"),
    (TRL | {"messages": [user(text("What?")), ANSWER]}, "has 0 <image> for 1 image, expected 1; put one <image>"),
    (
        {"messages": [user({"type": "image", "image": "x.jpg"}, text("?")), ANSWER]},
        r"turn 0: an image inside content \(type, image\); name it in `images`",
    ),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "x"}}), ANSWER]}, "turn 0: an image inside content"),
    (LLAVA | {"image": "data:image/png;base64," + "A" * 999}, r"image 'data:image.{,40} is its content, expected a path"),
    (LLAVA | {"image": "\ud83d.png"}, "expected a path relative"),
    (TRL | {"messages": []}, "has no messages; expected"),
    (CAULDRON | {"texts": []}, "has no texts; expected"),
    (CAULDRON | {"texts": [{"user": "?", "assistant": None}]}, "texts 0: assistant is null, expected a text"),
    (CAULDRON | {"texts": [{"user": "<image> <image>", "assistant": "x"}]}, "has 2 <image> for 1 image"),
    (CAULDRON | {"image": "y.jpg"}, "has image and images, expected one of them; remove the other"),
    (LLAVA | TRL, "has conversations and messages, expected one of them"),
    ({"prompt": "?", "id": 3}, "has no conversations, messages or texts, but prompt, id"),
    ({}, "but nothing"),
    (LLAVA | {"image": {"bytes": None, "path": None}}, "image holds neither bytes nor a path"),
    (LLAVA | {"image": {"bytes": None, "path": "/their/disk.jpg"}}, "'/their/disk.jpg' leaves the image root"),
    (LLAVA | {"image": [None]}, "image is None, expected a path"),
    (LLAVA | {"conversations": LLAVA["conversations"][:1] * 2}, "turn 1: got 'human', expected 'gpt'; turns alternate"),
    (TRL | {"messages": [*TRL["messages"], ANSWER]}, "turn 2: got 'gpt', expected 'human'; turns alternate"),
    (LLAVA | {"conversations": {"from": ["human"], "value": ["<image>", "x"]}}, "columns of turns that differ in length"),
    (LLAVA | {"conversations": {"from": "human", "value": "<image>"}}, "has no conversations; expected"),
    (LLAVA | {"image": "https://example.com/x.jpg"}, "is not a path under the image root .*; put it there"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_rows_that_are_no_conversation_say_why(row, message):
    with pytest.raises(RecordError, match=message) as caught:
        to_example(row, 0, ROOT)
    assert "\n" not in str(caught.value)


def test_a_path_needs_an_image_root_and_bytes_do_not():
    assert to_example(LLAVA | {"image": b"raw"}, 0, "").images == (b"raw",)
    with pytest.raises(RecordError, match=r"'x\.jpg' is a path, but there is no image root; give the folder"):
        to_example(LLAVA, 0, "")


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/x", "%2e%2e/x", "a/%2E%2E/%2e%2e/x", "x.jpg::file:///etc/passwd", "x?y", "gs://x/y"]
)
def test_no_name_leads_out_of_a_root_behind_a_url(name):
    with pytest.raises(RecordError, match=r"leaves the image root gs://b|is not a path under the image root gs://b"):
        to_example(LLAVA | {"image": name}, 0, "gs://bucket/images")
    assert to_example(LLAVA | {"image": "a b/%41.jpg"}, 0, "gs://bucket/images").images == ("gs://bucket/images/a b/%41.jpg",)


def test_a_tilde_is_a_name_like_any_other():
    assert to_example(LLAVA | {"image": "~/secret.jpg"}, 0, ROOT).images == ("/images/~/secret.jpg",)


def test_outlines_name_paths_as_the_row_does():
    assert to_metadata(LLAVA | {"image": "./coco/x.jpg", "data_source": "vqa", "id": "a"}, 0) == RecordMetadata(
        "a", ("coco/x.jpg",), "vqa"
    )
    assert to_metadata(TRL | {"images": [{"bytes": b"raw", "path": "x"}, {"bytes": None, "path": "y"}]}, 4) == RecordMetadata(
        "record 4", ("y",), ""
    )
    for unusable in (None, 3, {"image": ["../x", 5, None]}, {"image": "x", "images": ["y"]}):
        assert to_metadata(unusable, 1) == RecordMetadata("record 1", (), "")


RECEIPTS = Path(__file__).parents[3] / "shared" / "data" / "receipts"


def test_real_receipts_in_three_styles_render_the_same_text(tmp_path):
    if not RECEIPTS.is_dir():
        pytest.skip(f"no receipts in {RECEIPTS}")
    original = open_files(str(RECEIPTS / "val.json"), str(RECEIPTS))
    rows = json.loads((RECEIPTS / "val.json").read_text())
    trl, cauldron = [], []
    for row in rows:
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        roles = ["user", "assistant"] * (len(turns) // 2)
        base = {"id": row["id"], "images": [row["image"]]}
        trl.append(base | {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]})
        pairs = [
            {"user": ask, "assistant": answer, "source": "sroie"} for ask, answer in zip(turns[::2], turns[1::2], strict=True)
        ]
        cauldron.append(base | {"texts": pairs})
    for name, styled in (("trl.jsonl", trl), ("cauldron.jsonl", cauldron)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, styled)))
        source = open_files(str(tmp_path / name), str(RECEIPTS))
        assert isinstance(source, FileSource)
        assert [source[index] for index in range(len(source))] == [original[index] for index in range(len(rows))]


def test_a_bad_row_is_one_sample_and_names_its_place(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [TRL | {"id": "ok"}, TRL | {"id": "bad", "messages": 3}])))
    source = open_files(str(tmp_path / "rows.jsonl"), str(tmp_path))
    assert source[0].name == "ok"
    with pytest.raises(ExampleError, match=r"rows\.jsonl record 1 \(id 'bad'\): has no messages"):
        source[1]
