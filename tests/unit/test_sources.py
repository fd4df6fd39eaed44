"""JSON files of rows, and rows of every style: what is read, what is refused and how it is said, and what opening costs."""

import gzip
import json
import os
import pickle
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.example import Example, ExampleError, Message, RecordMetadata, SourceError
from deepstack_jax.data.formats import json_records as json_rows
from deepstack_jax.data.formats.file_source import FileSource
from deepstack_jax.data.open import MissingError, open_files


def row(name: object = "a", image: object = "x.jpg", question: str = "<image>\nWhat?", answer: str = "This.") -> dict:
    return {
        "id": name,
        "image": image,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


def text_row(name: object = "t", question: str = "Hello?") -> dict:
    return {key: value for key, value in row(name, question=question).items() if key != "image"}


def write(folder: Path, content: object, name: str = "data.json") -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def opened(folder: Path, content: object, name: str = "data.json") -> FileSource:
    source = open_files(str(write(folder, content, name)), str(folder))
    assert isinstance(source, FileSource)
    return source


def test_a_row_becomes_an_example(tmp_path):
    source = opened(
        tmp_path, [row("first", "coco/x.jpg"), text_row(17), row("two", ["x.jpg", "./y.png"], "<image> <image> Same?")]
    )
    assert len(source) == 3
    human, gpt = Message("human", "<image>\nWhat?"), Message("gpt", "This.")
    assert source[0] == Example(0, "first", (str(tmp_path / "coco/x.jpg"),), (human, gpt))
    assert source[1] == Example(1, "17", (), (Message("human", "Hello?"), gpt))
    assert source[2].images == (str(tmp_path / "x.jpg"), str(tmp_path / "y.png"))
    assert source[0].info == {}


def test_null_images_are_text_and_rows_without_an_id_are_named_by_number(tmp_path):
    source = opened(tmp_path, [text_row() | {"image": None}, {key: value for key, value in text_row().items() if key != "id"}])
    assert source[0].images == ()
    assert source[1].name == "record 1"


def test_an_empty_answer_is_kept(tmp_path):
    assert opened(tmp_path, [row(answer="")])[0].messages[1] == Message("gpt", "")


json_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).map(lambda text: text.replace("<image>", ""))
layouts = st.fixed_dictionaries({"indent": st.sampled_from([None, 0, 2]), "ensure_ascii": st.booleans()})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(json_text, json_text, json_text), min_size=1, max_size=6), layouts, st.integers(1, 40), st.booleans())
def test_any_layout_read_through_any_window_gives_the_rows_back(texts, layout, window, as_lines):
    rows = [row(name or "none", "x.jpg", "<image>" + question, answer) for name, question, answer in texts]
    if as_lines:
        content = "\n\n".join(json.dumps(each, ensure_ascii=layout["ensure_ascii"]) for each in rows) + "\n"
    else:
        content = " \n" + json.dumps(rows, **layout) + "\n"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_WINDOW_BYTES", window)
        source = opened(Path(folder), content, "data.jsonl" if as_lines else "data.json")
        assert len(source) == len(rows)
        for index, each in enumerate(rows):
            assert source[index].name == each["id"]
            assert [message.text for message in source[index].messages] == [turn["value"] for turn in each["conversations"]]


def test_a_byte_order_mark_is_no_content(tmp_path):
    for name, content in (("a.json", json.dumps([row("one")])), ("a.jsonl", json.dumps(row("one")))):
        assert opened(tmp_path, b"\xef\xbb\xbf" + content.encode(), name)[0].name == "one"


@pytest.mark.parametrize("window", [5, 1 << 20])
def test_a_file_cut_anywhere_is_refused(tmp_path, monkeypatch, window):
    monkeypatch.setattr(json_rows, "_WINDOW_BYTES", window)
    whole = json.dumps([row("é"), text_row(), 12], ensure_ascii=False).encode()
    for end in range(len(whole)):
        with pytest.raises(SourceError, match=r"line 1 column \d+"):
            opened(tmp_path, whole[:end])
    assert len(opened(tmp_path, whole)) == 3


