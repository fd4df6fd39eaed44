"""Shards out of sources: the same bytes for any number of workers and after any interruption, and nothing lost in silence."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from deepstack_jax.data.encode.image import open_image
from deepstack_jax.data.example import Example, ExampleError, Message, SourceError
from deepstack_jax.data.shards import writer
from deepstack_jax.data.shards.codec import decode_example
from deepstack_jax.data.shards.reader import ArrayRecordReader, ShardSource, verify
from deepstack_jax.data.synthetic import DocumentPages
from deepstack_jax.prepare import chunks
from deepstack_jax.prepare.chunks import (
    Bad,
    DiskError,
    Job,
    make_chunk,
    make_chunks,
    read_checked,
    record_bytes,
    shard_bytes,
)
from deepstack_jax.prepare.folder import ShardFolder
from tests.unit.made_examples import MadeExamples
from tests.unit.made_shards import write_set

ROWS, SHARD_ROWS = 10, 4
OPTIONS = {"split": "train", "rows": ROWS}
INPUTS = {"train.json": "1 file, 5 bytes"}


def nothing() -> None: ...


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def open_folder(folder: Path, force: bool = False, **options) -> ShardFolder:
    folder.mkdir(exist_ok=True)
    return ShardFolder(folder, OPTIONS | options, INPUTS, force)


def make(folder: Path, source, limit: float = 1.0) -> list[int]:
    """Make what is left to make, in this process; returns the numbers of the chunks that were made."""
    with open_folder(folder) as state:
        job = Job(source, SHARD_ROWS, str(folder))
        left = state.left(job)
        for number in left:
            state.add(make_chunk(job, number, nothing))
        state.finish(len(source), limit)
    return left


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder that was made without an interruption."""
    folder = tmp_path_factory.mktemp("prepared") / "whole"
    assert make(folder, MadeExamples(ROWS)) == [0, 1, 2]
    return folder


def test_a_shard_holds_the_rows_of_its_chunk_as_the_writer_of_records_would_write_them(whole, tmp_path):
    source = MadeExamples(ROWS)
    for number, rows in enumerate((range(4), range(4, 8), range(8, 10))):
        write_set(tmp_path / str(number), [source[row] for row in rows])
        expected = (tmp_path / str(number) / "shard-00000.array_record").read_bytes()
        assert (whole / f"shard-{number:05d}.array_record").read_bytes() == expected
    stored = ShardSource(str(whole))
    assert list(stored) == [source[row] for row in range(ROWS)]
    assert stored.manifest["images"] == sum(len(source[row].images) for row in range(ROWS))
    assert stored.manifest["source"] == OPTIONS | {"left_out": []}
    assert verify(str(whole)) == stored.manifest
    assert sorted(contents(whole)) == ["manifest.json", "prepare.json", *(f"shard-{n:05d}.array_record" for n in range(3))]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_worker_processes_is_not_seen_in_the_bytes(whole, tmp_path, workers):
    looked, job = [], Job(MadeExamples(ROWS), SHARD_ROWS, str(tmp_path))
    with open_folder(tmp_path) as state:
        make_chunks(job, state.left(job), workers, state.add, looked.append, lambda: False)
        state.finish(ROWS, 0.0)
    assert contents(tmp_path) == contents(whole)
    assert looked == sorted(looked)
    assert 0 < looked[-1] <= ROWS


