"""What an export may take the place of: a new or empty folder, or an earlier export; never anything else, whatever is asked."""

import os
from pathlib import Path

import pytest

import deepstack_jax as dsx
from deepstack_jax.api import LMM
from deepstack_jax.errors import ConfigError, WeightsError
from deepstack_jax.weights.export_folder import MARK, whole_export
from deepstack_jax.weights.load import load_params, stored_leaves
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from deepstack_jax.weights.save import save_checkpoint
from deepstack_jax.weights.stored_tensor import BEYOND_FILE
from tests.parity.goldens import GOLDEN, write_folder


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def export(folder: Path, content: str, *sources: Path) -> None:
    with whole_export(folder, sources, force=True) as scratch:
        (scratch / "config.json").write_text(content)
        (scratch / "clip").mkdir()
        (scratch / "clip" / "model.safetensors").write_text(content)
        (scratch / "model-00001-of-00002.safetensors").write_text(content)


@pytest.fixture
def old(tmp_path):
    export(tmp_path / "parent" / "old", "old")
    return tmp_path / "parent" / "old"


def refused(folder: Path, message: str, *sources: Path, watched: Path | None = None) -> None:
    before = tree(watched or folder)
    with pytest.raises(WeightsError, match=message) as caught:
        export(folder, "new", *sources)
    assert "\n" not in str(caught.value)
    assert tree(watched or folder) == before


def test_an_export_takes_the_place_of_an_earlier_one_and_of_nothing(old, tmp_path):
    export(old, "new")
    assert tree(old)["config.json"] == b"new"
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", "new")
    assert tree(tmp_path / "empty") == tree(old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "parent"]
    (tmp_path / "made").mkdir()
    assert old.stat().st_mode == (tmp_path / "made").stat().st_mode, "readable by whom the user's folders are"


@pytest.mark.parametrize(
    "added", ["notes.txt", "clip/notes.txt", ".git/HEAD", "clip2/model.safetensors", "model.fp16.safetensors", "empty/"]
)
def test_a_folder_with_a_file_that_no_export_writes_stays(old, added):
    (old / added).parent.mkdir(exist_ok=True)
    (old / added).mkdir() if added.endswith("/") else (old / added).write_text("mine")
    refused(old, f"holds {added.split('/')[0] if added[0] != 'c' or '2' in added else added}.*, which no export writes")


def test_a_folder_that_only_looks_like_an_export_stays(old):
    (old / MARK).unlink()
    refused(old, "is not an export of deepstack_jax")


def test_an_export_of_an_earlier_version_is_known_by_the_file_that_only_we_write(old):
    os.rename(old / MARK, old / BEYOND_FILE)
    export(old, "new")
    assert tree(old)["config.json"] == b"new"
    assert (old / MARK).is_file()
    os.rename(old / MARK, old / BEYOND_FILE)
    (old / "README.md").write_text("mine")
    refused(old, r"holds README\.md, which no export writes")


def test_a_path_through_the_folder_that_is_replaced_leads_there(old, tmp_path):
    export(old / ".." / "old", "new")
    assert tree(old)["config.json"] == b"new"
    assert [path.name for path in old.parent.iterdir()] == ["old"]


def test_links_stay_and_are_not_followed(old, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("mine")
    (tmp_path / "link").symlink_to(old)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link", "is a link", watched=tmp_path)
    refused(tmp_path / "dangling", "is a link", watched=tmp_path)
    (old / "tokenizer.json").symlink_to(tmp_path / "mine" / "config.json")
    refused(old, "holds tokenizer.json, which no export writes", watched=tmp_path)
    (old / "tokenizer.json").unlink()
    os.rename(old / "clip", tmp_path / "clip")
    (old / "clip").symlink_to(tmp_path / "mine")
    refused(old, "holds clip, which no export writes", watched=tmp_path)


def test_what_the_export_is_made_from_stays(old, tmp_path):
    (tmp_path / "source").mkdir()
    for source in (old, old / "clip", old / "config.json", old.parent, tmp_path / "through" / "old"):
        if not source.exists():
            (tmp_path / "through").symlink_to(old.parent)
        refused(old, "overlaps with .*, which the export is made from", source)
    export(old, "new", tmp_path / "source", tmp_path / "gone")


def test_home_the_working_directory_and_all_above_them_stay(old, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(old))
    refused(old, "is or holds your home")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    for where in (old, old / "clip", tmp_path / "empty"):
        monkeypatch.chdir(where)
        refused(where, "is or holds the working directory|is not an export")
        refused(old, "is or holds the working directory") if where != tmp_path / "empty" else None
    monkeypatch.chdir("/")
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == old)
    refused(old, "is a mount point")


def test_a_failure_in_the_middle_leaves_what_was_there(old, tmp_path, monkeypatch):
    before = tree(tmp_path)

    def fail():
        with whole_export(old, [], force=True) as scratch:
            (scratch / "config.json").write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert tree(tmp_path) == before
    renames = []

    def rename(self, target):
        renames.append(self)
        if len(renames) == 2:
            raise OSError(5, "Input/output error")
        os.rename(self, target)
        return target

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        export(old, "new")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("force", "message"), [(True, r"holds late\.txt"), (False, "not empty")])
def test_a_file_that_came_in_the_meantime_stays(old, force, message, tmp_path):
    folder = old if force else tmp_path / "new"

    def meanwhile():
        with whole_export(folder, [], force=force):
            folder.mkdir(exist_ok=True)
            (folder / "late.txt").write_text("mine")

    with pytest.raises((WeightsError, OSError), match=message):
        meanwhile()
    assert (folder / "late.txt").read_text() == "mine"
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_save_hf_replaces_an_export_and_neither_its_own_tokenizer_nor_anything_else(tmp_path):
    found = open_checkpoint(write_folder("l_2d", tmp_path))
    lmm = LMM(
        found.config,
        load_params(found.tensors, found.config),
        None,
        "v1",
        tokenizer_folder=str(GOLDEN / "tokenizer" / "llama_legacy_true"),
    )
    lmm.save_hf(tmp_path / "out")
    dsx.save_hf(lmm, tmp_path / "out", force=True, dtype="bfloat16")
    assert (tmp_path / "out" / MARK).is_file()
    with pytest.raises(WeightsError, match=r"is not empty; choose another folder, or replace it with force=True$"):
        lmm.save_hf(tmp_path / "out")
    with pytest.raises(WeightsError, match="is not an export of deepstack_jax"):
        lmm.save_hf(tmp_path / "hf", force=True)
    save_checkpoint(
        stored_leaves(found.tensors, found.config), found.config, tmp_path / "hf" / "inside", sources=[tmp_path / "hf"]
    )
    for wrong in (("out", lmm), (lmm, None), (found, "out")):
        with pytest.raises(ConfigError, match=r"save_hf got .*expected a model and a folder"):
            dsx.save_hf(*wrong)  # type: ignore[arg-type]
