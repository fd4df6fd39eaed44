"""Mixtures: which rows a set takes, what is said when they are not those expected, and the order that an epoch goes through."""

import json
import os
import pickle
import runpy
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepstack_jax.config import SetConfig, build_config, default_config
from deepstack_jax.data.example import ExampleError, MetadataSource, SourceError
from deepstack_jax.data.open import open_files
from deepstack_jax.data.order import filters as selection
from deepstack_jax.data.order.mixture import EpochOrder, Mixture, describe_mixture, epoch_order, open_mixture, unexpected_count
from deepstack_jax.errors import ConfigError
from deepstack_jax.printing import Console

REPOSITORY = Path(__file__).parents[2]
MIXTURES = REPOSITORY / "configs" / "mixtures"


# The order of an epoch.


@st.composite
def orders(draw) -> EpochOrder:
    sets = draw(st.lists(st.tuples(st.integers(2, 30), st.floats(0.5, 3.2)), min_size=1, max_size=4))
    sizes, repeats = zip(*sets, strict=True)
    return EpochOrder(sizes, repeats, draw(st.integers(0, 2**32)), draw(st.booleans()))


@settings(max_examples=20, deadline=None)
@given(orders(), st.integers(0, 5))
def test_epochs_rotate_through_every_set(order, first):
    """After any number of epochs, no row of a set was seen more than once more often than another of it."""
    seen = [np.zeros(size, int) for size in order.sizes]
    starts = np.cumsum((0, *order.sizes))
    for epoch in range(first, first + 3):
        rows = order(epoch, np.arange(len(order)))
        for number, size in enumerate(order.sizes):
            mine = rows[(rows >= starts[number]) & (rows < starts[number + 1])] - starts[number]
            here = np.bincount(mine, minlength=size)
            assert len(mine) == order.counts[number] == round(size * order.repeats[number])
            assert here.max() - here.min() <= 1
            seen[number] += here
            assert np.ptp(seen[number]) <= 1


@settings(max_examples=6, deadline=None)
@given(orders(), st.integers(0, 3), st.integers(1, 8))
def test_the_order_is_a_function_of_the_place_alone(order, epoch, hosts):
    """However places are asked for: one by one, in blocks, or by several hosts that each take their share."""
    whole = order(epoch, np.arange(len(order)))
    assert [int(order(epoch, place)) for place in range(len(order))] == whole.tolist()
    shared = np.empty_like(whole)
    for host in range(hosts):
        shared[host::hosts] = pickle.loads(pickle.dumps(order))(epoch, np.arange(host, len(order), hosts))
    np.testing.assert_array_equal(shared, whole)
    pairs = np.arange(len(order) // 2 * 2).reshape(-1, 2)
    np.testing.assert_array_equal(order(epoch, pairs), whole[: pairs.size].reshape(pairs.shape))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32), st.integers(0, 4))
def test_one_plain_source_is_permuted(size, seed, epoch):
    rows = EpochOrder((size,), (1.0,), seed)(epoch, np.arange(size))
    assert sorted(rows.tolist()) == list(range(size))


def test_half_a_set_per_epoch_is_the_other_half_next_time():
    order = EpochOrder((100, 40), (0.5, 1.0), seed=3)
    first, second = (set(order(epoch, np.arange(len(order))).tolist()) for epoch in (0, 1))
    assert len(order) == 90
    assert len(first & set(range(100))) == 50
    assert {row for row in first | second if row < 100} == set(range(100))
    assert not first & second & set(range(100))
    assert first & set(range(100)) != set(range(50)), "half of the rows, not one half of the file"
    assert {row for row in first if row >= 100} == set(range(100, 140))


def test_seeds_and_epochs_have_orders_of_their_own():
    places = np.arange(200)
    orders = [EpochOrder((200,), (1.0,), seed)(epoch, places) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(rows) for rows in orders}) == 9


