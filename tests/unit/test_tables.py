"""Parquet and arrow: rows equal those written, memory stays bounded, and a container is never guessed."""

import json
import pickle
import random
import tracemalloc
import uuid
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.example import ExampleError, Message, RecordMetadata, SourceError
from deepstack_jax.data.formats import tables
from deepstack_jax.data.formats.file_source import FileSource
from deepstack_jax.data.open import MissingError, open_files
from deepstack_jax.data.shards.codec import decode_example, encode_example

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


def write_headless(path: Path, rows: list[dict], compression: str | None = None) -> Path:
    """As polars writes it: nothing but the footer says where the batches are, and what columns they have."""
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA, options=options) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), max_chunksize=5)
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + bytes(4) + whole[12:])
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
    assert list(source.metadata()) == [RecordMetadata(row["id"], (), row["data_source"]) for row in rows]


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


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_an_arrow_file_without_a_stream_in_it(tmp_path, compression):
    rows, path = llava(23), tmp_path / "a.arrow"
    write_headless(path, rows, compression)
    check(open_files(str(path), ""), rows)
    if compression:
        with pytest.raises(SourceError, match=r"a\.arrow is compressed and takes [\d,]+ bytes .*limits\.group_bytes=99;"):
            open_files(str(path), "", LimitsConfig(group_bytes=99))


@pytest.mark.parametrize("encoding", ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY", "PLAIN"])
def test_every_encoding_of_texts_in_parquet(tmp_path, encoding):
    rows, path = llava(150), tmp_path / "a.parquet"
    texts = ("id", "data_source", "image.bytes", "conversations.list.element.from", "conversations.list.element.value")
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, path, use_dictionary=False, column_encoding=dict.fromkeys(texts, encoding), row_group_size=70)
    check(open_files(str(path), ""), rows)
    if encoding == "DELTA_BYTE_ARRAY":  # a text takes nothing that is like the one before it
        alike = table.slice(0, 100).set_column(0, "id", pa.array(["x" * 10_000] * 100))
        pq.write_table(alike, path, use_dictionary=False, column_encoding=dict.fromkeys(texts, encoding))
        source = open_files(str(path), "", LimitsConfig(group_bytes=200_000))
        with pytest.raises(ExampleError, match=r"row group 0 takes more than config\.data\.limits\.group_bytes=200,000; raise"):
            source[0]


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
        ("json/*.json", r"matches 2 files that are not all \.parquet, all \.arrow or all \.tar"),
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
    with pytest.raises(SourceError, match="holds no records"):
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
        with pytest.raises(ExampleError, match=rf"b\.{kind} record {local} \(id 'r{local}'\): .*{message}") as caught:
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
            ExampleError, match=rf"a\.parquet record {index} .*row group 1 cannot be read .*fetch or write the file"
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
    with pytest.raises(ExampleError, match=r"cannot be decoded .*fetch or write the file again"):
        source[1]
    assert [outline.name for outline in source.metadata()] == ["r0", "record 1", "record 2", "r3"]


EXTRA = {
    "a date": (pa.array([date(2026, 1, 2)]), "2026-01-02"),
    "a time": (pa.array([datetime(2026, 1, 2, 3, 4)]), "2026-01-02 03:04:00.000000"),
    "nanoseconds": (pa.array([1], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
    "a zone": (pa.array([1], pa.timestamp("us", "Nowhere/City")), None),
    "a year of no calendar": (pa.array([4_000_000], pa.date32()), "12921-08-18"),
    "a decimal": (pa.array([Decimal("1.50")]), "1.50"),
    "a duration": (pa.array([5], pa.duration("ns")), "5"),
    "a map": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), [{"key": "a", "value": 1}]),
    "a struct": (pa.array([{"at": datetime(2026, 1, 2), "by": "me"}]), {"at": "2026-01-02 00:00:00.000000", "by": "me"}),
    "a list of nanoseconds": (pa.array([[1]], pa.list_(pa.time64("ns"))), ["00:00:00.000000001"]),
    "2^64 - 1": (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    "half precision": (pa.array([1.5], pa.float16()), 1.5),
    "a large string": (pa.array(["x"], pa.large_string()), "x"),
    "a category": (pa.array(["x"]).dictionary_encode(), "x"),
    "no UTF-8": (pa.array([b"\xff"]).view(pa.string()), None),
}
LEFT_OUT = {
    "an interval": pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
    "a union": pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]),
    "runs": pa.RunEndEncodedArray.from_arrays([1], pa.array(["x"])),
    "a view of a list": pa.array([[1]], pa.list_view(pa.int64())),
}


