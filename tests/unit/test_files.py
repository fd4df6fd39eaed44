"""Files behind URLs read like files on this machine, by ranges, and every failure is one line."""

import errno
import json
import os
import socket
import unicodedata
import uuid

import fsspec
import pytest
from PIL import Image

from deepstack_jax.data.encode.image import ImageError, open_image
from deepstack_jax.data.example import ExampleError, SourceError
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats import json_records as json_rows
from deepstack_jax.data.formats.file_source import FileSource
from deepstack_jax.data.formats.image_files import image_size
from deepstack_jax.data.open import open_files


@pytest.fixture
def remote():
    """A fresh folder in memory, and the file system that it is in."""
    system, folder = fsspec.filesystem("memory"), f"memory://{uuid.uuid4().hex}"
    yield system, folder
    system.store.clear()


def rows(count: int, answer: str = "yes") -> list[dict]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
    return [{"id": f"r{number}", "image": f"sub/{number}.png", "conversations": turns} for number in range(count)]


@pytest.mark.parametrize(
    ("root", "name", "expected"),
    [
        ("/data", "a/b.json", "/data/a/b.json"),
        ("/data", "", "/data"),
        ("/data", "/other/b.json", "/other/b.json"),
        ("/data", "gs://bucket/b", "gs://bucket/b"),
        ("/data", "file:///other/b", "/other/b"),
        ("gs://bucket/data/", "a/./b.json", "gs://bucket/data/a/b.json"),
        ("gs://bucket/data", "", "gs://bucket/data"),
        ("gs://bucket/data", "/local/b", "/local/b"),
        ("file:///data", "b", "/data/b"),
        ("~", "b", os.path.expanduser("~/b")),
        ("/data", "~/b", os.path.expanduser("~/b")),
        ("", "b", os.path.abspath("b")),
    ],
)
def test_names_start_from_the_root_unless_they_stand_for_themselves(root, name, expected):
    assert files.join(root, name) == expected


def test_a_row_is_read_as_a_range(remote, monkeypatch):
    system, folder = remote
    text = json.dumps(rows(300, "long " * 100))
    system.pipe(f"{folder}/train.json", text.encode())
    for number in (0, 7):
        system.pipe(f"{folder}/images/sub/{number}.png", b"pixels %d" % number)
    monkeypatch.setattr(json_rows, "_WINDOW_BYTES", 4096)
    asked: list[int] = []
    read = type(system).cat_file
    monkeypatch.setattr(
        type(system), "cat_file", lambda self, *args, **ends: asked.append(len(data := read(self, *args, **ends))) or data
    )
    source = open_files(f"{folder}/train.json", f"{folder}/images")
    assert isinstance(source, FileSource)
    assert len(source) == 300
    assert sum(asked) == len(text), "the index is built in one pass"
    asked.clear()
    example = source[7]
    assert (example.name, example.images) == ("r7", (b"pixels 7",))
    assert sum(asked) < 1000
    asked.clear()
    assert [outline.images for outline in source.metadata()] == [(f"sub/{number}.png",) for number in range(300)]
    assert sum(asked) <= len(text), "no image is read"
    lost = source.missing_images(10)
    assert [path.rpartition("/")[2] for path in lost] == [f"{number}.png" for number in range(10) if number not in (0, 7)]


def test_rows_behind_a_url_equal_the_same_rows_here(remote, tmp_path):
    system, folder = remote
    content = rows(3)
    for place in (tmp_path / "images" / "sub",):
        place.mkdir(parents=True)
    for number in range(3):
        path = tmp_path / "images" / "sub" / f"{number}.png"
        Image.new("L", (8, 6), number).save(path)
        system.pipe(f"{folder}/images/sub/{number}.png", path.read_bytes())
    for name, text in (("a.json", json.dumps(content)), ("a.jsonl", "\n".join(map(json.dumps, content)))):
        (tmp_path / name).write_text(text)
        system.pipe(f"{folder}/{name}", text.encode())
        here = open_files(str(tmp_path / name), str(tmp_path / "images"))
        for there in (open_files(f"{folder}/{name}", f"{folder}/images"), open_files(str(tmp_path / name), f"{folder}/images")):
            for index in range(3):
                assert there[index].messages == here[index].messages
                assert [files.read_bytes(str(path)) for path in here[index].images] == list(there[index].images)


def test_an_image_that_is_not_there_is_one_bad_sample(remote):
    system, folder = remote
    system.pipe(f"{folder}/a.json", json.dumps(rows(2)).encode())
    system.pipe(f"{folder}/images/sub/0.png", b"x")
    source = open_files(f"{folder}/a.json", f"{folder}/images")
    assert source[0].images == (b"x",)
    with pytest.raises(
        ExampleError, match=r"record 1 \(id 'r1'\): cannot read image memory://.*/sub/1\.png: No such file"
    ) as caught:
        source[1]
    assert caught.value.name == "r1"


def test_malformed_json_behind_a_url_is_located(remote):
    system, folder = remote
    system.pipe(f"{folder}/a.json", json.dumps(rows(3), indent=1)[:-40].encode())
    with pytest.raises(SourceError, match=r"a\.json line \d+ column \d+: the array is cut.*last good id 'r1'"):
        open_files(f"{folder}/a.json", "")


