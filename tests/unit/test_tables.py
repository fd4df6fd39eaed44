"""Parquet and arrow: rows equal those written, memory stays bounded, and a container is never guessed."""

import json
import pickle
import random
import uuid
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepstack_jax.data import tables
from deepstack_jax.data.conversation import Message
from deepstack_jax.data.file_source import FileSource
from deepstack_jax.data.open import MissingError, open_files
from deepstack_jax.data.sources import Outline, SampleError, SourceError

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
SCHEMA = pa.schema([("id", pa.string()), ("image", HF_IMAGE), ("conversations", pa.list_(TURN)), ("data_source", pa.string())])


def llava(count: int, first: int = 0) -> list[dict]:
    def row(number: int) -> dict:
        turns = [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": f"It is {number}."}]
        image = {"bytes": b"pixels %d" % number, "path": None}
        return {"id": f"r{number}", "image": image, "conversations": turns, "data_source": f"set{number % 3}"}

    return [row(number) for number in range(first, first + count)]


def write_parquet(path: Path, rows: list[dict], schema: pa.Schema | None = SCHEMA, group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


def write_arrow(path: Path, rows: list[dict], schema: pa.Schema = SCHEMA, batch: int = 4) -> Path:
    """As `datasets` writes it: an IPC stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema), max_chunksize=batch)
    return path


def save_to_disk(folder: Path, parts: list[list[dict]]) -> Path:
    """The layout of `datasets.Dataset.save_to_disk`."""
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        write_arrow(folder / name, rows)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def check(source: object, rows: list[dict]) -> None:
    """Every row reads as it was written, in any order."""
    assert isinstance(source, FileSource)
    assert len(source) == len(rows)
    for index in random.Random(0).sample(range(len(rows)), len(rows)):
        example, row = source[index], rows[index]
        assert (example.index, example.name, example.images) == (index, row["id"], (row["image"]["bytes"],))
        assert example.messages == tuple(Message(turn["from"], turn["value"]) for turn in row["conversations"])
        assert example.info == {"data_source": row["data_source"]}
    assert list(source.outlines()) == [Outline(row["id"], (), row["data_source"]) for row in rows]


def test_one_file_or_many_give_the_rows_back(tmp_path):
    rows = llava(23)
    check(open_files(str(write_parquet(tmp_path / "a.parquet", rows)), ""), rows)
    check(open_files(str(write_arrow(tmp_path / "a.arrow", rows)), ""), rows)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), max_chunksize=5)
    check(open_files(str(tmp_path / "b.arrow"), ""), rows)
    for number in range(3):
        write_parquet(tmp_path / "many" / f"part-{number}.parquet", rows[number * 8 : number * 8 + 8])
        write_arrow(tmp_path / "arrows" / f"part-{number}.arrow", rows[number * 8 : number * 8 + 8])
    for name in ("many", "many/*.parquet", "many/part-[0-2].parquet", "arrows/*.arrow"):
        check(open_files(str(tmp_path / name), ""), rows)
    check(open_files(str(tmp_path / "many/part-[12].parquet"), ""), rows[8:])


def test_saved_datasets_in_the_order_of_their_state(tmp_path):
    rows = llava(20)
    check(open_files(str(save_to_disk(tmp_path / "one", [rows[:9], rows[9:]])), ""), rows)
    for split, part in (("train", rows[:12]), ("test", rows[12:])):
        save_to_disk(tmp_path / "dict" / split, [part])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    check(open_files(str(tmp_path / "dict" / "test"), ""), rows[12:])
    with pytest.raises(SourceError, match=r"dict holds the splits train, test; name one of them, as in .*/dict/train"):
        open_files(str(tmp_path / "dict"), "")
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    check(open_files(str(tmp_path / "dict"), ""), rows[12:])


HUB = [  # file names of a folder -> split -> those that it must read
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {"": [0, 1], "train": [0, 1]}),
    (["train-00000-of-00001-2ce340398c113b79.parquet"], {"": [0], "train": [0]}),
    (["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"], {"train": [1], "test": [0]}),
    (["data/my_split-00000-of-00001.parquet", "data/other-00000-of-00001.parquet"], {"my_split": [0], "other": [1]}),
    (["train.parquet", "validation.parquet"], {"train": [0], "validation": [1]}),
    (["0000.parquet", "0001.parquet"], {"": [0, 1]}),
    (["part-00000-abc.snappy.parquet", "part-00001-abc.snappy.parquet"], {"": [0, 1]}),
]


@pytest.mark.parametrize(("names", "splits"), HUB)
def test_hub_folders_and_their_splits(tmp_path, names, splits):
    parts = [llava(6, first=10 * number) for number in range(len(names))]
    for name, rows in zip(names, parts, strict=True):
        write_parquet(tmp_path / name, rows)
    (tmp_path / "README.md").write_text("# a data card")
    for split, chosen in splits.items():
        check(open_files(str(tmp_path / split), ""), [row for number in chosen for row in parts[number]])
    if "" not in splits:
        with pytest.raises(SourceError, match=f"holds the splits {', '.join(sorted(splits))}; name one of them"):
            open_files(str(tmp_path), "")
    with pytest.raises(MissingError, match="dev does not exist"):
        open_files(str(tmp_path / "dev"), "")


def test_a_download_that_broke_off_is_refused(tmp_path):
    for number in (0, 1, 3):
        write_parquet(tmp_path / "data" / f"train-{number:05d}-of-00006.parquet", llava(2))
    lost = "train-00002-of-00006.parquet, .*train-00004-of-00006.parquet, .*train-00005-of-00006.parquet missing; fetch them"
    for path in ("", "data", "data/*.parquet", "train"):
        with pytest.raises(SourceError, match=lost):
            open_files(str(tmp_path / path), "")
    assert len(open_files(str(tmp_path / "data/train-0000[01]-of-00006.parquet"), "")) == 4, "a part on purpose"
    assert len(open_files(str(tmp_path / "data/train-00003-of-00006.parquet"), "")) == 2


def test_what_fits_no_container_or_several_is_refused(tmp_path):
    write_parquet(tmp_path / "both" / "a.parquet", llava(1))
    save_to_disk(tmp_path / "both", [llava(1)])
    (tmp_path / "text.csv").write_text("a,b")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.json").write_text("[]")
    (tmp_path / "json" / "b.json").write_text("[]")
    cases = [
        ("both", "is a saved dataset and parquet files at once; give"),
        ("text.csv", r"ends in '\.csv', which names no format; give a \.json, \.jsonl"),
        ("json", r"holds a\.json, b\.json; give"),
        ("json/*.json", r"matches 2 files that are not all \.parquet or all \.arrow"),
        ("nothing-*.parquet", "no file matches .*nothing-"),
        ("nothing", "nothing does not exist; give"),
    ]
    for name, message in cases:
        with pytest.raises(SourceError, match=message) as caught:
            open_files(str(tmp_path / name), "")
        assert isinstance(caught.value, MissingError) == ("nothing" in name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    path = (write_parquet if kind == "parquet" else write_arrow)(tmp_path / f"a.{kind}", llava(12))
    whole = path.read_bytes()
    for end in [*range(0, len(whole), 97), len(whole) - 8, len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(
            SourceError, match=rf"a\.{kind} is damaged, cut short or of another format .*fetch or write it again"
        ):
            open_files(str(path), "")
    path.write_bytes(whole)
    check(open_files(str(path), ""), llava(12))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_without_turns_or_without_rows_are_refused(tmp_path, kind):
    write = write_parquet if kind == "parquet" else write_arrow
    schema = pa.schema([("id", pa.string()), ("question", pa.string())])
    with pytest.raises(SourceError, match="has the columns id, question; expected one of conversations, messages, texts"):
        open_files(str(write(tmp_path / f"a.{kind}", [{"id": "a", "question": "?"}], schema)), "")
    with pytest.raises(SourceError, match="holds no rows"):
        open_files(str(write(tmp_path / f"b.{kind}", [])), "")


def test_files_of_different_tables_are_not_joined(tmp_path):
    write_parquet(tmp_path / "a.parquet", llava(1))
    write_parquet(tmp_path / "b.parquet", [{"messages": []}], pa.schema([("messages", pa.list_(TURN))]))
    with pytest.raises(SourceError, match=r"b\.parquet and .*a\.parquet differ in the columns .*'messages'"):
        open_files(str(tmp_path / "*.parquet"), "")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_bad_rows_of_a_table_are_named_by_file_and_row(tmp_path, kind):
    rows = llava(6)
    rows[1]["image"] = None
    rows[2]["image"] = {"bytes": None, "path": None}
    rows[3]["conversations"] = None
    rows[4]["conversations"] = []
    write = write_parquet if kind == "parquet" else write_arrow
    write(tmp_path / f"a.{kind}", llava(5))
    write(tmp_path / f"b.{kind}", rows)
    source = open_files(str(tmp_path / f"*.{kind}"), "")
    wanted = [
        "has 1 <image> for 0 images",
        "holds neither bytes nor a path",
        "has no conversations, messages",
        "has no conversations;",
    ]
    for local, message in enumerate(wanted, start=1):
        with pytest.raises(SampleError, match=rf"b\.{kind} row {local} \(id 'r{local}'\): .*{message}") as caught:
            source[5 + local]
        assert caught.value.name == f"r{local}"
    assert [source[index].name for index in (4, 5, 10)] == ["r4", "r0", "r5"]


def test_a_damaged_row_group_spoils_its_own_rows_only(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", llava(12))
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 40] = b"\xff" * 40
    path.write_bytes(damaged)
    source = open_files(str(path), "")
    for index in range(4, 8):
        with pytest.raises(
            SampleError, match=rf"a\.parquet row {index} .*row group 1 cannot be read .*fetch or write the file"
        ):
            source[index]
    assert [source[index].name for index in (3, 8)] == ["r3", "r8"]


def test_damaged_offsets_of_an_arrow_file_are_a_bad_sample(tmp_path):
    path = write_arrow(tmp_path / "a.arrow", llava(4))
    data = path.read_bytes()
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 2, 4, 6, 8))  # where each row's id begins
    assert data.count(offsets) >= 1
    path.write_bytes(data.replace(offsets, offsets[:8] + (1 << 30).to_bytes(4, "little") + offsets[12:], 1))
    source = open_files(str(path), "")
    assert source[0].name == "r0"
    with pytest.raises(SampleError, match=r"cannot be decoded .*fetch or write the file again"):
        source[1]


def test_shuffled_reading_keeps_few_row_groups(tmp_path, monkeypatch):
    rows = llava(40)
    source = open_files(str(write_parquet(tmp_path / "a.parquet", rows)), "")
    assert isinstance(source, FileSource)
    held = source.rows
    assert isinstance(held, tables.ParquetRows)
    source[0]
    monkeypatch.setattr(tables, "_CACHE_BYTES", 3 * held._table(0).nbytes)
    for index in random.Random(1).choices(range(40), k=200):
        assert source[index].name == f"r{index}"
        assert len(held._tables) <= 3
    monkeypatch.setattr(tables, "_CACHE_BYTES", 0)
    assert source[0].name == "r0"
    assert source[39].name == "r39"
    assert len(held._tables) == 1


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_sources_travel_to_workers_without_their_rows(tmp_path, kind):
    rows = llava(2000)
    write = write_parquet if kind == "parquet" else write_arrow
    source = open_files(str(write(tmp_path / f"a.{kind}", rows, SCHEMA, 100)), "")
    source[3]
    packed = pickle.dumps(source)
    assert len(packed) < 3000
    copy = pickle.loads(packed)
    assert copy[1999] == source[1999]
    assert repr(copy) == repr(source) == f"{kind.capitalize()}Rows('a.{kind}', rows=2000)"


def test_a_file_that_changes_under_a_run_is_an_error_of_the_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", llava(12))
    source = open_files(str(path), "")
    write_parquet(path, llava(13))
    with pytest.raises(SourceError, match=r"a\.parquet changed while in use: \d+ bytes, \d+ when opened") as caught:
        source[0]
    path.unlink()
    with pytest.raises(SourceError, match="any more: No such file"):
        source[0]
    assert not isinstance(caught.value, SampleError)
    packed = pickle.dumps(open_files(str(write_arrow(tmp_path / "a.arrow", llava(12))), ""))
    write_arrow(tmp_path / "a.arrow", llava(13))
    with pytest.raises(SourceError, match="changed while in use: 13 rows, 12 when opened"):
        pickle.loads(packed)


PATHS = pa.schema(
    [("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))), ("images", pa.list_(pa.string()))]
)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_images_named_by_path_are_outlined_and_looked_for(tmp_path, kind):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    rows = [{"messages": turns, "images": names} for names in (["d/a.jpg"], [], ["b.jpg", "c.jpg"])]
    source = open_files(
        str((write_parquet if kind == "parquet" else write_arrow)(tmp_path / f"a.{kind}", rows, PATHS)), str(tmp_path)
    )
    assert [outline.images for outline in source.outlines()] == [("d/a.jpg",), (), ("b.jpg", "c.jpg")]
    assert source[2].images == (str(tmp_path / "b.jpg"), str(tmp_path / "c.jpg"))
    (tmp_path / "b.jpg").write_bytes(b"x")
    assert source.missing_images(3) == [str(tmp_path / "d/a.jpg"), str(tmp_path / "c.jpg")]


def test_containers_behind_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSTACK_CACHE", str(tmp_path / "cache"))
    rows = llava(20)
    for number in range(2):
        write_parquet(tmp_path / f"hub/data/train-{number:05d}-of-00002.parquet", rows[number * 10 : number * 10 + 10])
    save_to_disk(tmp_path / "saved", [rows[:7], rows[7:]])
    system, url = fsspec.filesystem("memory"), f"memory://{uuid.uuid4().hex}"
    for file in tmp_path.rglob("*"):
        if file.is_file():
            system.pipe(f"{url}/{file.relative_to(tmp_path)}", file.read_bytes())
    for name in ("hub", "hub/train", "hub/data/*.parquet", "saved"):
        check(open_files(f"{url}/{name}", ""), rows)
    with pytest.raises(MissingError, match=r"hub/test does not exist; .*hub holds the splits train"):
        open_files(f"{url}/hub/test", "")
    system.rm(f"{url}/saved/data-00001-of-00002.arrow")
    with pytest.raises(SourceError, match=r"state\.json lists 2 files, missing: memory://.*data-00001-of-00002\.arrow; copy"):
        open_files(f"{url}/saved", "")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", r"state\.json is damaged"),
        ("[]", r"state\.json is damaged"),
        ('{"_data_files": 3}', "has _data_files 3, expected a list"),
        ('{"_data_files": []}', "lists 0 files"),
        ('{"_data_files": [{}]}', r"lists 1 files, missing: .*\?"),
        ('{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "b"}]}', "flatten_indices"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path, state, message):
    write_arrow(tmp_path / "a.arrow", llava(1))
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(SourceError, match=message):
        open_files(str(tmp_path), "")
