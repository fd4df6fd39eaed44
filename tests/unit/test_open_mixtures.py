"""FineVision, LLaVA-OneVision and the Cauldron: rows in their own columns, their tables of sets, and ratings as filters."""

import io
import os
import runpy
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepstack_jax.config import SetConfig, build_config, default_config
from deepstack_jax.data.example import RATINGS, Message, SourceError
from deepstack_jax.data.open import open_files
from deepstack_jax.data.order.mixture import Mixture, describe_mixture, open_mixture, unexpected_count
from deepstack_jax.printing import Console

MIXTURES = Path(__file__).parents[2] / "configs" / "mixtures"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN = pa.struct([("user", pa.string()), ("assistant", pa.string())])
RATED = [(f"{name}_{end}", kind) for name in RATINGS for end, kind in (("ratings", pa.list_(pa.int64())), ("min", pa.int64()))]
FINEVISION = pa.schema([("images", pa.list_(IMAGE)), ("texts", pa.list_(TURN)), ("source", pa.string()), *RATED])
CAULDRON = pa.schema([("images", pa.list_(IMAGE)), ("texts", pa.list_(pa.struct([*TURN, ("source", pa.string())])))])
ONEVISION = pa.schema(
    [
        ("id", pa.string()),
        ("image", IMAGE),
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        ("data_source", pa.string()),
    ]
)


def picture(shade: int) -> dict:
    """An image as `datasets` stores it."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 0, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def finevision(number: int, source: str = "chartqa", worst: int | None = 5, images: int = 1) -> dict:
    """A row with two turns, of which the second has the rating `worst` in everything."""
    turns = [{"user": f"What is {number}{turn}?", "assistant": f"It is {number}{turn}."} for turn in "ab"]
    ratings = {key: worst if key.endswith("_min") else worst and [5, worst] for key, _ in RATED}
    return {"images": [picture(number)] * images, "texts": turns, "source": source} | ratings


def write(root: Path, entry: SetConfig, rows: list[dict], schema: pa.Schema, hashed: str = "") -> None:
    (root / entry.file).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), root / entry.file / f"train-00000-of-00001{hashed}.parquet")


def sets(name: str) -> dict[str, SetConfig]:
    return runpy.run_path(str(MIXTURES / f"{name}.py"))["SETS"]


def opened(taken: dict[str, SetConfig], root: Path) -> Mixture:
    return open_mixture(taken, str(root), open_files, str(root / "cache"))


def shown(mixture: Mixture) -> list[list[str]]:
    """The table's cells, row by row."""
    with open(os.devnull, "w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        console.print(describe_mixture(mixture))
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line]


@pytest.mark.parametrize(("name", "count"), [("finevision", 185), ("llava_onevision", 83), ("cauldron", 50)])
def test_a_table_has_every_published_set_once_under_a_name_for_the_command_line(name, count):
    table = sets(name)
    assert len(table) == len({entry.file for entry in table.values()}) == count
    assert all(key.replace("_", "a").isalnum() for key in table)
    assert all(entry.file.split("/")[1] in entry.file_from for entry in table.values())
    config = default_config()
    config.update({"data": {"sets": {key: vars(entry) for key, entry in table.items()}}})
    assert build_config(config).data.sets == table


@pytest.mark.filterwarnings("error")
def test_finevision_is_read_and_its_ratings_choose_rows(tmp_path):
    table = {name: replace(sets("finevision")[name], rows=4) for name in ("chartqa", "geo170k_align", "text_mathqa")}
    table["chartqa"] = replace(table["chartqa"], min_relevance=3, min_formatting=2)
    write(tmp_path, table["chartqa"], [finevision(number, worst=number) for number in (1, 2, 3, 4)], FINEVISION)
    write(tmp_path, table["geo170k_align"], [finevision(number, "geo", images=2) for number in range(4)], FINEVISION)
    write(tmp_path, table["text_mathqa"], [finevision(number, "text", None, 0) for number in range(4)], FINEVISION)
    mixture = opened(table, tmp_path)
    assert mixture.sizes == (2, 4, 4)
    first, pair, text = mixture[0], mixture[2], mixture[6]
    assert first.messages[0] == Message("human", "<image>\nWhat is 3a?")
    assert first.messages[3] == Message("gpt", "It is 3b.")
    assert first.images == (picture(3)["bytes"],)
    assert first.info["source"] == "chartqa"
    assert first.info["relevance_ratings"] == [5, 3]
    assert pair.messages[0].text.startswith("<image>\n<image>\nWhat")
    assert (text.images, text.messages[0].text) == ((), "What is 0a?")
    assert mixture.parts[0].low == 2
    assert not any(map(unexpected_count, mixture.parts)), "rows that are rated low are there all the same"
    assert shown(mixture)[0] == ["chartqa", "FineVision/chartqa", "2", "2", "4", "1", "2", "ok"]
    assert opened(table, tmp_path).parts[0].low == 2, "the same out of the cache"