def test_rows_that_were_neighbours_are_strangers_after_the_shuffle():
    """Chi-square of the distances between neighbours in 100 classes: 4 standard deviations, which is what chance may do."""
    size = 50_000
    rows = EpochOrder((size,), (1.0,), seed=11)(0, np.arange(size))
    classes = np.bincount(np.diff(rows) % size * 100 // size, minlength=100)
    expected = classes.mean()
    assert ((classes - expected) ** 2 / expected).sum() < 99 + 4 * (2 * 99) ** 0.5
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 4 / size**0.5


def test_without_shuffle_rows_come_as_they_stand():
    order = EpochOrder((4, 3), (0.5, 2.0), seed=0, shuffle=False)
    assert order(0, np.arange(len(order))).tolist() == [0, 1, 4, 5, 6, 4, 5, 6]
    assert order(1, np.arange(len(order))).tolist() == [2, 3, 4, 5, 6, 4, 5, 6]


def test_no_permutation_is_stored():
    order = EpochOrder((2_000_000_000, 1_000_000_000), (1.0, 0.25), seed=0)
    rows = order(1, np.arange(0, len(order), 500_000_000))
    assert len(set(rows.tolist())) == 5
    assert len(pickle.dumps(order)) < 1000


def test_an_order_that_would_lose_a_set_is_refused():
    with pytest.raises(ValueError, match=r"set 1: 10 records with repeat 0\.01 give none per epoch; raise its repeat"):
        EpochOrder((5, 10), (1.0, 0.01), seed=0)
    with pytest.raises(ValueError, match="got 2 sizes and 1 repeats"):
        EpochOrder((5, 10), (1.0,), seed=0)
    with pytest.raises(IndexError, match=r"position 5 is outside 0\.\.4"):
        EpochOrder((5,), (1.0,), seed=0)(0, [0, 5])


# A small copy of the 665k: the folders of the published one, a few rows each.

ROWS = {
    "coco": ("coco/train2017/", 6),
    "gqa": ("gqa/images/", 5),
    "ocr": ("ocr_vqa/images/", 4),
    "caps": ("textvqa/train_images/", 3),
    "vga": ("vg/VG_100K/", 2),
    "vgb": ("vg/VG_100K_2/", 2),
    "text": ("", 4),
}


def row(name: str, folder: str = "", data_source: str = "") -> dict:
    turns = [{"from": "human", "value": ("<image>\n" if folder else "") + "What?"}, {"from": "gpt", "value": "This."}]
    named = {"image": f"{folder}{name}.jpg"} if folder else {}
    return {"id": name, "conversations": turns, **named, **({"data_source": data_source} if data_source else {})}


def write(file: Path, rows: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))


@pytest.fixture
def root(tmp_path):
    """A data root with the small 665k: the rows of its folders interleaved, every image there."""
    rows = [row(f"{name}{i}", folder) for i in range(6) for name, (folder, count) in ROWS.items() if i < count]
    write(tmp_path / "llava_v1_5_mix665k.json", rows)
    for folder, _ in ROWS.values():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for entry in rows:
        if "image" in entry:
            (tmp_path / entry["image"]).touch()
    return tmp_path


def table(name: str, sets: str = "SETS") -> dict[str, SetConfig]:
    return runpy.run_path(str(MIXTURES / f"{name}.py"))[sets]


