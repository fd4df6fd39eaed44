"""A run goes on with the data that it was begun with: what was edited, swapped or reordered since is named."""

import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
from PIL import Image

from deepstack_jax.config import Config, build_config, default_config, to_dict
from deepstack_jax.data import fingerprint as inputs
from deepstack_jax.data.example import SourceError
from deepstack_jax.data.fingerprint import describe_data, describe_texts
from deepstack_jax.data.open import open_source
from deepstack_jax.printing import redacted
from deepstack_jax.train.checkpoint.reading import CheckpointError
from deepstack_jax.train.run.resume import check_same_data, check_same_run, data_changes

ROWS = 40


def configured(root, **changes):
    config = default_config()
    config.data.root, config.data.tokenizer, config.data.train, config.data.images = str(root), "bytes", "train.json", "images"
    config.data.validation = "held_out.json"
    for key, value in changes.items():
        config.data[key] = value
    return build_config(config)


def picture(root, number, shade):
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(root / "images" / f"{number}.png")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(ROWS):
        picture(folder, number, 5 * number)
        turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": f"Answer {number:02}."}]
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "held_out.json").write_text(json.dumps(rows[:2]))
    return folder


def described(config: Config):
    return describe_data(config.data_spec, {split: open_source(config.data, split) for split in ("train", "validation")})


@pytest.fixture
def workdir(root, tmp_path):
    """Of a run on that data which has a checkpoint."""
    folder, config = tmp_path / "run", configured(root)
    (folder / "checkpoints" / "5").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "manifest.json").write_text(json.dumps({"data": described(config)}))
    return folder


def changes(config: Config, workdir):
    texts = partial(describe_texts, config.data_spec, open_source(config.data, "train"))
    return data_changes(config, workdir, described(config), texts)


def edit(file, change):
    """Rewrite the rows of a file, which keeps its time of change."""
    before = file.stat()
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def another_answer(rows):
    rows[17]["conversations"][1]["value"] = "Answer 71."
    return rows


def test_the_same_data_touched_or_moved_is_the_same(root, workdir, tmp_path):
    assert changes(configured(root), workdir) == []
    os.utime(root / "train.json", (0, 0))
    assert changes(configured(root), workdir) == []
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    shutil.rmtree(root)
    assert changes(configured(moved), workdir) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda root: edit(root / "train.json", lambda rows: rows[::-1]), ["train data train.json", "row 0"]),
        (lambda root: edit(root / "train.json", another_answer), ["1 of 40 rows looked at became other tokens", "row 17"]),
        (lambda root: edit(root / "train.json", lambda rows: rows + rows[:1]), ["40 rows there, 41 now"]),
        (lambda root: edit(root / "held_out.json", lambda rows: rows[::-1]), ["validation data held_out.json: 1 file, "]),
        (lambda root: picture(root, 23, 1), ["1 of 40 rows looked at have other images, the first is row 23"]),
        (lambda root: (root / "images" / "3.png").replace(root / "images" / "4.png"), ["have other images", "row 4"]),
    ],
)
def test_what_was_changed_is_named(change, named, root, workdir):
    change(root)
    (line,) = {"; ".join(changes(configured(root), workdir))}
    for part in named:
        assert part in line


def test_a_difference_is_one_line_with_the_ways_to_go_on(root, workdir):
    picture(root, 23, 1)
    config = configured(root)
    arguments = (workdir, described(config), lambda: "")
    with pytest.raises(CheckpointError) as caught:
        check_same_data(config, *arguments)
    assert "\n" not in str(caught.value)
    for part in ("first is row 23", "put back", "new --workdir", "--config.train.changed_data=accept"):
        assert part in str(caught.value)
    accepting = default_config()
    accepting.update(to_dict(config))
    accepting.train.changed_data = "accept"
    accepting = build_config(accepting)
    assert check_same_run(accepting, workdir) == ["train.changed_data: 'refuse' there, 'accept' now"]
    assert check_same_data(accepting, *arguments) == ["1 of 40 rows looked at have other images, the first is row 23"]


def test_no_flag_is_offered_that_could_not_help(root, workdir):
    edit(root / "train.json", lambda rows: rows[:-1])
    config = configured(root)
    with pytest.raises(CheckpointError, match=r"40 rows there, 39 now.*choose a new --workdir$"):
        check_same_data(config, workdir, described(config), lambda: "")


def test_data_at_another_place_must_be_the_same(root, workdir, tmp_path):
    other = shutil.copytree(root, tmp_path / "other")
    edit(other / "train.json", another_answer)
    with pytest.raises(CheckpointError, match=r"other examples, .*became other tokens.*data\.root: '.*' there, '.*other' now"):
        check_same_data(configured(other), workdir, described(configured(other)), lambda: "")
    (line,) = changes(configured(root, tokenizer="words:a b"), workdir)[:1]
    assert "40 of 40 rows looked at became other tokens" in line


def test_nothing_is_compared_before_anything_was_learned(root, workdir):
    edit(root / "train.json", lambda rows: rows[::-1])
    (workdir / "checkpoints" / "5").rmdir()
    assert changes(configured(root), workdir) == []