def test_rows_without_a_rating_are_kept_and_said(tmp_path):
    table = {"chartqa": replace(sets("finevision")["chartqa"], rows=3, min_image_correspondence=4)}
    write(tmp_path, table["chartqa"], [finevision(0), finevision(1, worst=None), finevision(2, worst=1)], FINEVISION)
    with pytest.warns(UserWarning, match="set chartqa: 1 records of chartqa lack a rating that it asks for, and are kept"):
        mixture = opened(table, tmp_path)
    assert [mixture[row].messages[1].text for row in range(2)] == ["It is 0a.", "It is 1a."]


def test_ratings_that_no_row_has_stop_the_run(tmp_path):
    table = {"chartqa": replace(sets("finevision")["chartqa"], rows=3, min_visual_dependency=5)}
    write(tmp_path, table["chartqa"], [finevision(number, worst=4) for number in range(3)], FINEVISION)
    with pytest.raises(SourceError, match=r"takes none of the 3 records .* ask for lower ratings: 3 records have lower ones"):
        opened(table, tmp_path)


def test_the_source_column_is_a_filter_as_data_source_is(tmp_path):
    entry = SetConfig(file="FineVision/sharegpt4v(coco)", keep_sources=("a",))
    write(tmp_path, entry, [finevision(0, "a"), finevision(1, "b"), finevision(2, "a")], FINEVISION)
    with pytest.warns(UserWarning, match="1 records belong to none of the sets one, by image folder or data_source: 'b' 1"):
        mixture = opened({"one": entry}, tmp_path)
    assert [mixture[row].messages[1].text for row in range(2)] == ["It is 0a.", "It is 2a."]


@pytest.mark.filterwarnings("error")
def test_the_cauldron_and_onevision_are_read_beside_each_other(tmp_path):
    table = {"ai2d": replace(sets("cauldron")["ai2d"], rows=3)}
    table["ai2d_ov"] = replace(sets("llava_onevision")["ai2d_cauldron_llava_format"], rows=3)
    turns = [{"user": "Which?", "assistant": "A", "source": "AI2D"}]
    write(tmp_path, table["ai2d"], [{"images": [picture(n)], "texts": turns} for n in range(3)], CAULDRON, "-37bee7c547e3fc8a")
    said = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": f"{n}", "image": picture(n), "conversations": said, "data_source": "ai2d(cauldron)"} for n in range(2)]
    rows.append({"id": "text", "image": None, "conversations": [{**said[0], "value": "Which?"}, said[1]], "data_source": "x"})
    write(tmp_path, table["ai2d_ov"], rows, ONEVISION)
    mixture = opened(table, tmp_path)
    assert mixture.sizes == (3, 3)
    assert mixture[0].messages == mixture[3].messages == (Message("human", "<image>\nWhich?"), Message("gpt", "A"))
    assert mixture[1].images == mixture[4].images == (picture(1)["bytes"],)
    assert (mixture[5].name, mixture[5].images) == ("text", ())


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_turns_say_where_a_row_is_from_where_the_row_does_not(form, tmp_path):
    """The Cauldron's; its other columns are not read for it."""
    entry = SetConfig(file=f"ai2d.{form}", keep_sources=("AI2D",))
    turns = [[{"user": "Which?", "assistant": f"{n}", "source": name}] for n, name in enumerate(("AI2D", "TQA", "AI2D", None))]
    rows = [{"images": [picture(n)], "texts": [*turn, {**turn[0], "source": "later"}]} for n, turn in enumerate(turns)]
    table = pa.Table.from_pylist(rows, schema=CAULDRON)
    if form == "parquet":
        pq.write_table(table, tmp_path / entry.file, row_group_size=2)
    else:
        with pa.OSFile(str(tmp_path / entry.file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.warns(UserWarning, match="2 records belong to none of the sets one, .*'TQA' 1"):
        mixture = opened({"one": entry}, tmp_path)
    assert [mixture[row].messages[1].text for row in range(2)] == ["0", "2"]