def with_column(path: Path, column: pa.Array, name: str = "extra") -> Path:
    """One row, with a column more."""
    table = pa.Table.from_pylist(llava(1), schema=SCHEMA).append_column(name, column)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("case", EXTRA)
@pytest.mark.filterwarnings("ignore:column extra has values that cannot be carried along")
def test_a_column_that_nobody_needs_is_carried_and_prepared(tmp_path, kind, case):
    column, expected = EXTRA[case]
    source = open_files(str(with_column(tmp_path / f"a.{kind}", column)), "")
    example = source[0]
    assert example.messages[1].text == "It is 0."
    if expected is not None:
        assert example.info["extra"] == expected
    stored = decode_example(encode_example(example), 0)
    assert (stored.messages, stored.images, stored.info) == (example.messages, example.images, example.info)
    assert [outline.name for outline in source.metadata()] == ["r0"]


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_column_that_cannot_be_carried_is_named_and_left_out(tmp_path, case):
    path = str(with_column(tmp_path / "a.arrow", LEFT_OUT[case]))
    with pytest.warns(UserWarning, match=r"a\.arrow: columns that are not carried along, .*: extra"):
        source = open_files(path, "")
    assert source[0].info == {"data_source": "set0"}


def test_a_needed_column_of_a_type_that_is_none_is_refused(tmp_path):
    path = with_column(tmp_path / "a.arrow", LEFT_OUT["a union"], "messages")
    with pytest.raises(SourceError, match=r"a\.arrow: column messages is sparse_union.*expected texts"):
        open_files(str(path), "")
    path = with_column(tmp_path / "b.arrow", pa.array(["x"]), "id")
    with pytest.raises(SourceError, match=r"b\.arrow has the column id 2 times, expected once"):
        open_files(str(path), "")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_odd_names_of_columns_that_nobody_needs(tmp_path, kind):
    table = pa.Table.from_pylist(llava(1), schema=SCHEMA)
    for name in ("extra", "extra", "id.x", "a.b", ""):
        table = table.append_column(name, pa.array([7]))
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    source = open_files(str(tmp_path / f"a.{kind}"), "")
    assert source[0].info == {"data_source": "set0", "extra": 7, "id.x": 7, "a.b": 7, "": 7}
    assert [outline.name for outline in source.metadata()] == ["r0"]


@pytest.mark.parametrize("splits", [[], None])
def test_a_dataset_dict_without_splits_is_refused(tmp_path, splits):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(SourceError, match=r"lists no splits in dataset_dict\.json"):
        open_files(str(tmp_path), "")


def test_a_group_is_read_though_a_column_that_nobody_needs_is_damaged(tmp_path):
    path = with_column(tmp_path / "a.parquet", pa.array(["word " * 400]))
    chunk = pq.read_metadata(path).row_group(0).column(6)
    assert chunk.path_in_schema == "extra"
    data = bytearray(path.read_bytes())
    data[chunk.dictionary_page_offset : chunk.dictionary_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"a\.parquet: columns that are not carried along, since they cannot be read .*extra"):
        assert open_files(str(path), "")[0].name == "r0"


