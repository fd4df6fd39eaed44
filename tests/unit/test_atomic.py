"""Files that are there whole or not at all, and that touch nothing of anybody else's on their way."""

import errno
import json
import os
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from deepstack_jax.atomic import SCRATCH, whole_file, write_json, write_lines, write_whole
from deepstack_jax.cli import writable_folder
from deepstack_jax.printing import label, one_line, quote, redacted
from deepstack_jax.train.run.lock import LOCK, WorkdirError, lock_workdir

PACKAGE = Path(__file__).parents[2] / "deepstack_jax"


def test_the_file_is_replaced_and_nothing_else_is_there(tmp_path):
    theirs = ("predictions.tmp", ".predictions.jsonl.tmp", "predictions.jsonl.tmp", f"{SCRATCH}predictions.jsonl")
    for name in ("predictions.jsonl", *theirs):
        (tmp_path / name).write_text(f"old {name}")
    write_whole(tmp_path / "predictions.jsonl", "new ä\n")
    assert (tmp_path / "predictions.jsonl").read_bytes() == "new ä\n".encode()
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != "predictions.jsonl"} == {
        name: f"old {name}" for name in theirs
    }


HARD = '\ud800 \x00 \x1b[2J \x9b \u2028 \u0085 \r\n "\\ \u202e ä 中 \U0001f600'


def test_json_holds_any_text_and_is_read_back_as_it_was(tmp_path):
    values = [{"id": HARD, HARD: [HARD, 10**400, float("inf"), None]}, {"id": "ä"}]
    write_lines(tmp_path / "lines.jsonl", values)
    text = (tmp_path / "lines.jsonl").read_bytes().decode("utf-8")
    assert [json.loads(line) for line in text.splitlines()] == values, "also where a reader knows more ends of a line than one"
    assert "ä 中 \U0001f600" in text
    assert not set(text) & set("\x1b\x9b\u202e\0")
    write_json(tmp_path / "one.json", values)
    assert json.loads((tmp_path / "one.json").read_text("ascii")) == values


def test_a_link_in_the_way_of_the_scratch_file_is_not_followed(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    fixed = uuid.UUID(int=7)
    monkeypatch.setattr(uuid, "uuid4", lambda: fixed)
    (tmp_path / f"{SCRATCH}{fixed.hex}").symlink_to(precious)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "results.json", "{}")
    assert precious.read_text() == "mine"


def test_a_failure_leaves_the_old_file_and_names_it(tmp_path):
    file = tmp_path / "results.json"
    file.write_text("old")

    def stopped_by(error: BaseException) -> None:
        with whole_file(file) as out:
            out.write(b"half")
            raise error

    with pytest.raises(OSError, match="No space") as caught:
        stopped_by(OSError(errno.ENOSPC, "No space left on device"))
    assert caught.value.filename == str(file)
    with pytest.raises(KeyboardInterrupt):
        stopped_by(KeyboardInterrupt())
    assert (os.listdir(tmp_path), file.read_text()) == (["results.json"], "old")


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_half_a_surrogate_becomes_the_escape_of_json(tmp_path):
    write_whole(tmp_path / "a.jsonl", '{"id": "\ud83d"}\n')
    assert (tmp_path / "a.jsonl").read_text() == '{"id": "\\ud83d"}\n'


def test_a_workdir_is_tried_without_touching_what_lies_there(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (f".probe-{os.getpid()}", "probe"):
        (tmp_path / name).symlink_to(precious)
    there = sorted(os.listdir(tmp_path))
    assert writable_folder(str(tmp_path), "workdir") == tmp_path
    assert (precious.read_text(), sorted(os.listdir(tmp_path))) == ("mine", there)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / LOCK).symlink_to(precious)
    with (
        pytest.raises(WorkdirError, match=r"cannot lock .*/\.lock: Too many levels of symbolic links; delete it"),
        lock_workdir(tmp_path),
    ):
        pass
    assert precious.read_text() == "mine"


