"""ArrayRecord shards: every example comes back whole, the same examples give the same bytes, damage is named exactly."""

import json
import math
import pickle
import shutil
import uuid
from datetime import date
from io import BytesIO
from pathlib import Path

import fsspec
import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.example import Example, ExampleError, Message, RecordMetadata, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.open import open_files
from deepstack_jax.data.shards import codec as record_codec
from deepstack_jax.data.shards import writer
from deepstack_jax.data.shards.codec import decode_example, encode_example
from deepstack_jax.data.shards.reader import ShardSource, count_records, read_manifest, verify
from deepstack_jax.data.shards.writer import write_shard
from deepstack_jax.data.synthetic import DocumentPages
from tests.unit.made_shards import write_set

RECEIPTS = Path(__file__).parents[3] / "shared" / "data" / "receipts"


def example(index: int, size: int = 1000) -> Example:
    pixels = np.random.default_rng(index).integers(0, 256, size, np.uint8).tobytes()
    turns = (Message("human", f"<image>\nWhat is ü{index}?"), Message("gpt", ""))
    return Example(index, f"r{index}", (pixels,), turns, {"data_source": f"set{index % 2}"})


def write(folder: Path, count: int = 20, **kwargs: int) -> list[Example]:
    return write_set(folder, map(example, range(count)), {"from": "made"}, **kwargs)


def test_the_manifest_names_a_source_whose_path_is_no_utf8(tmp_path):
    source = {"from": "donn\udce9es.json", "set": "données"}
    write_set(tmp_path / "set", [example(0)], source)
    assert ShardSource(str(tmp_path / "set")).manifest["source"] == source


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | text | st.binary(max_size=9)
values = st.recursive(
    plain, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(text, inner), max_leaves=6
)


def conversation(words: list[str], images: list[bytes], info: dict) -> Example:
    turns = [Message(("human", "gpt")[number % 2], word) for number, word in enumerate(words)]
    turns[0] = Message("human", "<image>" * len(images) + words[0])
    return Example(3, words[-1], tuple(images), tuple(turns), info)


words = text.filter(lambda word: "<image>" not in word)
examples = st.builds(
    conversation,
    st.lists(words, min_size=1, max_size=4),
    st.lists(st.binary(max_size=40), max_size=3),
    st.dictionaries(text, values),
)
ASKED, SHOWN = (Message("human", "What?"),), (Message("human", "<image>What?"),)


@settings(max_examples=150, deadline=None)
@given(examples)
def test_a_record_holds_all_of_an_example(original):
    record = encode_example(original)
    assert decode_example(record, 3) == original
    assert encode_example(original) == record


def test_pixels_and_paths_become_encoded_bytes(tmp_path):
    gray, colour = np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    Image.fromarray(colour).save(tmp_path / "a.png")
    sources = (gray, gray[..., None], colour, Image.fromarray(colour), str(tmp_path / "a.png"))
    images = decode_example(encode_example(Example(0, "a", sources, (Message("human", "<image>" * 5),))), 0).images
    for stored, expected in zip(images, (gray, gray, colour, colour, colour), strict=True):
        assert isinstance(stored, bytes)
        with Image.open(BytesIO(stored)) as image:
            np.testing.assert_array_equal(np.asarray(image), expected)
    assert images[4] == (tmp_path / "a.png").read_bytes(), "a file is stored as it is"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Example(0, "bad", ("/nowhere/x.jpg",), SHOWN), r"bad: cannot read image /nowhere/x\.jpg: No such file"),
        (Example(0, "bad", (), ASKED, {"when": object()}), "bad: got a object: .*; expected text, numbers"),
        (Example(0, "bad", (), (Message("human", "\ud800"),)), "bad: .*surrogate"),
        (Example(0, "bad", (), ()), "bad: has no turns"),
        (Example(0, "bad", (b"x",), ASKED), "bad: has 0 <image> for 1 image"),
        (Example(0, "bad", (np.zeros((2, 2, 7), np.uint8),), SHOWN), "bad: .*expected uint8"),
    ],
)
def test_an_example_that_cannot_be_stored_is_an_error_of_its_own(bad, message):
    with pytest.raises(ExampleError, match=message) as caught:
        encode_example(bad)
    assert caught.value.name == "bad"


def test_random_access_over_shards(tmp_path):
    written = write(tmp_path / "set", shard_bytes=4000)
    source = open_files(str(tmp_path / "set"), "")
    assert isinstance(source, ShardSource)
    assert [shard["rows"] for shard in source.manifest["shards"]] == [4, 4, 4, 4, 4]
    assert len(source) == 20
    for index in np.random.default_rng(0).permutation(20):
        assert source[index] == written[index]
    assert list(source.metadata()) == [RecordMetadata(each.name, (), each.info["data_source"]) for each in written]
    assert source.missing_images(5) == []
    for index in (-1, 20):
        with pytest.raises(IndexError, match=r"outside 0\.\.19"):
            source[index]
    packed = pickle.dumps(source)
    assert len(packed) < 3000
    copy = pickle.loads(packed)
    assert copy[13] == written[13]
    assert repr(copy) == repr(source)
    assert str(tmp_path) not in repr(source)