def test_what_is_not_there_and_what_cannot_be_reached(remote, monkeypatch):
    system, folder = remote
    with pytest.raises(SourceError, match=r"nothing\.json does not exist; give"):
        open_files(f"{folder}/nothing.json", "")
    system.pipe(f"{folder}/a.json", json.dumps(rows(1)).encode())
    with pytest.raises(SourceError, match=r"image root memory://.*/nowhere is not a folder"):
        open_files(f"{folder}/a.json", f"{folder}/nowhere")
    with pytest.raises(SourceError, match=r"cannot read nosuch://x/a\.json: .*Protocol not known: nosuch"):
        open_files("nosuch://x/a.json", "")

    def refuse(*_, **__):
        raise RuntimeError("403\nforbidden")  # backends raise kinds of their own

    source = open_files(f"{folder}/a.json", folder)
    monkeypatch.setattr(type(system), "cat_file", refuse)
    with pytest.raises(
        SourceError, match=r"cannot read .*a\.json any more: RuntimeError: 403 forbidden; put it back"
    ) as caught:
        source[0]
    assert not isinstance(caught.value, ExampleError)


def test_a_missing_backend_names_the_package(monkeypatch):
    def absent(_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(files, "url_to_fs", absent)
    with pytest.raises(SourceError, match=r"install gcsfs .*pip install '\.\[gcs\]'"):
        open_files("gs://bucket/a.json", "")


def test_a_short_answer_to_a_range_is_an_error(remote, tmp_path):
    system, folder = remote
    system.pipe(f"{folder}/a", b"0123456789")
    assert files.read_range(f"{folder}/a", 3, 4, 10) == b"3456"
    with pytest.raises(OSError, match="got 2 bytes for a range of 4"):
        files.read_range(f"{folder}/a", 8, 4, 10)
    (tmp_path / "a").write_bytes(b"0123456789")
    with pytest.raises(OSError, match=r"changed while in use \(10 bytes, 11 when opened\)") as caught:
        files.read_range(str(tmp_path / "a"), 3, 4, 11)
    assert caught.value.errno == errno.ESTALE


def test_remote_files_seek_and_read_like_local_ones(remote):
    system, folder = remote
    system.pipe(f"{folder}/a", bytes(range(100)))
    with files.open_binary(f"{folder}/a", 16) as file:
        assert file.read(3) == bytes([0, 1, 2])
        assert file.seek(-4, os.SEEK_END) == 96
        assert file.read() == bytes([96, 97, 98, 99])
        assert file.read(1) == b""
        file.seek(50)
        assert file.tell() == 50
        assert file.read(30) == bytes(range(50, 80))


def test_a_local_copy_is_made_once_per_version(remote, tmp_path, monkeypatch):
    system, folder = remote
    monkeypatch.setenv("DEEPSTACK_CACHE", str(tmp_path / "cache"))
    system.pipe(f"{folder}/a.arrow", b"one")
    copy = files.local_copy(f"{folder}/a.arrow")
    assert (os.path.basename(copy), files.read_bytes(copy)) == ("a.arrow", b"one")
    written = os.stat(copy).st_mtime_ns
    assert files.local_copy(f"{folder}/a.arrow") == copy
    assert os.stat(copy).st_mtime_ns == written
    system.pipe(f"{folder}/a.arrow", b"three")
    assert files.read_bytes(files.local_copy(f"{folder}/a.arrow")) == b"three"
    assert sorted(os.listdir(os.path.dirname(copy))) == ["a.arrow"], "nothing half fetched is left"
    assert files.local_copy("/some/file") == "/some/file"


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder"])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as waiting:
        make = {
            "FIFO": os.mkfifo,
            "socket": waiting.bind,
            "device": lambda name: os.symlink("/dev/zero", name),
            "folder": os.mkdir,
        }
        make[kind]("a.png")
        path = str(tmp_path / "a.png")
        reason = "Is a directory" if kind == "folder" else "a FIFO, a socket or a device, expected a file"
        for read in (files.size, files.read_bytes, files.open_binary, lambda name: files.read_range(name, 0, 1, 1)):
            with pytest.raises(OSError) as caught:
                read(path)
            assert reason in caught.value.strerror
        for read in (open_image, image_size):
            with pytest.raises(ImageError, match=reason):
                read(path)
        os.rename("a.png", "a.json")
        with pytest.raises(SourceError, match=r"a\.json"):
            open_files(str(tmp_path / "a.json"), "")


def test_a_name_composed_otherwise_is_hinted_at(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Müller/café.png") for form in ("NFC", "NFD"))
    (tmp_path / decomposed).parent.mkdir()
    (tmp_path / decomposed).write_bytes(b"x")
    with pytest.raises(OSError, match="NFC, NFD") as caught:
        files.read_bytes(str(tmp_path / composed))
    assert ascii(unicodedata.normalize("NFD", "Müller")) in caught.value.strerror
    with pytest.raises(OSError, match="No such file") as caught:
        files.read_bytes(str(tmp_path / "Mäller"))
    assert "NFC" not in caught.value.strerror


def test_json_that_is_too_large_or_too_deep_is_one_error(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        files.read_json(str(path))
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1000)
    with pytest.raises(OSError) as caught:
        files.read_json(str(path))
    assert caught.value.strerror == "it has 100,000 bytes, more than the 1,000 allowed"