BOMBS = {  # a file of a few kilobytes, and what it takes in memory
    "one text, many rows": {"conversations": [[{"from": "narrator", "value": "x" * 100_000}]] * 2000, "id": ["a"] * 2000},
    "one text, many turns": {"conversations": [[{"from": "human", "value": "x" * 100_000}] * 2000], "id": ["a"]},
    "one id, many rows": {"conversations": [[]] * 2000, "id": ["x" * 100_000] * 2000},
    "nothing, often": {"conversations": [[{"from": None, "value": None}] * 400_000], "id": ["a"]},
}


@pytest.mark.parametrize("case", BOMBS)
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_bomb_in_parquet_costs_no_more_than_the_limits(tmp_path, case, compression):
    columns = [pa.array(BOMBS[case]["id"]), pa.array(BOMBS[case]["conversations"], pa.list_(TURN))]
    table = pa.Table.from_arrays(columns, ["id", "conversations"])
    pq.write_table(table, tmp_path / "a.parquet", compression=compression)
    del columns, table
    tracemalloc.start()
    try:
        source = open_files(str(tmp_path / "a.parquet"), "", LimitsConfig(row_bytes=1 << 20, group_bytes=8 << 20))
        assert sum(1 for _ in source.metadata()) == len(source) == len(BOMBS[case]["id"])
        for row in range(0, len(source), 100):
            with pytest.raises(
                ExampleError, match=r"record \d+" if len(source) > 1 else r"config\.data\.limits\.row_bytes=1,048,576"
            ):
                source[row]
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    assert pa.total_allocated_bytes() < 40 << 20