def test_the_same_examples_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, shard_bytes=7000)
    held = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert held == ["manifest.json", "shard-00000.array_record", "shard-00001.array_record", "shard-00002.array_record"]
    assert held == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in held:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_manifest_counts_what_is_there(tmp_path):
    write(tmp_path / "set", shard_bytes=7000)
    manifest = verify(str(tmp_path / "set"))
    assert manifest == read_manifest(str(tmp_path / "set"))
    assert (manifest["source"], manifest["rows"], manifest["images"]) == ({"from": "made"}, 20, 20)
    sizes = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    assert sizes == {path.name: path.stat().st_size for path in (tmp_path / "set").glob("*.array_record")}
    assert manifest["bytes"] == sum(sizes.values())


def test_a_folder_without_a_manifest_is_not_finished(tmp_path):
    written = write(tmp_path / "set", 2)
    manifest = (tmp_path / "set" / "manifest.json").rename(tmp_path / "manifest.json")
    for opener in (ShardSource, verify, lambda path: open_files(path, "")):
        with pytest.raises(SourceError, match=r"manifest\.json: No such file.*not finished, prepare it again"):
            opener(str(tmp_path / "set"))
    manifest.rename(tmp_path / "set" / "manifest.json")
    assert list(ShardSource(str(tmp_path / "set"))) == written


def test_a_shard_without_records_is_no_file(tmp_path):
    assert write_shard(tmp_path / "shard", "shard-00000.array_record", []) is None
    assert list(tmp_path.iterdir()) == []


def test_what_ends_the_records_ends_the_shard(tmp_path):
    def interrupted():
        yield b"one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "shard", "shard-00000.array_record", interrupted())
    assert count_records(str(tmp_path / "shard")) == 1, "closed, so that nothing holds it open"


def test_missing_and_cut_shards_are_all_named_when_opening(tmp_path):
    folder = tmp_path / "set"
    write(folder, shard_bytes=4000)
    shards = sorted(folder.glob("*.array_record"))
    shards[1].unlink()
    whole = shards[3].read_bytes()
    shards[3].write_bytes(whole[:-1000])
    wanted = (
        rf"set: shard-00001\.array_record cannot be read \(No such file or directory\); "
        rf"shard-00003\.array_record has {len(whole) - 1000} of {len(whole)} bytes; fetch these shards again"
    )
    for opener in (ShardSource, verify):
        with pytest.raises(SourceError, match=wanted):
            opener(str(folder))
    shards[1].write_bytes(shards[0].read_bytes())
    shards[3].write_bytes(b"\0" * len(whole))
    with pytest.raises(SourceError, match=r"set: shard-00003\.array_record has 0 readable records of 4; fetch"):
        ShardSource(str(folder))


def test_changed_content_is_found_by_verify_and_is_one_bad_sample(tmp_path):
    folder = tmp_path / "set"
    write_set(folder, [example(index, 100_000) for index in range(6)])
    shard = folder / "shard-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[data.index(example(3, 100_000).images[0][:50]) + 20] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SourceError, match=r"shard-00000\.array_record has other content than when it was written"):
        verify(str(folder))
    source = ShardSource(str(folder))
    with pytest.raises(ExampleError, match=r"shard-00000\.array_record record 3: damaged \(.*\); fetch or prepare") as caught:
        source[3]
    assert caught.value.name == "record 3"
    assert "\n" not in str(caught.value)
    assert [source[index].name for index in (2, 4)] == ["r2", "r4"]
    assert [outline.name for outline in source.metadata()] == ["r0", "r1", "r2", "record 3", "r4", "r5"]


def shard_of(folder: Path, records: list[bytes], options: str = "group_size:1,uncompressed") -> Path:
    """A finished folder of one shard with any bytes as its records."""
    write(folder, 1)
    shard, path = folder / "shard-00000.array_record", folder / "manifest.json"
    out = ArrayRecordWriter(str(shard), options)
    for record in records:
        out.write(record)
    out.close()
    entry = {"file": shard.name, "rows": len(records), "bytes": shard.stat().st_size, "sha256": ""}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": len(records), "shards": [entry]}))
    return folder


def array_in_info(dtype: str, shape: list[int], content: bytes) -> bytes:
    """A record but for its conversation, with an array of any description in its info."""
    return msgpack.packb(["a", [], [], {"k": msgpack.ExtType(2, msgpack.packb([dtype, shape, content]))}])