def test_rows_that_could_not_be_used_may_be_mended(root, workdir, tmp_path):
    (root / "images" / "7.png").rename(tmp_path / "7.png")
    (workdir / "manifest.json").write_text(json.dumps({"data": described(configured(root))}))
    assert changes(configured(root), workdir) == []
    (tmp_path / "7.png").rename(root / "images" / "7.png")
    assert changes(configured(root), workdir) == []


def test_a_run_of_an_earlier_version_goes_on(root, workdir, tmp_path):
    """Its manifest knows files and the tokens of some rows, its configuration has not all keys of today."""
    config = configured(root)
    stored = to_dict(config)
    del stored["train"]["changed_data"], stored["train"]["keep_best"]
    (workdir / "config.json").write_text(json.dumps(stored))
    texts = describe_texts(config.data_spec, open_source(config.data, "train"))
    known = {"files": described(config)["files"], "sha256": "", "texts": texts}
    (workdir / "manifest.json").write_text(json.dumps({"data": known}))
    assert check_same_run(config, workdir) == []
    assert changes(config, workdir) == []
    moved = configured(shutil.copytree(root, tmp_path / "elsewhere"))
    assert changes(moved, workdir) == []
    edit(tmp_path / "elsewhere" / "train.json", another_answer)
    assert changes(moved, workdir)[0] == "rows looked at became other tokens"
    edit(root / "train.json", lambda rows: rows[::-1])
    assert changes(config, workdir) == ["rows looked at became other tokens"], "as many bytes as before"
    edit(root / "train.json", lambda rows: [rows[-1] | {"id": "longer"}, *rows[-2::-1]])
    assert "train data train.json: 1 file, " in changes(config, workdir)[0]
    (workdir / "manifest.json").unlink()
    assert changes(config, workdir) == [], "nothing is known"


def test_without_a_manifest_the_newest_checkpoint_tells_what_the_data_was(root, workdir):
    (workdir / "checkpoints" / "5" / "about").mkdir()
    (workdir / "manifest.json").rename(workdir / "checkpoints" / "5" / "about" / "metadata")
    assert changes(configured(root), workdir) == []
    picture(root, 23, 1)
    assert "first is row 23" in changes(configured(root), workdir)[0]


def test_of_large_files_parts_and_the_time_of_change_are_compared(root, workdir, monkeypatch):
    monkeypatch.setattr(inputs, "READ_WHOLE", 100)
    config = configured(root)
    (workdir / "manifest.json").write_text(json.dumps({"data": described(config)}))
    assert changes(config, workdir) == []
    assert described(config)["contents"]["train"]["train.json"].startswith("parts:")
    os.utime(root / "train.json", (0, 0))
    assert "changed 1970-01-01" in changes(config, workdir)[0]


def test_sampled_rows_are_spread_over_a_large_source(root):
    rows = json.loads((root / "train.json").read_text())
    (root / "train.json").write_text(json.dumps((rows * 60)[:2345]))
    looked_at = [int(word.split(":")[0]) for word in described(configured(root))["looked_at"].split()]
    assert (looked_at[0], looked_at[-1]) == (0, 2344)
    assert inputs.COMPARED <= len(looked_at) <= inputs.COMPARED + inputs.LOOKED_AT
    assert max(np.diff(looked_at)) <= 3


def test_a_run_goes_on_with_urls_whose_credentials_were_not_written(tmp_path):
    def behind(signature):
        config = default_config()
        config.data.root, config.data.validation = (
            f"https://me:{signature}@host/data",
            f"https://host/b.json?X-Amz-Signature={signature}",
        )
        return build_config(config)

    stored = redacted(to_dict(behind("5ecre7")))
    assert "5ecre7" not in str(stored)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    for signature in ("5ecre7", "another"):
        assert check_same_run(behind(signature), tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps(to_dict(behind("before"))))
    assert check_same_run(behind("5ecre7"), tmp_path) == []
    other = to_dict(behind("5ecre7"))
    other["data"]["validation"] = other["data"]["validation"].replace("b.json", "c.json")
    with pytest.raises(CheckpointError) as caught:
        check_same_run(build_config(other), tmp_path)
    assert "5ecre7" not in str(caught.value)
    with pytest.raises(SourceError, match=r"https://\*\*\*@host/b\?sig=\*\*\*$"):
        raise SourceError("no answer from https://me:5ecre7@host/b?sig=5ecre7")


@pytest.mark.parametrize(
    "data", ["[]", '{"looked_at": 3}', '{"files": [], "contents": 3}', '{"rows": []}', '{"contents": {"train": 3}}', "{"]
)
def test_a_damaged_manifest_is_one_line_that_says_how_to_go_on(data, root, workdir):
    (workdir / "manifest.json").write_text(f'{{"data": {data}}}')
    with pytest.raises(
        CheckpointError, match=r"manifest\.json is damaged .*delete the file and run the same command"
    ) as caught:
        changes(configured(root), workdir)
    assert "\n" not in str(caught.value)
