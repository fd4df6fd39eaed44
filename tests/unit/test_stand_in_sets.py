"""Synthetic files stand where a mixture looks for the published ones, and can be read as them."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.stand_in_sets import TEXT, write_file, write_sets
from deepstack_jax.config import SetConfig
from deepstack_jax.data.open import open_files
from deepstack_jax.data.order.mixture import open_mixture

MIXTURES = Path(__file__).parents[2] / "configs" / "mixtures"
TABLES = [("llava_558k", "SETS"), ("llava_665k", "SETS"), ("deepstack_748k", "SETS"), ("deepstack_748k", "PUBLISHED")]


@pytest.mark.parametrize(("name", "table"), TABLES)
@pytest.mark.filterwarnings("error")
def test_a_mixture_opens_over_them_with_every_set_and_every_image_there(name, table, tmp_path):
    sets = {k: replace(v, rows=0, paper=0) for k, v in runpy.run_path(str(MIXTURES / f"{name}.py"))[table].items()}
    write_sets(tmp_path, sets, rows=26)
    mixture = open_mixture(sets, str(tmp_path), open_files, cache=str(tmp_path / "cache"))
    assert {part.name for part in mixture.parts} == set(sets)
    assert all(len(part.rows) == max(len(part.config.keep_images), 26 // len(sets)) for part in mixture.parts)
    assert not mixture.missing_images(1000)
    for part in mixture.parts:
        example = part.source[int(part.rows[0])]
        assert len(example.messages) == 2
        assert len(example.images) == (TEXT not in part.config.keep_images)
        for image in example.images:
            with Image.open(image) as opened:
                assert opened.format == "JPEG"


def test_a_set_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"set a: b\.parquet is not a \.json file"):
        write_sets(tmp_path, {"a": SetConfig(file="b.parquet")}, rows=2)


def test_one_file_for_holding_out(tmp_path):
    write_file(tmp_path / "held_out.json", tmp_path / "images", rows=5)
    source = open_files(str(tmp_path / "held_out.json"), str(tmp_path / "images"))
    assert len(source) == 5
    answers = {source[index].messages[1].text for index in range(5)}
    assert len(answers) > 1
    shapes = {Image.open(str(source[index].images[0])).size for index in range(5)}
    assert len(shapes) > 1