ASK, ANSWER = ["human", "<image>What?"], ["gpt", "That."]
NO_EXAMPLES = {
    "an image by path": (["a", [ASK, ANSWER], [], {}], r"an image is a str, '.*, expected its encoded bytes"),
    "an image by URL": (
        ["a", [ASK, ANSWER], ["http://127.0.0.1:9/a.png"], {}],
        "an image is a str, 'http.*expected its encoded",
    ),
    "an image of pixels": (
        ["a", [ASK, ANSWER], [np.zeros((2, 2, 3), np.uint8)], {}],
        "an image is a ndarray",
    ),
    "no image": (["a", [ASK, ANSWER], [], {}], "has 1 <image> for 0 images"),
    "a turn of a number": (["a", [["human", 3], ANSWER], [], {}], "turn 0: got .*expected a human or gpt and its text"),
    "another speaker": (["a", [["tool", "x"], ANSWER], [], {}], "turn 0: got .*expected a human or gpt"),
    "a system text in between": (["a", [ANSWER, ["system", "x"]], [], {}], "turn 1 is a system prompt, expected it first"),
    "twice the same": (["a", [ANSWER, ANSWER], [], {}], "turn 1: got 'gpt', expected 'human'"),
    "no turns": (["a", [], [], {}], "has no turns"),
    "turns of one": (["a", [["human"]], [], {}], "damaged"),
    "turns by key": (["a", {"from": "human"}, [], {}], "damaged"),
    "a number as name": ([7, [ASK, ANSWER], [b"x"], {}], "damaged"),
    "info of a list": (["a", [ASK, ANSWER], [b"x"], []], "damaged .*info"),
    "info by number": (["a", [ASK, ANSWER], [b"x"], {1: 2}], "damaged .*info"),
    "three of four": (["a", [], []], "damaged"),
    "a number": (7, "damaged"),
    "nested tuples": (b"\xdd\x00\x00\x00\x04\xa1a" + b"\x91" * 100_000, "damaged"),
    "cut": (b"\x94\xa1a\x91", "damaged"),
    "a list of 2^32": (b"\xdd\xff\xff\xff\xff", "damaged"),
    "an odd dtype": (
        b"\x94\xa1a\x90\x90\x81\xa1k" + msgpack.packb(msgpack.ExtType(2, msgpack.packb([",,", [1], b"x"]))),
        "damaged",
    ),
    "a huge shape": (
        b"\x94\xa1a\x90\x90\x81\xa1k" + msgpack.packb(msgpack.ExtType(2, msgpack.packb(["<u8", [2**63, 2**63], b"x" * 8]))),
        "damaged",
    ),
}


@pytest.mark.parametrize("case", NO_EXAMPLES)
def test_a_record_is_checked_as_a_row_and_opens_nothing(tmp_path, monkeypatch, case):
    content, message = NO_EXAMPLES[case]
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    if case == "an image by path":
        content[2] = [str(tmp_path / "secret.png")]
    record = content if isinstance(content, bytes) else record_codec._pack(content)
    source = ShardSource(str(shard_of(tmp_path / "set", [encode_example(example(0)), record])))
    assert source[0].name == "r0"
    opened = []
    monkeypatch.setattr(files, "read_bytes", opened.append)
    with pytest.raises(ExampleError, match=rf"shard-00000\.array_record record 1.*{message}") as caught:
        source[1]
    assert caught.value.name == "record 1"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not opened


def test_a_compressed_shard_is_refused(tmp_path):
    """A record in it could be of any size, whatever the file's."""
    folder = shard_of(tmp_path / "set", [encode_example(example(0))], "group_size:1,zstd")
    with pytest.raises(SourceError, match=r"shard-00000\.array_record is compressed, which `prepare` never does"):
        ShardSource(str(folder))


def test_a_record_beyond_the_limit_is_refused(tmp_path):
    write(tmp_path / "set", 2)
    source = ShardSource(str(tmp_path / "set"), LimitsConfig(row_bytes=999))
    with pytest.raises(ExampleError, match=r"record 1 takes 1,\d+ bytes, allowed are config\.data\.limits\.row_bytes=999"):
        source[1]


DEEP = json.loads("[" * 900 + "]" * 900)


