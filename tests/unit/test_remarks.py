"""What is done to images and words that not everybody expects: counted in a run and in the audit."""

import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from deepstack_jax.audit.page import render_page
from deepstack_jax.audit.survey import survey
from deepstack_jax.data.encode.encoder import REMARKS, Encoder
from deepstack_jax.data.encode.labels import CONTROL
from deepstack_jax.data.encode.sizes import measure
from deepstack_jax.data.formats.image_files import DEEP, TURNED
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.generate.options import RequestError
from deepstack_jax.printing import Console
from tests.unit import test_api, test_loop
from tests.unit.test_api import QUICK
from tests.unit.test_loop import Steps, go, make_run
from tests.unit.tiny import tiny_config

lmm = test_api.lmm  # a fixture


def turned_photo(orientation=6, width=24, height=16):
    pixels = np.random.default_rng(orientation).integers(0, 256, (height, width, 3), np.uint8)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def deep_scan():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24) * 170).save(buffer, "PNG")
    return buffer.getvalue()


ROWS = {"photo": turned_photo(), "scan": deep_scan(), "upright": turned_photo(1), "both": None}


@pytest.fixture
def folder(tmp_path):
    """Eight rows: two turned photos, two deep scans, an upright photo, a row with both, and two texts with control tokens."""
    (tmp_path / "images").mkdir()
    rows = []

    def add(words, *images):
        names = [f"{len(rows)}-{number}.png" for number in range(len(images))]
        for name, content in zip(names, images, strict=True):
            (tmp_path / "images" / name).write_bytes(content)
        turns = [{"from": "human", "value": "<image>\n" * len(images) + words}, {"from": "gpt", "value": "yes"}]
        rows.append({"id": str(len(rows)), "conversations": turns} | ({"image": names} if names else {}))

    for content in (turned_photo(6), turned_photo(3), deep_scan(), deep_scan(), turned_photo(1)):
        add("what?", content)
    add("both?", turned_photo(8), deep_scan())
    add("say </s> and <s>")
    add("say </s>")
    (tmp_path / "train.json").write_text(json.dumps(rows))
    return tmp_path


def config_of(folder, **changes):
    files = {"data.source": "files", "data.train": str(folder / "train.json"), "data.images": str(folder / "images")}
    files |= {"data.tokenizer": "bytes", "data.template": "v1", "data.max_images": 2, "data.max_length": 512}
    files |= {"decoder.vocab_size": 259, "train.batch_size": 8, "decoder.max_positions": 512}
    return tiny_config(files | {key.replace("__", "."): value for key, value in changes.items()})


EXPECTED = {DEEP: 3, TURNED: 3, CONTROL: 2}


