"""WebDataset tar files: samples as records, what is refused of them, and that nothing but headers is read to open one."""

import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import pytest

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.example import ExampleError, Message, SourceError
from deepstack_jax.data.formats import tars
from deepstack_jax.data.formats.file_source import FileSource
from deepstack_jax.data.open import open_files

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
QUESTION = (Message("human", "<image>\nWhat?"), Message("gpt", "That."))


def write(path: Path, members: dict[str, bytes | object], form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of files; what is not bytes is written as JSON."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def opened(path: Path | str, images: str = "", limits: LimitsConfig | None = None) -> FileSource:
    source = open_files(str(path), images, limits or LimitsConfig())
    assert isinstance(source, FileSource)
    return source


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_records_whatever_their_form(form, tmp_path):
    long = "d/" + "k" * 90 + ("" if form == tarfile.USTAR_FORMAT else "k" * 200)
    rows = {"texts": [{"user": "Compare.", "assistant": "Same."}], "source": "pairs", "relevance_min": 4}
    write(tmp_path / "a-0.tar", {"d/1.jpg": b"one", "d/1.json": {"conversations": TURNS, "id": 7, "image": "gone.jpg"}}, form)
    write(
        tmp_path / "a-1.tar",
        {
            "d/1.txt": "A caf\u00e9 \n".encode(),  # another sample, as its shard is another
            "d/1.JPG": b"two",
            "d/1.json": {"url": "http://x", "width": 3},
            f"{long}.img0.png": b"first",
            f"{long}.img1.png": b"second",
            f"{long}.meta.json": rows,
            "t.json": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        },
        form,
    )
    source = pickle.loads(pickle.dumps(opened(tmp_path / "a-*.tar")))
    assert len(source) == 4
    turned, captioned, pair, text = (source[row] for row in range(4))
    assert (turned.name, turned.images, turned.messages) == ("7", (b"one",), QUESTION)
    assert (captioned.name, captioned.images) == ("d/1", (b"two",))
    assert captioned.messages == (Message("human", "<image>"), Message("gpt", "A caf\u00e9"))
    assert captioned.info == {"url": "http://x", "width": 3}
    assert (pair.name, pair.images) == (long, (b"first", b"second"))
    assert pair.messages[0].text == "<image>\n<image>\nCompare."
    assert (text.name, text.images, text.messages[0].text) == ("t", (), "Hi")
    outlines = list(source.metadata())
    assert [outline.name for outline in outlines] == ["7", "d/1", long, "t"]
    assert (outlines[2].data_source, outlines[2].ratings[0]) == ("pairs", 4)
    assert not source.missing_images(4)


def test_members_of_other_kinds_are_named_and_folders_passed_over(tmp_path):
    path = write(tmp_path / "a.tar", {"1.jpg": b"x", "1.cls": b"3", "1.txt": b"y", "README": b"z", "._1.jpg": b"w"})
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("images")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with pytest.warns(UserWarning, match=r"not read, as images, \.json and \.txt are: without a suffix 2, \.cls 1"):
        assert len(opened(path)) == 1


BAD = {
    "two records": ({"1.a.json": {}, "1.b.json": {}}, "has 2 members .json, expected one"),
    "no JSON": ({"1.json": b"{", "1.jpg": b"x"}, "its .json is none"),
    "a list": ({"1.json": [1], "1.jpg": b"x"}, "its .json is no object"),
    "no conversation": ({"1.json": {"url": "x"}, "1.jpg": b"x"}, "has no conversations, messages or texts, but url"),
    "text alone": ({"1.txt": b"x"}, "is a .txt without an image"),
    "not UTF-8": ({"1.txt": b"\xff", "1.jpg": b"x"}, "its .txt is not UTF-8"),
    "much text": ({"1.txt": b"x" * 300, "1.jpg": b"x"}, "config.data.limits.text_bytes=200; raise that"),
    "much of all": ({"1.txt": b"x", "1.jpg": b"x" * 1000}, "config.data.limits.row_bytes=900; raise that"),
    "a path that leaves": ({"1.json": {"conversations": TURNS, "image": "../secret.png"}}, "leaves the image root"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_sample_that_is_no_record_is_that_samples_matter(case, tmp_path):
    members, reason = BAD[case]
    path = write(tmp_path / "a.tar", members | {"good.jpg": b"x", "good.json": {"conversations": TURNS}})
    source = opened(path, str(tmp_path), LimitsConfig(text_bytes=200, row_bytes=900))
    with pytest.raises(ExampleError) as error:
        source[0]
    assert f"{path} record 0 (id" in str(error.value)
    assert reason in str(error.value)
    assert source[1].messages == QUESTION
    assert len(list(source.metadata())) == 2


def test_names_lead_nowhere(tmp_path):
    """A key is a name: nothing is written, whatever it spells."""
    path = write(
        tmp_path / "a.tar", {"../../up.jpg": b"x", "../../up.txt": b"y", "/etc/passwd.jpg": b"x", "/etc/passwd.txt": b"y"}
    )
    source = opened(path)
    assert [source[row].name for row in range(2)] == ["../../up", "/etc/passwd"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind, tmp_path):
    path = write(tmp_path / "a.tar", {"1.jpg": b"x", "1.txt": b"y"})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("2.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(SourceError, match=r"a\.tar: member 2\.jpg is a link, a device or sparse") as error:
        opened(path)
    assert "\n" not in str(error.value)


def test_a_damaged_tar_is_one_line_or_reads_as_it_says(tmp_path):
    whole = write(
        tmp_path / "a.tar", {f"{n}.{end}": b"x" * 700 for n in range(3) for end in ("jpg", "txt")}, tarfile.PAX_FORMAT
    )
    data, path = whole.read_bytes(), tmp_path / "b.tar"
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for cut in (0, 100, 512, 600, 1536, 5000, end - 1, end):
        path.write_bytes(data[:cut])
        with pytest.raises(
            SourceError, match=r"b\.tar is damaged, cut short or no tar \(.+\); fetch or write it again"
        ) as error:
            opened(path)
        assert "\n" not in str(error.value)
    chance = random.Random(0)
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(chance.choice((1, 8))):
            broken[chance.randrange(end // 512) * 512 + chance.choice((0, 100, 124, 148, 156, 257))] = chance.randrange(256)
        path.write_bytes(broken)
        try:
            opened(path)
        except SourceError as error:
            assert "\n" not in str(error)  # noqa: PT017  # either may happen


def _checked(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("kind", [b"0", b"x", b"L"])
@pytest.mark.parametrize("size", [-1024, 1 << 62])
def test_sizes_that_lead_back_or_beyond_are_refused_before_they_are_used(kind, size, tmp_path):
    header = bytearray(tarfile.TarInfo("1.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = bytes([255 if size < 0 else 128]) + size.to_bytes(11, "big", signed=True)
    header[156:157] = kind
    path = tmp_path / "a.tar"
    path.write_bytes(_checked(header) * 3 + bytes(1024))
    with pytest.raises(SourceError, match=r"a\.tar is damaged, cut short or no tar"):
        opened(path)


def test_headers_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_HEADER_BYTES", 4096)
    path = write(tmp_path / "a.tar", {"1" * 9000 + ".jpg": b"x"})
    with pytest.raises(SourceError, match=r"the headers of a member take more than 4,096 bytes"):
        opened(path)


def test_a_tar_that_changes_stops_the_run(tmp_path):
    path = write(tmp_path / "a.tar", {"1.jpg": b"x", "1.txt": b"y"})
    source = opened(path)
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(SourceError, match=r"cannot read .* any more: it changed while in use") as error:
        source[0]
    assert not isinstance(error.value, ExampleError)


def test_a_tar_without_samples_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"a\.tar holds no samples; expected members such as 0001\.jpg"):
        opened(write(tmp_path / "a.tar", {"README": b"x"}))