def test_info_that_msgpack_does_not_know_is_carried_as_text():
    info = {
        "big": 2**70,
        "half": "a \ud83d",
        "day": date(2026, 1, 2),
        "nan": float("nan"),
        "deep": json.loads("[" * 900 + "]" * 900),
    }
    stored = decode_example(encode_example(Example(0, "a", (), ASKED, info)), 0).info
    assert stored["big"] == "1180591620717411303424"
    assert stored["half"] == "a \\ud83d"
    assert stored["day"] == "2026-01-02"
    assert math.isnan(stored["nan"])
    assert json.dumps(stored["deep"]) == json.dumps(DEEP)


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused(tmp_path):
    write(tmp_path / "set", 1)
    shard = tmp_path / "set" / "shard-00000.array_record"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match=r"shard-00000\.array_record cannot be read .*is a link that leaves the folder"):
        ShardSource(str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", r"manifest\.json is not JSON"),
        ("[]", r"says format, version \(None, None\), expected \('deepstack_jax examples', 1\)"),
        ({"version": 2}, r"says format, version \('deepstack_jax examples', 2\)"),
        ({"rows": 19}, "lists 20 records in shards and 19 in all"),
        ({"shards": [{"file": "a"}]}, "lacks or misnames an entry"),
        ("[" * 100_000, r"manifest\.json is not JSON"),
        ({"shards": [{"file": "shard-00000.array_record", "rows": 20.0, "bytes": 1, "sha256": ""}]}, "with 20.0 records"),
        ({"shards": [{"file": "shard-00000.array_record", "rows": 20, "bytes": -1, "sha256": ""}]}, "20 records, -1 bytes"),
        ({"shards": [{"file": "..", "rows": 20, "bytes": 1, "sha256": ""}]}, "lacks or misnames an entry"),
        ({"shards": None}, "lacks or misnames an entry"),
        (
            {"shards": [{"file": "../x", "rows": 20, "bytes": 1, "sha256": ""}]},
            "lacks or misnames an entry .*file '../x', expected shard-00000",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, change, message):
    write(tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SourceError, match=message):
        ShardSource(str(tmp_path / "set"))


def test_a_shard_that_vanishes_or_changes_under_a_run_is_an_error_of_the_set(tmp_path):
    write(tmp_path / "set", shard_bytes=4000)
    source = ShardSource(str(tmp_path / "set"))
    shards = sorted((tmp_path / "set").glob("*.array_record"))
    assert source[0].name == "r0"
    shards[1].unlink()
    with pytest.raises(
        SourceError, match=r"shard-00001\.array_record changed while in use: 0 records, 4 in manifest\.json"
    ) as caught:
        source[5]
    assert not isinstance(caught.value, ExampleError)


def test_reading_behind_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSTACK_CACHE", str(tmp_path / "cache"))
    system, url = fsspec.filesystem("memory"), f"memory://{uuid.uuid4().hex}/set"
    written = [example(index) for index in range(10)]
    write(tmp_path / "local", 10, shard_bytes=4000)
    system.put(str(tmp_path / "local"), url, recursive=True)
    assert verify(url)["rows"] == 10
    source = open_files(url, "")
    assert not (tmp_path / "cache").exists(), "opening fetches no shard"
    assert source[9] == written[9]
    assert len(list((tmp_path / "cache").rglob("*.array_record"))) == 1, "only the shard that was read"
    assert [source[index] for index in range(10)] == written
    for name in files.names(url):
        assert files.read_bytes(f"{url}/{name}") == (tmp_path / "local" / name).read_bytes()
    system.rm(f"{url}/shard-00001.array_record")
    with pytest.raises(SourceError, match=r"shard-00001\.array_record cannot be read \(No such file"):
        open_files(url, "")


def test_synthetic_pages_and_receipts_survive_the_way_through(tmp_path):
    pages = DocumentPages(0, 4, "checker", 3, "train")
    write_set(tmp_path / "pages", [pages[index] for index in range(4)])
    for index, stored in enumerate(ShardSource(str(tmp_path / "pages"))):
        assert (stored.index, stored.messages, stored.info["kinds"]) == (
            index,
            pages[index].messages,
            pages[index].info["kinds"],
        )
        assert stored.info.keys() == pages[index].info.keys()
        np.testing.assert_array_equal(stored.info["digits"], pages[index].info["digits"])
        assert isinstance(stored.images[0], bytes)
        with Image.open(BytesIO(stored.images[0])) as image:
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pages[index].images[0])
    shutil.rmtree(tmp_path / "pages")
    if not RECEIPTS.is_dir():
        pytest.skip(f"no receipts in {RECEIPTS}")
    receipts = open_files(str(RECEIPTS / "val.json"), str(RECEIPTS))
    write_set(tmp_path / "receipts", [receipts[index] for index in range(40)], {"from": "val.json"}, shard_bytes=1 << 20)
    stored = ShardSource(str(tmp_path / "receipts"))
    assert len(stored.manifest["shards"]) > 1
    for index in range(40):
        original = receipts[index]
        assert (stored[index].name, stored[index].messages) == (original.name, original.messages)
        assert stored[index].images == tuple(Path(str(image)).read_bytes() for image in original.images)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "count_records", lambda path: 3)  # what a shard holds whose end could not be written
    with pytest.raises(OSError, match="3 of 20 records of a shard were written"):
        write(tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.json").exists()