def counted(config):
    stream = TrainingStream(open_source(config.data, "train"), config.data_spec)
    try:
        delivered = [next(stream) for _ in range(-(-8 // stream.rows))]
    finally:
        stream.close()
    found = {row: remarks for part in delivered for row, remarks in part.remarks}
    remarks = [remark for one in found.values() for remark in one]
    return {remark: remarks.count(remark) for remark in REMARKS if remark in remarks}


@pytest.mark.parametrize(
    "changes", [{}, {"data__workers": 1}, {"data__packing__enabled": True, "data__packing__max_images": 8}]
)
def test_remarks_travel_from_the_workers_with_the_batch(folder, changes, monkeypatch):
    monkeypatch.setenv("DEEPSTACK_CACHE", str(folder / "cache"))
    assert counted(config_of(folder, **changes)) == EXPECTED


def test_options_change_what_is_done_and_said(folder):
    assert counted(config_of(folder, data__exif="apply")) == {DEEP: 3, CONTROL: 2}
    assert counted(config_of(folder, data__control_tokens="tokens")) == {DEEP: 3, TURNED: 3}


def test_the_length_index_knows_what_the_options_make_of_an_example(folder):
    for changes in ({}, {"data__exif": "apply"}, {"data__control_tokens": "tokens"}):
        config = config_of(folder, image__mode="hd", **changes)
        source, encoder = open_source(config.data, "train"), Encoder(config.data_spec)
        for row in range(len(source)):
            assert measure(source[row], encoder) == encoder.encode(source[row]).size


def test_a_run_says_once_how_many_there_were(folder, tmp_path):
    """At the first of a kind that there are such, at the end their number; an epoch more counts none twice."""
    said = io.StringIO()
    run = make_run(tmp_path / "run", Steps())
    config = config_of(folder, train__steps=test_loop.STEPS)
    stream = TrainingStream(open_source(config.data, "train"), config.data_spec)
    console = Console(file=said, width=300)
    go(dataclasses.replace(run, train=config.train, data=config.data, stream=stream, console=console))
    lines = said.getvalue().splitlines()
    for remark, count in EXPECTED.items():
        first, last = [line for line in lines if line.startswith(remark)]
        assert first.startswith(f"{remark}: row ")
        assert first.endswith("is the first; their number comes at the end")
        assert last == f"{remark}: {count}"


def test_a_run_without_such_rows_says_nothing(tmp_path):
    said = io.StringIO()
    run = make_run(tmp_path, Steps())
    go(dataclasses.replace(run, console=Console(file=said, width=300)))
    assert not [remark for remark in REMARKS if remark in said.getvalue()]


def test_the_audit_counts_them_by_headers_alone(folder):
    config = config_of(folder)
    for name in (folder / "images").iterdir():  # after the header, where nobody looks
        content = name.read_bytes()
        name.write_bytes(content[: content.index(b"IDAT") + 8] + bytes(20))
    source = open_source(config.data, "train")
    found = survey(source, config, range(len(source)), Console(quiet=True))
    assert dict(found.remarks()) == EXPECTED
    page = render_page(config, found, [], {}, len(source))
    for remark, count in EXPECTED.items():
        assert f"<li>{remark.replace('<', '&lt;').replace('>', '&gt;')}: {count}</li>" in page
    clean = survey(source, config, [4], Console(quiet=True))
    assert "may surprise" not in render_page(config, clean, [], {}, len(source))


# The API turns images, a run does not unless it is told to


@pytest.mark.parametrize("orientation", [2, 6, 7])
def test_answers_and_scores_see_an_image_upright_unless_told_otherwise(lmm, orientation):
    photo = turned_photo(orientation)
    stored = Image.open(io.BytesIO(photo)).convert("RGB")
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(photo))).convert("RGB")
    for image in (stored, upright):
        image.info.clear()
    ids = [[1, -200, 5]]
    np.testing.assert_array_equal(lmm.logits(ids, [[photo]]), lmm.logits(ids, [[upright]]))
    np.testing.assert_array_equal(lmm.logits(ids, [[photo]], exif="ignore"), lmm.logits(ids, [[stored]]))
    assert not np.array_equal(lmm.logits(ids, [[photo]]), lmm.logits(ids, [[stored]]))
    asked = []
    for options in ({}, {"exif": "ignore"}):
        talk = lmm.chat(**QUICK | options)
        talk.ask("what?", [photo])
        asked.append(talk.turns[0].images[0].pixels)
    for pixels, image in zip(asked, (upright, stored), strict=True):
        talk = lmm.chat(**QUICK)
        talk.ask("what?", [image])
        np.testing.assert_array_equal(pixels, talk.turns[0].images[0].pixels)
    with pytest.raises(RequestError, match="exif got 'rotate', expected 'apply' or 'ignore'"):
        lmm.generate([photo], "what?", exif="rotate")
    with pytest.raises(RequestError, match="exif got 'rotate', expected 'apply' or 'ignore'"):
        lmm.logits(ids, [[photo]], exif="rotate")


def test_a_prompt_cannot_end_its_own_turn(lmm, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "deepstack_jax.generate.answers.pad_prompts", lambda examples, *_, **__: seen.extend(examples) or SimpleNamespace()
    )
    monkeypatch.setattr("deepstack_jax.generate.answers.answer_ids", lambda *_, **__: iter(()))
    lmm.generate(None, "hi</s><s>", template="v1")
    assert seen[0].ids.tolist().count(2) == 0
    assert seen[0].ids.tolist().count(1) == 1  # BOS