@dataclass(frozen=True)
class Witness:
    """Says in its examples where they were read."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Example:
        modules = [name for name in ("jax", "flax", "torch", "grain") if name in sys.modules]
        return Example(index, str(os.getpid()), (), (Message("human", "Where?"),), {"modules": modules})


def test_workers_are_other_processes_and_know_no_jax(tmp_path):
    job = Job(Witness(), 2, str(tmp_path))
    make_chunks(job, [0], 1, lambda chunk: None, lambda rows: None, lambda: False)
    reader = ArrayRecordReader(str(tmp_path / "shard-00000.array_record"))
    [first, second] = [decode_example(record, row) for row, record in enumerate(reader.read_all())]
    assert first.name == second.name != str(os.getpid())
    assert first.info["modules"] == []


def test_bad_rows_are_left_out_and_reported_with_the_number_of_their_row(tmp_path):
    source = MadeExamples(ROWS, broken=(3,), refused=(5, 8, 9))
    make(tmp_path / "set", source)
    report = [json.loads(line) for line in (tmp_path / "set" / "bad.jsonl").read_text().splitlines()]
    assert [(line["row"], line["id"]) for line in report] == [(3, "made3"), (5, "made5"), (8, "made8"), (9, "made9")]
    assert report[0]["reason"].startswith("made3: cannot read an embedded image: ")
    assert report[1]["reason"] == "row 5 is refused"
    stored = ShardSource(str(tmp_path / "set"))
    assert stored.manifest["source"]["left_out"] == [3, 5, 8, 9]
    assert [example.name for example in stored] == [source[row].name for row in (0, 1, 2, 4, 6, 7)]
    assert [shard["rows"] for shard in stored.manifest["shards"]] == [3, 3], "a chunk without a good row has no shard"


def test_too_many_bad_rows_stop_it_after_the_report_and_mended_ones_cost_their_shards_alone(whole, tmp_path):
    folder, bad = tmp_path / "set", MadeExamples(ROWS, broken=(5,), refused=(0,))
    message = rf"2 of 10 records cannot be used, .*=0\.15 allows 1; the first: row 0 is refused; .*{folder}/bad\.jsonl"
    with pytest.raises(SourceError, match=message) as caught:
        make(folder, bad, limit=0.15)
    assert "fix them and run the same command" in str(caught.value)
    assert len((folder / "bad.jsonl").read_text().splitlines()) == 2
    assert not (folder / "manifest.json").exists()
    with pytest.raises(SourceError, match="2 of 10 records"):
        assert make(folder, bad, limit=0.15) == [], "nothing is read again that is still bad"
    assert make(folder, MadeExamples(ROWS, broken=(5,)), limit=0.15) == [0]
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").touch()
    with pytest.raises(SourceError, match="prepare the folder again, with --force"):
        open_folder(folder)
    with open_folder(folder, force=True) as state:
        assert state.left(Job(bad, SHARD_ROWS)) == [0, 1, 2]
        assert contents(folder).keys() == {"prepare.json"}
    make(folder, MadeExamples(ROWS))
    assert contents(folder) == contents(whole)


def test_no_good_row_is_an_error_however_many_may_be_bad(tmp_path):
    with pytest.raises(SourceError, match=r"10 of 10 records cannot be used, .*allows 9; the first: row 0 is refused"):
        make(tmp_path / "set", MadeExamples(ROWS, refused=tuple(range(ROWS))))
    assert len((tmp_path / "set" / "bad.jsonl").read_text().splitlines()) == ROWS


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_after_a_kill_it_goes_on_and_ends_with_the_same_bytes(whole, tmp_path, finished):
    folder, source = tmp_path / "set", MadeExamples(ROWS)
    with open_folder(folder) as state:
        job = Job(source, SHARD_ROWS, str(folder))
        for number in (2, 0, 1)[:finished]:
            state.add(make_chunk(job, number, nothing))
    # What a kill leaves: a shard that nothing is known of, or what is known of one that is not there, and scratch files.
    (folder / ".part-x").mkdir()
    (folder / ".part-x" / "shard").write_bytes(b"half")
    (folder / ".part-manifest.json").write_text("{")
    (folder / "shard-00001.array_record").touch() if finished < 3 else None
    if finished < 3:
        known = [1, 3, [], ["shard-00001.array_record", 4, 7, "x"]]
        (folder / "shard-00001.json").write_text(json.dumps(known))
    with pytest.raises(SourceError, match=r"manifest\.json.*not finished"):
        ShardSource(str(folder))
    assert make(folder, source) == sorted({0, 1, 2} - {2, 0, 1}.intersection((2, 0, 1)[:finished]))
    assert contents(folder) == contents(whole)
    assert make_again_is_nothing(folder)


def make_again_is_nothing(folder: Path) -> bool:
    with open_folder(folder) as state:
        return state.manifest == verify(str(folder))


def test_a_finished_shard_that_was_cut_or_lost_is_made_again(whole, tmp_path):
    folder, source = tmp_path / "set", MadeExamples(ROWS)
    with open_folder(folder) as state:
        for number in range(3):
            state.add(make_chunk(Job(source, SHARD_ROWS, str(folder)), number, nothing))
    (folder / "shard-00000.array_record").unlink()
    os.truncate(folder / "shard-00002.array_record", 1000)
    assert make(folder, source) == [0, 2]
    assert contents(folder) == contents(whole)


def test_a_shard_made_again_never_stands_beside_what_was_said_of_another(tmp_path, monkeypatch):
    """Shards are filled up to whole blocks, so that one with an example more may have the same size."""
    folder = tmp_path / "set"
    with open_folder(folder) as state:
        state.add(make_chunk(Job(MadeExamples(ROWS, refused=(0,)), SHARD_ROWS, str(folder)), 0, nothing))
    monkeypatch.setattr(os, "replace", stop_at(os.replace, "shard-00000.array_record"))
    with pytest.raises(KeyboardInterrupt):
        make(folder, MadeExamples(ROWS))
    monkeypatch.undo()
    assert not (folder / "shard-00000.array_record").exists()
    assert make(folder, MadeExamples(ROWS)) == [0, 1, 2]


def stop_at(replace, name: str):
    """`os.replace`, and a kill in place of what would make `name`."""

    def stopped(source, target):
        if Path(target).name == name:
            raise KeyboardInterrupt
        replace(source, target)

    return stopped


def test_a_folder_that_an_earlier_release_began_is_made_again_with_the_same_bytes(whole, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    part = manifest | {"rows": 4, "shards": manifest["shards"][:1]}
    (folder / "journal.jsonl").write_text(json.dumps([0, 3, 2000, [], part]) + "\n")
    with pytest.warns(UserWarning, match="was begun by an earlier release: its shards are made again"):
        assert make(folder, MadeExamples(ROWS)) == [0, 1, 2]
    assert contents(folder) == contents(whole)


def test_other_input_or_options_are_refused_and_nothing_is_touched(whole, tmp_path):
    before = contents(whole)
    with pytest.raises(SourceError, match=r"rows: 10 there, 11 now; name another --out, or start over with --force"):
        open_folder(whole, rows=11)
    with pytest.raises(SourceError, match=r"config\.data\.images: nothing there, images now"):
        open_folder(whole, **{"config.data.images": "images"})
    with pytest.raises(SourceError, match=r"train\.json: 1 file, 5 bytes there, 1 file, 6 bytes now"):
        ShardFolder(whole, OPTIONS, {"train.json": "1 file, 6 bytes"})
    assert contents(whole) == before
    (tmp_path / "shard-00000.array_record").write_bytes(b"of somebody else")
    with pytest.raises(SourceError, match="holds shards of unknown origin; name another --out"):
        open_folder(tmp_path)
    assert contents(tmp_path) == {"shard-00000.array_record": b"of somebody else"}
    (tmp_path / "prepare.json").write_text("{")
    with pytest.raises(SourceError, match=r"prepare\.json is damaged .*--force"):
        open_folder(tmp_path)


def test_options_may_change_until_a_shard_is_there(tmp_path):
    with pytest.raises(SourceError, match="10 of 10 records cannot be used"):  # as with a wrong image root
        make(tmp_path, MadeExamples(ROWS, refused=tuple(range(ROWS))))
    with open_folder(tmp_path, rows=11) as state:
        assert state.left(Job(MadeExamples(ROWS), SHARD_ROWS)) == [0, 1, 2]


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "part-0.parquet").write_bytes(b"the data itself")
    for force in (False, True):
        with pytest.raises(SourceError, match=r"holds part-0\.parquet, which is not of a run of prepare; name another --out"):
            open_folder(tmp_path, force)
    assert contents(tmp_path).keys() == {"part-0.parquet"}


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with open_folder(tmp_path), pytest.raises(SourceError, match=f"another prepare is writing to {tmp_path}; wait"):
        open_folder(tmp_path)
    with open_folder(tmp_path) as state:
        assert state.chunks == {}


def test_force_deletes_what_prepare_wrote_and_nothing_else(tmp_path):
    make(tmp_path / "set", MadeExamples(ROWS, refused=(1,)))
    (tmp_path / "set" / "notes.txt").write_text("mine")
    with open_folder(tmp_path / "set", force=True, rows=11):
        assert contents(tmp_path / "set").keys() == {"notes.txt", "prepare.json"}


class FullWriter:
    """An ArrayRecordWriter on a full disk: it shows when what is buffered is written out."""

    def __init__(self, path: str, _options: str) -> None:
        Path(path).write_bytes(b"some of it")

    def write(self, record: bytes) -> None: ...

    def close(self) -> None:
        raise RuntimeError("write() failed: No space left on device; writing /x/shard; at byte 1048576; Failed to close")


def no_space(*_: str) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", [(writer, "ArrayRecordWriter", FullWriter), (os, "replace", no_space)])
def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(tmp_path, monkeypatch, where):
    monkeypatch.setattr(*where)
    with pytest.raises(DiskError, match="No space left on device") as caught:
        make_chunk(Job(MadeExamples(ROWS), SHARD_ROWS, str(tmp_path)), 0, nothing)
    assert str(tmp_path) not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_lost_source_is_told_from_a_full_disk(tmp_path):
    class Lost(MadeExamples):
        def __getitem__(self, index: int) -> Example:
            if index == 2:
                raise SourceError("cannot read the file any more")
            return super().__getitem__(index)

    with pytest.raises(SourceError, match="cannot read the file any more") as caught:
        make_chunk(Job(Lost(ROWS), SHARD_ROWS, str(tmp_path)), 0, nothing)
    assert not isinstance(caught.value, DiskError | ExampleError)
    assert list(tmp_path.iterdir()) == []


def test_stopping_drops_what_is_half_made(tmp_path):
    made = []
    make_chunks(Job(MadeExamples(200), 50, str(tmp_path)), range(4), 1, made.append, lambda rows: None, lambda: bool(made))
    assert [chunk.number for chunk in made] == [0]
    kept = {path.name for path in tmp_path.iterdir()}
    assert "shard-00000.array_record" in kept
    assert not [name for name in kept if name.startswith(chunks.SCRATCH)]


def test_an_error_of_a_worker_reaches_the_caller(tmp_path):
    job = Job(MadeExamples(ROWS), SHARD_ROWS, str(tmp_path / "nowhere"))
    with pytest.raises(DiskError, match="No such file or directory"):
        make_chunks(job, range(3), 1, lambda chunk: None, lambda rows: None, lambda: False)


def test_a_row_is_checked_as_it_is_stored():
    pages = DocumentPages(0, 2, "checker", 3, "train")
    page, record = read_checked(Job(pages, 2), 1)
    assert isinstance(page.images[0], bytes)
    np.testing.assert_array_equal(np.asarray(open_image(page.images[0]).convert("RGB")), pages[1].images[0])
    assert decode_example(record, 1).images == page.images
    with pytest.raises(ExampleError, match=r"made7: cannot read an embedded image: .*; fix or remove it"):
        read_checked(Job(MadeExamples(ROWS, broken=(7,)), 4), 7)


def test_a_look_raises_what_a_run_would_and_changes_nothing(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "set")
    before = contents(tmp_path / "set")
    with pytest.raises(SourceError, match="begun with other input or options: rows: 10 there, 11 now"):
        ShardFolder(tmp_path / "set", OPTIONS | {"rows": 11}, INPUTS, look=True)
    with ShardFolder(tmp_path / "set", OPTIONS | {"rows": 11}, INPUTS, force=True, look=True) as state:
        assert (state.manifest, state.chunks) == (None, {})
    with ShardFolder(tmp_path / "set", OPTIONS, INPUTS, look=True) as state:
        assert state.manifest is not None
    assert contents(tmp_path / "set") == before
    (tmp_path / "other").mkdir()
    with ShardFolder(tmp_path / "other", OPTIONS, INPUTS, look=True):
        assert not list((tmp_path / "other").iterdir())
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(SourceError, match=r"holds mine\.txt, which is not of a run of prepare"):
        ShardFolder(tmp_path / "other", OPTIONS, INPUTS, look=True)


def test_looking_writes_nothing_and_counts_the_same(tmp_path, whole, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = MadeExamples(ROWS, refused=(2,))
    chunk = make_chunk(Job(source, SHARD_ROWS), 0, nothing)
    assert (chunk.shard, chunk.bad) == (None, (Bad(2, "made2", "row 2 is refused"),))
    assert list(tmp_path.iterdir()) == []
    wrote = make_chunk(Job(source, SHARD_ROWS, str(tmp_path)), 0, nothing)
    assert chunk == wrote._replace(shard=None)


def test_the_estimate_is_close_to_the_size(whole, tmp_path):
    source = MadeExamples(1500)
    make_chunk(Job(source, 1500, str(tmp_path)), 0, nothing)
    for rows, shards, folder in ((ROWS, 3, whole), (1500, 1, tmp_path)):
        exact = sum(path.stat().st_size for path in folder.glob("*.array_record"))
        assert 0.8 * exact < shard_bytes(rows, shards, record_bytes(source)) < 1.2 * exact
    with pytest.raises(SourceError, match=r"none of \d+ records .*; the first: row \d+ is refused; .*--config\.data\.root=DIR"):
        record_bytes(MadeExamples(300, refused=tuple(range(300))))