def test_malformed_json_names_line_column_and_last_good_id(tmp_path):
    rows = [json.dumps(row(name), ensure_ascii=False) for name in ("one", "zwölf", "three")]
    broken = "[\n" + rows[0] + ",\n" + rows[1] + ",\n" + rows[2].replace('"image": ', '"image"  ') + "\n]"
    column = rows[2].index('"x.jpg"') + 1
    with pytest.raises(
        SourceError, match=rf"data\.json line 4 column {column}: malformed JSON, .*record 2, last good id 'zwölf'"
    ):
        opened(tmp_path, broken)


def test_columns_count_characters_not_bytes(tmp_path):
    with pytest.raises(SourceError, match="line 1 column 9:"):
        opened(tmp_path, '["äöü", !]')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 column 1: expected one array of records"),
        ("{}", r"expected one array of records.*suffix \.jsonl"),
        ("null", "expected one array of records"),
        ("[]", "holds no records"),
        (json.dumps([row("last")])[:-1], "array is cut: the file ends before its ].*last good id 'last'"),
        (json.dumps([row("last")])[:-1] + ', {"id": "half', "array is cut inside a record.*last good id 'last'"),
        (json.dumps([row()]) + "[]", "text after the end of the array"),
        (json.dumps([row()])[:-1] + ",]", "malformed JSON"),
        (json.dumps(row()) + json.dumps(row()), "expected one array"),
        ("[" + json.dumps(row("last")) + json.dumps(row()) + "]", "expected , or ] after a record.*last good id 'last'"),
        ("[" + "[" * 100_000 + "]" * 100_000 + "]", "malformed JSON, maximum recursion depth"),
    ],
)
def test_a_file_that_is_no_array_of_rows_is_refused_when_opened(tmp_path, content, message):
    with pytest.raises(SourceError, match=message) as caught:
        opened(tmp_path, content)
    assert not isinstance(caught.value, ExampleError)
    assert "\n" not in str(caught.value)


def test_a_broken_line_of_json_lines_is_named(tmp_path):
    content = json.dumps(row("good")) + "\n\n  " + json.dumps(row())[:-1] + "\n"
    with pytest.raises(SourceError, match=r"data\.jsonl line 3 column \d+: malformed JSON.*last good id 'good'"):
        opened(tmp_path, content, "data.jsonl")


def test_a_number_of_any_length_is_carried_as_its_digits(tmp_path):
    digits = "9" * 5000
    text = json.dumps(row("a")).replace("{", f'{{"hash": {digits}, "year": 2026, ', 1)
    for source in (opened(tmp_path, f"[{text}]"), opened(tmp_path, text, "data.jsonl")):
        assert (source[0].name, source[0].info) == ("a", {"hash": digits, "year": 2026})
        assert [outline.name for outline in source.metadata()] == ["a"]


def test_what_stands_in_place_of_a_data_file_is_said(tmp_path):
    write(tmp_path, [text_row()], unicodedata.normalize("NFD", "Prüfung.json"))
    with pytest.raises(MissingError, match=r"Prüfung\.json does not exist, but 'Pru\\u0308fung\.json' is: the same letters"):
        open_files(str(tmp_path / unicodedata.normalize("NFC", "Prüfung.json")), "")
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(SourceError, match=r"cannot read .*a\.json: it is a FIFO, a socket or a device, expected a file"):
        open_files(str(tmp_path / "a.json"), "")


def test_a_row_of_twenty_megabytes_is_read(tmp_path):
    more = {"thumbnail": "A" * 20_000_000}
    assert opened(tmp_path, [row("a") | more])[0].info == more
    assert opened(tmp_path, json.dumps(row("a") | more), "data.jsonl")[0].info == more


def test_an_endless_row_is_refused_without_reading_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_WINDOW_BYTES", 64)
    path = write(tmp_path, '[{"id": "open' + " " * 100_000 + '"}]')
    with path.open("rb") as file:
        scanner = json_rows._array_spans(file, 512)
        with pytest.raises(ValueError, match=r"a record of more than config\.data\.limits\.text_bytes=512"):
            next(scanner)
        assert file.tell() <= 1024
    (tmp_path / "open.jsonl").write_bytes(path.read_bytes()[1:])
    with pytest.raises(SourceError, match=r"line 1 column 1: a record of more than config\.data\.limits\.text_bytes=512"):
        json_rows.JsonRecords(str(tmp_path / "open.jsonl"), LimitsConfig(text_bytes=512))