def test_there_is_one_way_to_replace_a_file():
    """Shards, which other libraries write, come by a rename of their own from a folder that nobody else has."""
    found = subprocess.run(
        ["grep", "-rlE", r"os\.(replace|rename)\(|NamedTemporaryFile|mkstemp", "--include=*.py", PACKAGE],
        check=True,
        capture_output=True,
        text=True,
    )
    names = {str(Path(line).relative_to(PACKAGE)) for line in found.stdout.splitlines()}
    assert names == {"atomic.py", "prepare/chunks.py"}


SIGNED = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20260101T0000Z&X-Amz-Signature=5ecre7"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://me:5ecre7@host:8080/a/b.json", "https://***@host:8080/a/b.json"),
        ("https://5ecre7@host/a", "https://***@host/a"),
        ("https://me:5e@cre7@host/a", "https://***@host/a"),
        ("s3://AKIA:5e/cre7+x@bucket/a.json", "s3://***@bucket/a.json"),
        ("simplecache::https://me:5ecre7@host/a", "simplecache::https://***@host/a"),
        (f"https://host/a.json?{SIGNED}", "https://host/a.json?X-Amz-Algorithm=***&X-Amz-Date=***&X-Amz-Signature=***"),
        ("https://host/a?X-Goog-Signature=5ecre7&split=b", "https://host/a?X-Goog-Signature=***&split=b"),
        (
            "https://acc.blob.core.windows.net/c/a?sv=2024&se=2027&sig=5ecre7%3D",
            "https://acc.blob.core.windows.net/c/a?sv=***&se=***&sig=***",
        ),
        ("https://me:5e'cre\"7@host/a", "https://***@host/a"),
        ("https://host/a?download=true&token=5ecre7", "https://host/a?download=true&token=***"),
        ("https://host/a?api_key=5ecre7;x=1", "https://host/a?api_key=***;x=1"),
        ("https://host/a#access_token=5ecre7", "https://host/a#access_token=***"),
        (
            "https://host/a?Expires=1&Signature=5ecre7&Key-Pair-Id=5ecre7",
            "https://host/a?Expires=***&Signature=***&Key-Pair-Id=***",
        ),
    ],
)
def test_a_url_loses_what_proves_who_asks(url, expected):
    assert redacted(url) == expected
    assert redacted({url: [f"{url} does not answer", 3], "b": (None, f"--config.data.root={url}")}) == {
        expected: [f"{expected} does not answer", 3],
        "b": (None, f"--config.data.root={expected}"),
    }
    assert redacted(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("gs://bucket/a@b/c.json", "https://host:8080/a@b/c?split=train", "abfs://container@account.dfs.core.windows.net/a"),
        *("/data/me:pw@host/a?token=b", "me@host: a?key=b", "s3://bucket/versions?versionId=3", "memory://a/b"),
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert redacted(text) == text


@pytest.mark.parametrize("text", ["a" * 10**6 + " ://", "https://host/?" + "sig" * 10**6, "https://host/" + "?sig" * 10**6])
def test_a_stranger_cannot_make_it_work_for_hours(text):
    """With a search that begins again at every character, each of these would take longer than any test may."""
    assert redacted(text) == text
    assert len(label(text)) <= 150


def test_what_is_cut_short_shows_no_end_of_a_secret():
    url = f"https://me:5ecre7@host/{'a' * 500}?X-Amz-Signature={'5ecre7' * 60}"
    for text in (label(url), quote(url), one_line(f"cannot read {url}: no answer"), quote({"url": url})):
        assert "5ecre7" not in text, text


def test_a_verb_says_no_secret_in_whatever_way_it_fails():
    url = "https://me:5ecre7@host/a?token=5ecre7"
    for body in (
        f"raise cli.ConfigError('no file at {url}')",
        f"raise RuntimeError('a defect at {url}')",
        f"warnings.warn('{url}')",
    ):
        lines = (
            "import warnings; from deepstack_jax import cli; import sys; sys.argv = ['verb']",
            "def main():",
            f"    {body}",
        )
        done = subprocess.run(
            [sys.executable, "-c", "\n".join((*lines, "    return 0", "cli.run(main, '')"))],
            check=False,
            capture_output=True,
            text=True,
        )
        assert "https://***@host/a?token=***" in done.stderr
        assert "5ecre7" not in done.stderr + done.stdout