def test_a_row_group_or_a_row_beyond_the_limit_names_its_key(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", llava(8))
    with pytest.raises(SourceError, match=r"a\.parquet row group 0 takes \d+ bytes, .*config\.data\.limits\.group_bytes=99;"):
        open_files(str(path), "", LimitsConfig(group_bytes=99))
    for name in (path, write_arrow(tmp_path / "a.arrow", llava(8))):
        source = open_files(str(name), "", LimitsConfig(row_bytes=99))
        with pytest.raises(ExampleError, match=r"record 3 .*takes \d+ bytes, allowed are config\.data\.limits\.row_bytes=99;"):
            source[3]
    wide = with_column(tmp_path / "b.parquet", pa.array(["".join(map(str, range(9999)))]))
    with pytest.warns(UserWarning, match=r"since they go beyond config\.data\.limits\.group_bytes=9,999: .*extra"):
        source = open_files(str(wide), "", LimitsConfig(group_bytes=9999))
    assert source[0].info == {"data_source": "set0"}


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_compressed_arrow_is_measured_before_it_is_read(tmp_path, compression, new):
    rows = [row | {"conversations": [{"from": "human", "value": "x" * 100_000}]} for row in llava(50)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, new(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=20)
    source = open_files(str(tmp_path / "a.arrow"), "")
    assert [outline.name for outline in source.metadata()] == [row["id"] for row in rows]
    if compression is None:
        open_files(str(tmp_path / "a.arrow"), "", LimitsConfig(group_bytes=1 << 20))
        return
    before = pa.total_allocated_bytes()
    with pytest.raises(SourceError, match=r"a\.arrow is compressed and takes 5,\d+,\d+ bytes .*limits\.group_bytes=1,048,576;"):
        open_files(str(tmp_path / "a.arrow"), "", LimitsConfig(group_bytes=1 << 20))
    assert pa.total_allocated_bytes() <= before


def test_nulls_that_take_no_room_in_an_arrow_file_are_counted(tmp_path):
    offsets = pa.array([0, 2**31 - 1], pa.int32())
    column = pa.ListArray.from_arrays(offsets, pa.nulls(2**31 - 1))
    table = pa.Table.from_arrays([pa.array(["a"]), column], ["id", "conversations"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert (tmp_path / "a.arrow").stat().st_size < 2000
    source = open_files(str(tmp_path / "a.arrow"), "")
    with pytest.raises(ExampleError, match=r"takes 17,\d+,\d+,\d+ bytes, .*limits\.row_bytes=268,435,456"):
        source[0]
    assert [outline.name for outline in source.metadata()] == ["a"]


def test_shuffled_reading_keeps_few_row_groups(tmp_path, monkeypatch):
    rows = llava(40)
    source = open_files(str(write_parquet(tmp_path / "a.parquet", rows)), "")
    assert isinstance(source, FileSource)
    held = source.rows
    assert isinstance(held, tables.ParquetRecords)
    source[0]
    table, most = held._table(0)
    assert (table.schema.field("id").type, most) == (pa.string(), None), "not measured and cast again for every row"
    monkeypatch.setattr(tables, "_CACHE_BYTES", 3 * table.nbytes)
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
    assert repr(copy) == repr(source) == f"{kind.capitalize()}Records('a.{kind}', records=2000)"


def test_a_file_that_changes_under_a_run_is_an_error_of_the_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", llava(12))
    source = open_files(str(path), "")
    write_parquet(path, llava(13))
    with pytest.raises(SourceError, match=r"a\.parquet changed while in use: \d+ bytes, \d+ when opened") as caught:
        source[0]
    path.unlink()
    with pytest.raises(SourceError, match="any more: No such file"):
        source[0]
    assert not isinstance(caught.value, ExampleError)
    packed = pickle.dumps(open_files(str(write_arrow(tmp_path / "a.arrow", llava(12))), ""))
    write_arrow(tmp_path / "a.arrow", llava(13))
    with pytest.raises(SourceError, match="changed while in use: 13 records, 12 when opened"):
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
    assert [outline.images for outline in source.metadata()] == [("d/a.jpg",), (), ("b.jpg", "c.jpg")]
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


NAMES = ["../secret", "/etc", "sub/a.arrow", "..", ".", "", "a\\b", "link"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("listed", ["dataset_dict.json", "state.json"])
def test_what_a_saved_dataset_lists_stays_in_its_folder(tmp_path, name, listed):
    save_to_disk(tmp_path / "secret", [llava(2)])
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret" / ("" if listed == "dataset_dict.json" else "data-00000-of-00001.arrow"))
    what = {"splits": [name]} if listed == "dataset_dict.json" else {"_data_files": [{"filename": name}]}
    (folder / listed).write_text(json.dumps(what))
    with pytest.raises(SourceError, match=r"expected what is in the folder|is a link that leaves the folder"):
        open_files(str(folder), "")


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    """A snapshot there holds links alone, to files that are named by their content."""
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "abc" / "set", tmp_path / "datasets--a--b" / "blobs"
    save_to_disk(snapshot, [llava(2)])
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../../blobs/{number}")
    assert open_files(str(snapshot), "")[1].name == "r1"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("[" * 100_000, r"state\.json is damaged \(it is nested too deep\)"),
        ("{", r"state\.json is damaged"),
        ("[]", r"state\.json is damaged"),
        ('{"_data_files": 3}', "has _data_files 3, expected a list"),
        ('{"_data_files": []}', "lists 0 files"),
        ('{"_data_files": [{}]}', r"it names '\?', expected what is in the folder"),
        ('{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "b"}]}', "flatten_indices"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path, state, message):
    write_arrow(tmp_path / "a.arrow", llava(1))
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(SourceError, match=message):
        open_files(str(tmp_path), "")


def test_lists_of_texts_are_outlined_across_row_groups(tmp_path):
    """Also where a row group has more texts than its dictionary holds."""
    turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "x"}]
    rows = [{"id": str(at), "images": [f"a{at % 3}.jpg", f"b{at}.jpg"], "conversations": turns} for at in range(300)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100, dictionary_pagesize_limit=200, data_page_size=100)
    found = list(tables.ParquetRecords(str(path), [str(path)]).scan())
    assert found == [{"id": row["id"], "images": row["images"]} for row in rows]
