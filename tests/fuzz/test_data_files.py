"""Data files: JSON of any kind, records of any msgpack, and tables with bytes changed anywhere."""

import json
import random
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepstack_jax.data.example import Example, ExampleError, SourceError
from deepstack_jax.data.formats.footers import read_chunks
from deepstack_jax.data.open import open_files
from deepstack_jax.data.shards.codec import decode_example, encode_example
from deepstack_jax.data.shards.reader import ShardSource
from deepstack_jax.printing import one_line
from tests.fuzz.watch import is_one_line, reads_only
from tests.unit.test_records import shard_of
from tests.unit.test_tables import llava, write_arrow, write_headless, write_parquet

REPOSITORY = Path(__file__).parents[2]
LEADS_OUT = ["../../etc/passwd", "/etc/passwd", "http://127.0.0.1:9/x", "file:///etc/passwd", "data:,x", "~/x", "a::b", "a\0b"]
KEYS = ["id", "image", "images", "conversations", "messages", "texts", "data_source", "from", "value", "role", "content"]
ROLES = ["human", "gpt", "user", "assistant", "<image>", "image", "type", "text", "bytes", "path"]

words = st.text(max_size=8) | st.sampled_from([*LEADS_OUT, *ROLES, "\ud83d", "\x1b]0;x\x07", "x" * 5000])
numbers = st.integers() | st.sampled_from([2**70, 10**400, -(2**63)]) | st.floats()
scalars = st.none() | st.booleans() | numbers | words
keys = st.sampled_from([*KEYS, *ROLES]) | words
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)
turns = st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": words}), max_size=3)
like_rows = st.fixed_dictionaries(
    {"conversations": turns | anything}, optional={"image": words | anything, "id": scalars, "more": anything}
)


def refused(error: SourceError, most: int = 3000) -> None:
    """A refusal is a line, as it is shown, and its row has a name that can be written."""
    assert len(str(error)) < most
    is_one_line(ValueError(one_line(str(error))), 1500)
    if isinstance(error, ExampleError):
        error.name.encode()


def holds(example: Example, folder: Path | None) -> None:
    """What an example may be: images in the folder or as bytes, and texts that can be written into a record."""
    for image in example.images:
        assert isinstance(image, bytes) or (folder and isinstance(image, str) and image.startswith(f"{folder}/")), image
    example.name.encode()
    inside = Example(0, example.name, (b"x",) * len(example.images), example.messages, example.info)
    stored = decode_example(encode_example(inside), 0)
    assert stored.messages == example.messages
    assert len(stored.info) <= len(example.info)


@given(st.lists(like_rows | anything, max_size=3))
def test_rows_of_json_are_examples_or_one_line_each(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drawn))
    with reads_only(folder):
        try:
            source = open_files(str(folder / "a.jsonl"), str(folder))
        except SourceError as error:
            refused(error)
            return
        assert len(list(source.metadata())) == len(source)
        source.missing_images(3)
        for index in range(len(source)):
            try:
                holds(source[index], folder)
            except ExampleError as error:
                refused(error, 1500 + 2 * len(str(folder)))


@given(
    st.binary(max_size=60) | anything.map(json.dumps).map(str.encode),
    st.sampled_from(["a.json", "a.jsonl", "a.parquet", "a.arrow"]),
)
def test_bytes_that_are_no_data_file_are_one_line(tmp_path_factory, content, name):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / name).write_bytes(content)
    with reads_only(folder):
        try:
            source = open_files(str(folder / name), str(folder))
        except SourceError as error:
            refused(error)
            return
    assert len(list(source.metadata())) == len(source)


def unlike_json(inner: st.SearchStrategy) -> st.SearchStrategy:
    ext = st.builds(msgpack.ExtType, st.integers(0, 3), st.binary(max_size=8) | inner.map(packed))
    return st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=3) | ext


def packed(value: object) -> bytes:
    return msgpack.packb(value, default=str, unicode_errors="surrogatepass")


values = st.recursive(scalars | st.binary(max_size=8), unlike_json, max_leaves=12)
stored_turns = st.lists(st.tuples(st.sampled_from(["human", "gpt"]) | scalars, words | scalars), max_size=3)
like_records = st.tuples(
    words | values, stored_turns | values, st.lists(st.binary(max_size=4) | words, max_size=2) | values, values
)


@given(st.binary(max_size=80) | (like_records | values).map(packed), st.integers(0, 400))
def test_records_are_examples_or_damaged_and_open_nothing(tmp_path_factory, record, cut):
    del tmp_path_factory
    with reads_only(Path("/nowhere")):
        for content in (record, record[:cut]):
            try:
                example = decode_example(content, 0)
            except MemoryError:
                raise
            except Exception:  # what a shard says of it is held by the test below
                continue
            holds(example, None)


@given(st.lists(like_records.map(packed), min_size=1, max_size=3))
def test_shards_of_any_records_name_the_bad_ones(tmp_path_factory, drawn):
    folder = shard_of(tmp_path_factory.mktemp("shards") / "set", drawn)
    source, names = ShardSource(str(folder)), []
    for index in range(len(source)):
        try:
            holds(source[index], None)
        except ExampleError as error:
            refused(error)
            names.append(error.name)
    assert set(names) <= {f"record {index}" for index in range(len(source))}


@given(st.binary(max_size=60), st.integers(-2, 80))
def test_footers_of_parquet_are_sizes_or_one_error(tmp_path_factory, footer, length):
    path = tmp_path_factory.mktemp("footers") / "a.parquet"
    path.write_bytes(b"PAR1" + footer + (len(footer) if length > 60 else max(0, length)).to_bytes(4, "little") + b"PAR1")
    try:
        chunks = read_chunks(str(path))
    except ValueError as error:
        is_one_line(error)
        return
    assert all(isinstance(chunk.values, int) for group in chunks for chunk in group)


def changed(good: bytes, seed: int) -> bytes:
    """The same file, a few of its bytes changed."""
    draw, content = random.Random(seed), bytearray(good)
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        width = draw.choice([1, 1, 4, 8])
        kinds = (
            draw.randbytes(width),
            b"\xff" * width,
            bytes(width),
            draw.choice([2**31 - 1, 2**30, 2**16]).to_bytes(4, "little"),
        )
        at, new = draw.randrange(len(good)), draw.choice(kinds)
        content[at : at + len(new)] = new
    return bytes(content[: len(good)])


def read_changed(path: Path, seeds: range) -> None:
    """Reads damaged copies of a table one after the other; anything but rows and refusals ends it."""
    good = path.read_bytes()
    for seed in seeds:
        print(seed, flush=True)
        path.write_bytes(changed(good, seed))
        try:
            source = open_files(str(path), "")
            for index in range(min(len(source), 8)):
                try:
                    holds(source[index], None)
                except ExampleError as error:
                    refused(error)
            assert sum(1 for _ in source.metadata()) == len(source)
        except SourceError as error:
            refused(error)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "headless.arrow"])
def test_tables_with_changed_bytes_never_end_the_process(tmp_path, kind):
    """In a process of its own, which a damaged offset that is followed would end."""
    path, many = tmp_path / f"a.{kind}", settings.default.max_examples
    {"parquet": write_parquet, "arrow": write_arrow, "headless.arrow": write_headless}[kind](path, llava(6))
    first = 0 if many <= 100 else random.randrange(2**32)
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.test_data_files", str(path), str(first), str(many)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, f"seed {done.stdout.split()[-1:]}: {done.stderr[-2000:]}"


if __name__ == "__main__":
    read_changed(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[2]) + int(sys.argv[3])))