def opened(sets: dict[str, SetConfig], root: Path | str) -> Mixture:
    """The mixture, of which nothing may be said to be wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return open_mixture(sets, str(root), open_files, cache=f"{root}/cache" if isinstance(root, Path) else "")


def unknown(sets: dict[str, SetConfig]) -> dict[str, SetConfig]:
    return {name: replace(entry, rows=0) for name, entry in sets.items()}


def names(mixture: Mixture) -> list[str]:
    return [mixture[index].name for index in range(len(mixture))]


def printed(mixture: Mixture) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(describe_mixture(mixture))
    return console.export_text()


def test_the_665k_falls_apart_by_image_folder(root):
    mixture = opened(unknown(table("llava_665k")), root)
    assert mixture.sizes == (6, 5, 4, 3, 4, 4)
    assert len(set(names(mixture))) == len(mixture) == 26
    example = mixture[8]
    assert (example.index, example.name, example.info["set"]) == (8, "gqa2", "gqa")
    assert example.images == (str(root / "gqa/images/gqa2.jpg"),)
    assert [mixture[index].info["set"] for index in (0, 14, 17, 21, 25)] == ["coco", "ocr_vqa", "textcaps", "vg", "sharegpt"]
    assert not mixture[25].images
    assert isinstance(mixture, MetadataSource)
    assert [outline.name for outline in mixture.metadata()] == names(mixture)
    copy = pickle.loads(pickle.dumps(mixture))
    assert names(copy) == names(mixture)
    assert len({id(part.source) for part in copy.parts}) == 1, "one file, opened once, sent once"
    with pytest.raises(IndexError, match=r"record 26 is outside 0\.\.25"):
        mixture[26]


def test_repeats_act_on_the_rows_that_a_set_takes(root):
    sets = unknown(table("llava_665k"))
    for name, repeat in {"gqa": 2.0, "ocr_vqa": 0.5, "coco": 1.5}.items():
        sets[name] = replace(sets[name], repeat=repeat)
    mixture = opened(sets, root)
    order = epoch_order(mixture, seed=5, shuffle=True)
    epochs = [Counter(names(mixture)[index] for index in order(epoch, np.arange(len(order)))) for epoch in (0, 1)]
    assert len(order) == 9 + 10 + 2 + 3 + 4 + 4
    assert [epochs[0][f"gqa{i}"] for i in range(5)] == [2] * 5
    assert sorted(epochs[0][f"coco{i}"] for i in range(6)) == [1, 1, 1, 2, 2, 2]
    assert [epochs[0][f"coco{i}"] + epochs[1][f"coco{i}"] for i in range(6)] == [3] * 6
    assert [epochs[0][f"ocr{i}"] + epochs[1][f"ocr{i}"] for i in range(4)] == [1] * 4
    single = opened({"all": SetConfig(file="llava_v1_5_mix665k.json")}, root)
    assert epoch_order(single, 5, True) == epoch_order(single.parts[0].source, 5, True)


def test_textcaps_leaves_the_748k_without_a_word(root):
    published = table("deepstack_748k")
    new = [name for name in published if name not in table("llava_665k")]
    assert len(new) == 7
    for name in new:
        write(root / published[name].file, [row(f"{name}{i}") for i in range(3)])
    mixture = opened(unknown(published), root)
    assert len(mixture) == 26 - 3 + 7 * 3
    assert not [name for name in names(mixture) if name.startswith("caps")]
    one = opened({"all": SetConfig(file="llava_v1_5_mix665k.json", drop_images=("textvqa/",))}, root)
    assert len(one) == 23, "text-only rows stay"


def test_the_published_748k_is_json_folders_and_the_text_of_the_665k(root):
    sets = table("deepstack_748k", "PUBLISHED")
    file = root / sets["coco"].file
    folders = [entry.keep_images[0] for entry in sets.values() if entry.images]
    write(file, [row(f"{folder[:-1]}{i}", folder, "llava_next_raw_format") for folder in folders for i in range(2)])
    for folder in folders:
        (file.parent / folder).mkdir()
    mixture = opened(unknown(sets), root)
    assert len(mixture) == 2 * 12 + 4
    assert mixture[0].images == (str(file.parent / "coco/coco0.jpg"),)
    assert mixture[len(mixture) - 1].info == {"set": "sharegpt"}


def test_rows_of_a_parquet_are_chosen_by_data_source(root):
    rows = [row(f"{source}{i}", data_source=source) for source in ("chartqa", "dvqa", "demo") for i in range(3)]
    (root / "next" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "next" / "data" / "train-00000-of-00001.parquet")
    sets = {"charts": SetConfig(file="next", keep_sources=("chartqa", "dvqa", "plotqa"))}
    with pytest.warns(UserWarning, match="next") as said:
        mixture = open_mixture(sets, str(root), open_files, str(root / "cache"))
    assert names(mixture) == ["chartqa0", "chartqa1", "chartqa2", "dvqa0", "dvqa1", "dvqa2"]
    assert mixture[3].info["data_source"] == "dvqa"
    left, missing = (str(warning.message) for warning in said)
    assert "next: 3 records belong to none of the sets charts, by image folder or data_source: 'demo' 3; add a set" in left
    assert "set charts: no record of next has data_source 'plotqa'; the file has 'chartqa' 3, 'demo' 3, 'dvqa' 3" in missing


def test_a_set_without_rows_stops_and_says_what_there_is(root):
    sets = {"next": SetConfig(file="llava_v1_5_mix665k.json", keep_sources=("llava-next-instruct",))}
    with pytest.raises(SourceError, match="set next takes none of the 26 records") as error:
        opened(sets, root)
    assert "'coco/train2017/' 6, 'gqa/images/' 5" in str(error.value)
    assert "every data_source: '' 26; correct its keep_images" in str(error.value)


def test_rows_of_no_set_and_of_two_are_said(root):
    sets = {
        "coco": SetConfig(file="llava_v1_5_mix665k.json", keep_images=("coco/",)),
        "pictures": SetConfig(file="llava_v1_5_mix665k.json", keep_images=("coco/", "gqa/", "ocr_vqa/", "vg/")),
    }
    with pytest.warns(UserWarning, match="of the sets") as said:
        open_mixture(sets, str(root), open_files, str(root / "cache"))
    left, shared = (str(warning.message) for warning in said)
    assert "7 records belong to none of the sets coco, pictures" in left
    assert "'<text>' 4, 'textvqa/train_images/' 3; add a set, or name them in drop_images" in left
    assert "6 records belong to several of the sets coco, pictures" in shared


def test_unreadable_rows_are_not_lost_by_a_filter(root):
    rows = [row("good", "coco/train2017/"), 17, row("bad", "coco/train2017/") | {"conversations": None}]
    write(root / "damaged.json", rows)
    mixture = opened({"all": SetConfig(file="damaged.json", drop_images=("textvqa/",))}, root)
    assert len(mixture) == 3
    for index in (1, 2):
        with pytest.raises(ExampleError, match=f"damaged.json record {index}"):
            mixture[index]


def test_all_that_is_missing_is_named_at_once(root):
    sets = table("llava_665k") | {
        "chartqa": table("deepstack_748k")["chartqa"],
        "split": SetConfig(file="hub/train"),
        "many": SetConfig(file="more/*.parquet", images="nowhere"),
    }
    (root / "vg/VG_100K_2").rename(root / "elsewhere")
    with pytest.raises(ConfigError) as error:
        opened(sets, root)
    images, made, *rest, where = error.value.args
    archives = "https://cs.stanford.edu/people/rak248/VG_100K_2/images"
    assert images == (
        f"no {root}/vg/VG_100K_2 (set vg): wget -P {root}/vg {archives}.zip {archives}2.zip && unzip -q {root}/vg/\\*.zip "
        f"-d {root}/vg"
    )
    assert made == (
        f"no {root}/chartqa_7k.json (set chartqa): made from https://github.com/vis-nlp/ChartQA, see docs/datasets.md"
    )
    own = "put it there, or leave the set out"
    expected = (("hub/train", "split"), ("more/*.parquet", "many"), ("nowhere", "many"))
    assert rest == [f"no {root}/{path} (set {name}): {own}" for path, name in expected]
    assert "--config.data.root=DIR" in where
    (root / "llava_v1_5_mix665k.json").unlink()
    fetch = rf"mix665k\.json \(sets coco, gqa, ocr_vqa, textcaps, vg, sharegpt\): hf download liuhaotian/.* --local-dir {root}"
    with pytest.raises(ConfigError, match=fetch):
        opened(sets, root)


def test_a_root_with_spaces_stays_one_word_of_the_command(tmp_path):
    with pytest.raises(ConfigError, match=r"--local-dir '.*/two words'"):
        opened(table("llava_558k"), tmp_path / "two words")


def test_a_split_of_a_folder_is_looked_for_by_the_one_that_opens_it(root):
    (root / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist([row("a")]), root / "hub" / "train.parquet")
    assert names(opened({"part": SetConfig(file="hub/train", keep_images=("<text>",))}, root)) == ["a"]
    with pytest.raises(SourceError, match="hub/dev does not exist"):
        opened({"part": SetConfig(file="hub/dev")}, root)


@pytest.mark.parametrize(
    ("found", "expected", "exact", "wrong"),
    [
        (1000, 1000, True, False),
        (990, 1000, True, False),
        (1011, 1000, True, True),
        (0, 0, True, False),
        (19_501, 20_000, False, False),
        (20_501, 20_000, False, True),
        (1_801, 2_000, False, False),
        (2_201, 2_000, False, True),
    ],
)
def test_how_far_a_count_may_be_off(root, found, expected, exact, wrong):
    part = opened({"text": SetConfig(file="llava_v1_5_mix665k.json")}, root).parts[0]
    part = replace(part, rows=np.arange(found), config=replace(part.config, rows=expected, exact=exact))
    assert bool(unexpected_count(part)) == wrong


def test_a_wrong_count_is_said_and_shown(root):
    sets = {
        "gqa": replace(table("llava_665k")["gqa"], rows=5, drop_images=("coco", "ocr", "text", "vg", "<text>")),
        "coco": replace(table("llava_665k")["coco"], rows=364_100, paper=364_000),
        "guess": SetConfig(file="[guess].json", rows=1000, exact=False),
    }
    write(root / "[guess].json", [row("a")])
    with pytest.warns(UserWarning, match="records found") as said:
        mixture = open_mixture(sets, str(root), open_files, str(root / "cache"))
    few, guess = (str(warning.message) for warning in said)
    assert few == (
        "set coco: 6 records found, 364,100 expected (exactly); llava_v1_5_mix665k.json is cut, or another release: get it "
        "again, or set config.data.sets.coco.rows"
    )
    assert "set guess: 1 records found, 1,000 expected (rounded to thousands)" in guess
    lines = {
        cells[0]: cells[1:] for cells in (line.replace("│", "").split() for line in printed(mixture).splitlines()) if cells
    }
    assert lines["gqa"] == ["llava_v1_5_mix665k.json", "5", "5", "1", "5", "ok"]
    assert lines["coco"] == ["llava_v1_5_mix665k.json", "6", "364,100", "364,000", "1", "6", "not", "as", "expected"]
    assert lines["guess"] == ["[guess].json", "1", "~1,000", "1", "1", "not", "as", "expected"]
    assert lines["all"] == ["12", "365,105", "364,000", "12"]


def test_a_file_is_looked_through_once(root, monkeypatch):
    sets = unknown(table("llava_665k"))
    before = names(opened(sets, root))
    passes = []
    scan = selection.scan
    monkeypatch.setattr(selection, "scan", lambda *arguments: passes.append(1) or scan(*arguments))
    assert names(opened(sets, root)) == before
    assert not passes
    opened({**sets, "coco": replace(sets["coco"], keep_images=("coco/",))}, root)
    assert len(passes) == 1, "another filter"
    write(root / "llava_v1_5_mix665k.json", [row("new", folder) for folder, _ in ROWS.values()])
    assert names(opened(sets, root)) == ["new"] * 7
    assert len(passes) == 2, "another file"
    for kept in (root / "cache" / "selections").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    assert names(opened(sets, root)) == ["new"] * 7
    assert len(passes) == 3, "a damaged cache"
    assert not [kept for kept in (root / "cache" / "selections").iterdir() if kept.suffix != ".npz"]


def test_a_cache_that_cannot_be_written_stops_nothing(root):
    (root / "file").touch()
    mixture = open_mixture(unknown(table("llava_665k")), str(root), open_files, str(root / "file" / "cache"))
    assert len(mixture) == 26


def test_images_that_were_never_fetched_show_in_every_set(root):
    mixture = opened(unknown(table("llava_665k")), root)
    assert mixture.missing_images(1000) == []
    for image in (root / "vg/VG_100K_2").iterdir():
        image.unlink()
    assert (
        mixture.missing_images(1000) == [str(root / f"vg/VG_100K_2/vg/{i}.jpg") for i in (0, 1)]
        or sorted(Path(path).parent.name for path in mixture.missing_images(1000)) == ["VG_100K_2"] * 2
    )
    assert len(mixture.missing_images(6 * 2)) == 1, "two looks into each set"


def test_a_root_may_be_a_url(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPSTACK_CACHE", str(tmp_path))
    with fsspec.open("memory://mix/rows.json", "w") as file:
        json.dump([row("a", "coco/"), row("b")], file)  # pyright: ignore[reportArgumentType]
    with fsspec.open("memory://mix/coco/a.jpg", "wb") as file:
        file.write(b"jpeg")  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    sets = {
        "coco": SetConfig(file="rows.json", keep_images=("coco/",)),
        "text": SetConfig(file="rows.json", keep_images=("<text>",)),
    }
    mixture = opened(sets, "memory://mix")
    assert names(mixture) == ["a", "b"]
    assert mixture[0].images == (b"jpeg",)
    assert len(list((tmp_path / "selections").iterdir())) == 1
    with pytest.raises(ConfigError, match="memory://mix/gqa"):
        opened({"gqa": SetConfig(file="rows.json", keep_images=("gqa/",))}, "memory://mix")


# The tables and the configuration.


@pytest.mark.parametrize(
    ("name", "sets", "rows", "paper"),
    [
        ("llava_558k", "SETS", 558_128, 0),
        ("llava_665k", "SETS", 665_298, 0),
        ("deepstack_748k", "SETS", 665_298 - 21_953 + 105_000, 747_000),
        ("deepstack_748k", "PUBLISHED", 779_289 - 11, 747_000),  # 11 rows of the parquet files are not in the JSON
        ("deepstack_748k", "PARQUET", 779_289, 747_000),
    ],
)
def test_the_tables_add_up(name, sets, rows, paper):
    entries = table(name, sets).values()
    assert sum(entry.rows for entry in entries) == rows
    assert sum(entry.paper for entry in entries) == paper
    assert all(entry.file_from and entry.licence for entry in entries)
    assert all(entry.images_from for entry in entries if entry.keep_images and entry.keep_images != ("<text>",))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_recipes_name_their_mixture(stage):
    config = build_config(runpy.run_path(str(REPOSITORY / "configs" / "llava15.py"))["get_config"](stage))
    assert config.data.sets == table({"pretrain": "llava_558k", "finetune": "llava_665k"}[stage])


def test_sets_are_set_from_the_command_line_in_any_folder(tmp_path):
    code = (
        "import sys; from deepstack_jax import cli; cli.parse_flags([cli.CONFIG]);"
        "print([entry.repeat for entry in cli.parse_config().data.sets.values()])"
    )
    arguments = [f"--config={REPOSITORY / 'configs' / 'llava15.py'}:finetune", "--config.data.sets.gqa.repeat=0.5"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1.0, 0.5, 1.0, 1.0, 1.0, 1.0]"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file": ""}, r"data\.sets\.a\.file is empty; name the file"),
        ({"repeat": 0.0}, r"data\.sets\.a\.repeat got 0\.0, expected a number above 0; to leave the set out, remove it"),
        ({"repeat": float("nan")}, r"data\.sets\.a\.repeat got nan"),
        ({"rows": -1}, r"data\.sets\.a\.rows got -1, expected 0 \(unknown\)"),
        ({"keep_images": ("/coco",)}, r"data\.sets\.a\.keep_images holds '/coco', expected the beginning of a path below"),
        ({"drop_images": ("",)}, r"data\.sets\.a\.drop_images holds ''"),
        ({"keep_sources": ("",)}, r"data\.sets\.a\.keep_sources holds '', expected a data_source"),
        ({"repeats": 2.0}, r"unknown key config\.data\.sets\.a\.repeats; nearest valid name: 'repeat'"),
    ],
)
def test_impossible_sets_are_refused(entry, message):
    config = default_config().to_dict()
    config["data"]["sets"] = {"a": {"file": "a.json", **entry}}
    with pytest.raises(ConfigError, match=message):
        build_config(config)