def test_json_under_another_coding_or_name_is_hinted_at(tmp_path):
    array, lines = json.dumps([row("a"), row("b")]), "".join(json.dumps(row(name)) + "\n" for name in "ab")
    for coding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        (tmp_path / "a.json").write_bytes(array.encode(coding))
        with pytest.raises(SourceError, match=r"a\.json is UTF-16 or no text, expected JSON as UTF-8; save it as UTF-8"):
            open_files(str(tmp_path / "a.json"), "")
    (tmp_path / "a.json").write_bytes(gzip.compress(array.encode()))
    with pytest.raises(SourceError, match=r"a\.json is compressed.*unpack it"):
        open_files(str(tmp_path / "a.json"), "")
    for text in (array, json.dumps([row("a")], indent=1)):
        with pytest.raises(SourceError, match=r"one array of records.*rename the file, to end in \.json"):
            opened(tmp_path, text, "data.jsonl")
    assert [example.name for example in opened(tmp_path, array, "data.JSON")] == ["a", "b"]
    assert [example.name for example in opened(tmp_path, lines, "data.JSONL")] == ["a", "b"]


def test_a_missing_file_and_a_missing_root_are_named(tmp_path):
    with pytest.raises(SourceError, match=r"nothing\.json does not exist; give a \.json"):
        open_files(str(tmp_path / "nothing.json"), str(tmp_path))
    path = str(write(tmp_path, [row()]))
    with pytest.raises(SourceError, match=r"image root .*nowhere is not a folder; give the folder"):
        open_files(path, str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match=rf"folder {tmp_path} holds data\.json; give a \.json"):
        open_files(str(tmp_path), str(tmp_path))


ROW_ERRORS = [
    (3, "record 1", "is a number, expected an object"),
    (None, "record 1", "is null, expected an object"),
    ({"id": "x"}, "x", "has no conversations, messages or texts, but id; name the turns"),
    (row("x") | {"messages": []}, "x", "has conversations and messages, expected one of them"),
    (row("x") | {"conversations": []}, "x", "has no conversations"),
    (row("x") | {"conversations": {}}, "x", "has no conversations"),
    (row("x") | {"conversations": ["hi"]}, "x", "has no conversations"),
    (row("x") | {"conversations": [{"from": "human", "value": 3}]}, "x", "turn 0: got .* expected .*text"),
    (
        row("x") | {"conversations": [{"from": "user", "value": "hi"}]},
        "x",
        "turn 0: got .*'user'.* expected .*'human' or 'gpt'",
    ),
    (text_row("x", "\ud800"), "x", "half a surrogate pair"),
    (row("x", 5), "x", "image is 5, expected a path"),
    (row("x", ""), "x", "image is '', expected a path"),
    (row("x", "a\0b"), "x", "expected a path"),
    (row("x", ["a.jpg", None]), "x", "image is None, expected a path"),
    (row("x", "../a.jpg"), "x", r"image '\.\./a\.jpg' leaves the image root"),
    (row("x", "a/../../b.jpg"), "x", "leaves the image root"),
    (row("x", ".."), "x", "leaves the image root"),
    (row("x", "/etc/passwd"), "x", "leaves the image root"),
    (row("x", ["a.jpg", "b.jpg"]), "x", "has 1 <image> for 2 images, expected 2; put one <image> per image"),
    (row("x", question="What?"), "x", "has 0 <image> for 1 image, expected 1"),
    (row("x", []), "x", "has 1 <image> for 0 images, expected 0; name the missing images"),
    (text_row("x", "<image> What?"), "x", "has 1 <image> for 0 images"),
    (row("x") | {"conversations": [{"from": "gpt", "value": "<image>"}]}, "x", "has 0 <image> for 1 image"),
]


