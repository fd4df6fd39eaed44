"""What is said of data files before they are read: options, versions, missing images."""

import json
import os
from pathlib import Path

import pytest

from deepstack_jax.config import build_config, default_config
from deepstack_jax.data.fingerprint import describe_files, describe_options, named_images
from deepstack_jax.data.open import open_source


def files_config(root: Path, **changes):
    config = default_config()
    config.data.root, config.data.tokenizer = str(root), "bytes"
    for key, value in changes.items():
        config.data[key] = value
    return build_config(config)


def row(name: str, image: str) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    return {"id": name, "image": image, "conversations": turns}


def test_images_and_files_of_one_file_and_of_a_mixture(tmp_path):
    for folder, there in (("a", (1, 2)), ("b", (1,))):
        (tmp_path / folder).mkdir()
        for number in there:
            (tmp_path / folder / f"{number}.jpg").touch()
        rows = [row(f"{folder}{number}", f"{number}.jpg") for number in (1, 2, 2, 3)]
        (tmp_path / f"{folder}.json").write_text(json.dumps(rows))
    single = files_config(tmp_path, train="b.json", images="b")
    source = open_source(single.data, "train")
    assert named_images(source) == (4, [str(tmp_path / "b" / name) for name in ("2.jpg", "3.jpg")])
    assert describe_options(single.data, "train", source, 7) == {
        "split": "train",
        "rows": 4,
        "shard_rows": 7,
        "config.data.train": "b.json",
        "config.data.images": "b",
    }
    before = describe_files(single.data, "train", source)
    assert before.keys() == {"b.json"}
    assert before["b.json"].startswith(f"1 file, {(tmp_path / 'b.json').stat().st_size} bytes, changed 20")
    os.utime(tmp_path / "b.json", (0, 0))
    assert describe_files(single.data, "train", source) != before

    sets = {
        "first": {"file": "a.json", "images": "a", "keep_images": ["1"]},
        "second": {"file": "a.json", "images": "a", "keep_images": ["2"]},
        "other": {"file": "b.json", "images": "b", "drop_images": ["2"]},
    }
    mixed = files_config(tmp_path, sets=sets)
    with pytest.warns(UserWarning, match="1 records belong to none of the sets first, second"):
        mixture = open_source(mixed.data, "train")
    assert len(mixture) == 5
    assert named_images(mixture) == (5, [str(tmp_path / "b" / "3.jpg")]), "rows that no set takes are not looked for"
    assert describe_files(mixed.data, "train", mixture).keys() == {"a.json", "b.json"}
    options = describe_options(mixed.data, "train", mixture, 7)
    assert options["config.data.sets.first"]["keep_images"] == ("1",)
    assert str(tmp_path) not in json.dumps(options)