@pytest.mark.parametrize(("bad", "name", "message"), ROW_ERRORS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_bad_row_is_named_and_the_others_stay_readable(tmp_path, bad, name, message, suffix):
    rows = [row("before"), bad, row("after")]
    source = opened(tmp_path, rows if suffix == "json" else "\n".join(map(json.dumps, rows)), f"data.{suffix}")
    with pytest.raises(ExampleError, match=rf"data\.{suffix} record 1 \(id '{name}'\): .*{message}") as caught:
        source[1]
    assert caught.value.name == name
    assert "\n" not in str(caught.value)
    assert [source[0].name, source[2].name] == ["before", "after"]


def test_bytes_that_are_not_utf8_spoil_their_row_only(tmp_path):
    good = json.dumps(row()).encode()
    source = opened(tmp_path, b"[" + good + b"," + good.replace(b"This", b"Th\xe9s") + b"]")
    assert source[0].messages[1].text == "This."
    with pytest.raises(ExampleError, match=r"record 1 \(id 'record 1'\): not UTF-8"):
        source[1]


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_outside_the_file_is_an_error(tmp_path, index):
    with pytest.raises(IndexError, match=r"outside 0\.\.1"):
        opened(tmp_path, [row(), row()])[index]


def test_source_and_errors_travel_between_processes(tmp_path):
    source = opened(tmp_path, [row(index, question="<image>" + "long " * 200) for index in range(5000)] + [3])
    packed = pickle.dumps(source)
    assert len(packed) < 5000 * 12 + 2000, "offsets only"
    copy = pickle.loads(packed)
    assert copy[4321] == source[4321]
    assert repr(copy) == repr(source) == "JsonRecords('data.json', records=5001)"
    with pytest.raises(ExampleError) as caught:
        copy[5000]
    error = pickle.loads(pickle.dumps(caught.value))
    assert (type(error), str(error), error.name) == (ExampleError, str(caught.value), "record 5000")


def test_a_file_that_changes_under_a_run_is_an_error_of_the_file(tmp_path):
    source = opened(tmp_path, [row("one"), row("two")])
    write(tmp_path, [row("another"), row("two")])
    with pytest.raises(SourceError, match=r"data\.json any more: it changed while in use") as caught:
        source[1]
    assert not isinstance(caught.value, ExampleError)
    Path(source.rows.path).unlink()
    with pytest.raises(SourceError, match="any more: No such file"):
        source[1]


def test_missing_images_are_found_without_opening_any(tmp_path):
    (tmp_path / "here.jpg").write_bytes(b"not even an image")
    names = ["here.jpg", "gone1.jpg", "gone2.jpg", "gone1.jpg", "here.jpg", "gone3.jpg"]
    source = opened(tmp_path, [row(image=name) for name in names] + [text_row(), {"id": "bad"}])
    gone = [str(tmp_path / f"gone{number}.jpg") for number in (1, 2, 3)]
    assert source.missing_images(10) == gone
    assert source.missing_images(2) == gone[:1], "looks at so many rows"


@pytest.mark.slow
def test_a_hundred_thousand_rows_open_within_300_megabytes(tmp_path):
    turns = [{"from": role, "value": f"{'x' * 80} ü {turn}"} for turn in range(4) for role in ("human", "gpt")]
    path = write(tmp_path, [{"id": str(index), "conversations": turns} for index in range(100_000)])
    # VmHWM, as ru_maxrss would include the peak of the parent, this test run
    script = f"""
import re
from deepstack_jax.data.open import open_files
source = open_files({str(path)!r}, {str(tmp_path)!r})
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(len(source), int(peak) / 1024)
"""
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    rows, megabytes = map(float, printed.split())
    assert rows == 100_000
    assert megabytes < 300


def test_outlines_go_over_every_row_also_unusable_ones(tmp_path):
    rows = [
        row("a", "./d/x.jpg") | {"data_source": "vqa"},
        3,
        text_row("t"),
        row("m", ["y", "z"]),
        row(5, "../x"),
        {"image": "w"},
    ]
    source = opened(tmp_path, rows)
    assert list(source.metadata()) == [
        RecordMetadata("a", ("d/x.jpg",), "vqa"),
        RecordMetadata("record 1", (), ""),
        RecordMetadata("t", (), ""),
        RecordMetadata("m", ("y", "z"), ""),
        RecordMetadata("5", (), ""),
        RecordMetadata("record 5", ("w",), ""),
    ]
    good = json.dumps(row("é")).encode()
    broken = opened(tmp_path, b"[" + good + b"," + good.replace(b"This", b"Th\xe9s") + b"]")
    assert [outline.name for outline in broken.metadata()] == ["é", "record 1"]
