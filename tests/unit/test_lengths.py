"""What an example takes of a row, known without decoding it; where it is kept; and what becomes of one that is too long."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepstack_jax.config import Config
from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.data.encode.encoder import Encoder, OverlongError, try_record
from deepstack_jax.data.encode.image import ImageError, open_image
from deepstack_jax.data.encode.labels import IMAGE_TOKEN, EncodedText
from deepstack_jax.data.encode.sizes import measure
from deepstack_jax.data.example import BadExample, Example, ExampleError, Message, SourceError
from deepstack_jax.data.formats.image_files import image_size
from deepstack_jax.data.order import lengths
from deepstack_jax.data.order.lengths import length_index, measure_rows
from tests.unit.made_examples import MadeExamples, draw
from tests.unit.tiny import tiny_config

TEXT = {"data.template": "direct", "data.tokenizer": "bytes", "data.max_length": 96, "data.max_bad_fraction": 0.5}
VARIANTS = {
    "deepstack": {},
    "letterbox": {"image.fit": "letterbox", "image.grid": "square"},
    "hd": {"image.mode": "hd", "data.max_length": 160},
    "pad": {"image.mode": "pad", "deepstack.stack": "none"},
    "string of crops": {"deepstack.sequence": "global_crops", "deepstack.stack": "none"},
    "pooled": {"deepstack.pool": 2},
    "unpadded": {
        "image.mode": "anyres",
        "image.merge": "spatial_unpad",
        "image.pinpoints": ((16, 8), (8, 16), (16, 16), (24, 8)),
        "deepstack.stack": "none",
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("DEEPSTACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_config(overrides: dict | None = None) -> Config:
    return tiny_config(TEXT | (overrides or {}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_measured_sizes_are_those_of_the_encoded_examples(variant):
    encoder, source = Encoder(make_config(VARIANTS[variant]).data_spec), MadeExamples(24)
    encoded = [encoder.encode(example) for example in source]
    assert [measure(example, encoder) for example in source] == [example.size for example in encoded]
    assert len({example.size for example in encoded}) > 5
    assert all(sum(map(len, example.pixels)) == example.size.crops for example in encoded)


def test_the_size_of_an_image_is_that_of_its_first_decoded_frame(tmp_path):
    picture = Image.fromarray(np.arange(7 * 5 * 3, dtype=np.uint8).reshape(5, 7, 3))
    sources: list = [picture, np.asarray(picture), np.asarray(picture)[:, :, 0], draw(3)]
    for kind, mode in (("GIF", "P"), ("JPEG", "CMYK"), ("PNG", "LA"), ("TIFF", "RGB"), ("WEBP", "RGB"), ("BMP", "1")):
        file = BytesIO()
        picture.convert(mode).save(file, kind)
        path = tmp_path / f"{kind}.jpg"
        path.write_bytes(file.getvalue())
        sources += [file.getvalue(), str(path)]
    assert [image_size(source) for source in sources] == [open_image(source).size for source in sources]


@pytest.mark.parametrize("content", [b"", b"no image", "missing.jpg"], ids=["empty", "text", "missing"])
def test_an_image_without_a_size_is_an_image_error(content, tmp_path):
    with pytest.raises(ImageError, match="cannot read image"):
        image_size(content if isinstance(content, bytes) else str(tmp_path / content))


def test_what_cannot_be_used_is_unknown_and_the_rest_is_measured():
    config, source = make_config(), MadeExamples(12, refused=(2,))
    sizes = measure_rows(range(12), source, Encoder(config.data_spec))
    assert sizes.dtype == np.int32
    assert sizes[2].tolist() == list(lengths.UNKNOWN)
    assert (sizes[np.arange(12) != 2, 0] > 0).all()
    crowded = make_config({"data.max_images": 1})
    assert np.flatnonzero(measure_rows(range(12), source, Encoder(crowded.data_spec))[:, 0] == 0).tolist() == [2, 3, 7, 11]


def test_an_index_is_made_once_per_source_and_configuration(cache, monkeypatch):
    source, measured = MadeExamples(40), []

    def counted(rows: range, **given) -> np.ndarray:
        measured.append(rows)
        return measure_rows(rows, **given)

    monkeypatch.setattr(lengths, "measure_rows", counted)
    first = length_index(source, make_config().data_spec)
    assert first.shape == (40, 3)
    np.testing.assert_array_equal(length_index(source, make_config({"train.batch_size": 4, "data.seed": 3}).data_spec), first)
    assert len(measured) == 1
    others = [{"data.template": "plain"}, {"data.max_length": 95}, {"image.num_crops": 3}, {"data.overlong": "cut"}]
    for number, changes in enumerate(others):
        if changes.get("data.template") == "plain":
            changes = changes | {"data.max_bad_fraction": 1.0}
        length_index(source, make_config(changes).data_spec)
        assert len(measured) == 2 + number, changes
    length_index(MadeExamples(40, changed=(0,)), make_config().data_spec)
    assert len(measured) == 2 + len(others)
    assert len(list((cache / "lengths").iterdir())) == len(measured), "parts are left over"


def test_the_name_of_an_index_is_the_same_in_another_process():
    code = (
        "from tests.unit.test_lengths import make_config, MadeExamples; from deepstack_jax.data.order.lengths import _key;"
        "print(_key(MadeExamples(9), make_config()))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert told == lengths._key(MadeExamples(9), make_config())


def test_an_interrupted_measurement_goes_on_where_it_was(cache, monkeypatch):
    monkeypatch.setattr(lengths, "CHUNK", 8)
    source, config, measured = MadeExamples(30), make_config(), []

    def interrupted(rows: range, **given) -> np.ndarray:
        measured.append(rows.start)
        if rows.start == 16 and measured.count(16) == 1:
            raise KeyboardInterrupt
        return measure_rows(rows, **given)

    monkeypatch.setattr(lengths, "measure_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        length_index(source, config.data_spec)
    sizes = length_index(source, config.data_spec)
    assert measured == [0, 8, 16, 16, 24]
    np.testing.assert_array_equal(sizes, measure_rows(range(30), source, Encoder(config.data_spec)))
    assert [path.suffix for path in (cache / "lengths").iterdir()] == [".npy"]


def test_worker_processes_measure_the_same(monkeypatch):
    monkeypatch.setattr(lengths, "CHUNK", 8)
    source = MadeExamples(80, refused=(5,))
    sizes = length_index(source, make_config({"data.workers": 2}).data_spec)
    np.testing.assert_array_equal(sizes, measure_rows(range(80), source, Encoder(make_config().data_spec)))


@dataclass(frozen=True)
class Deadly(MadeExamples):
    """Kills the worker process that reads row 20."""

    def __getitem__(self, index: int) -> Example:
        if index == 20 and multiprocessing.parent_process() is not None:
            os._exit(9)
        return super().__getitem__(index)


def test_a_killed_worker_process_is_said_in_a_line_and_what_was_measured_is_kept(monkeypatch):
    monkeypatch.setattr(lengths, "CHUNK", 8)
    source = Deadly(40)
    with pytest.raises(
        SourceError, match=r"one of 1 processes that measure .* was killed.*; lower config.data.workers; the same"
    ):
        length_index(source, make_config({"data.workers": 1}).data_spec)
    measured = []
    monkeypatch.setattr(
        lengths, "measure_rows", lambda rows, **given: measured.append(rows.start) or measure_rows(rows, **given)
    )
    assert length_index(source, make_config().data_spec).shape == (40, 3)
    assert measured == [16, 24, 32]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY garbage", None], ids=["empty", "garbage", "other rows"])
def test_a_damaged_index_is_made_again(damage, cache):
    source, config = MadeExamples(10), make_config()
    sizes = length_index(source, config.data_spec)
    [file] = (cache / "lengths").iterdir()
    if damage is None:
        np.save(file, sizes[:5])
    else:
        file.write_bytes(damage)
    np.testing.assert_array_equal(length_index(source, config.data_spec), sizes)
    np.testing.assert_array_equal(np.load(file), sizes)


def test_too_many_unusable_examples_stop_the_run_with_reasons_and_are_looked_at_again(cache):
    config = make_config({"data.max_bad_fraction": 0.1})
    with pytest.raises(
        SourceError, match=r"2 of 12 examples cannot be used, .*max_bad_fraction=0.1; .* row 3 is refused; row 5"
    ):
        length_index(MadeExamples(12, refused=(3, 5)), config.data_spec)
    assert not list((cache / "lengths").iterdir())
    assert (length_index(MadeExamples(12, refused=(3,)), config.data_spec)[3] == 0).all()


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEEPSTACK_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match=r"cannot keep the length index in .*file/lengths.*: .*; set DEEPSTACK_CACHE to"):
        length_index(MadeExamples(3), make_config().data_spec)


QUESTION, ANSWER = "<image>\nwhat is it", "a very long answer indeed"


def long_example(messages: tuple[Message, ...] = (Message("human", QUESTION), Message("gpt", ANSWER))) -> Example:
    images = sum(message.text.count("<image>") for message in messages)
    return Example(7, "long", (draw(2),) * images, messages)


def encoded(policy: str, length: int, example: Example | None = None) -> EncodedExample | BadExample:
    encoder = Encoder(make_config({"data.overlong": policy, "data.max_length": length}).data_spec)
    return try_record([example or long_example()], 0, encoder.encode)


def test_an_overlong_example_is_dropped_cut_or_stops_the_run():
    whole = encoded("error", 96)
    assert isinstance(whole, EncodedExample)
    fits = whole.length
    for policy in ("drop", "cut", "error"):
        same = encoded(policy, fits)
        assert isinstance(same, EncodedExample)
        np.testing.assert_array_equal(same.ids, whole.ids)

    dropped = encoded("drop", fits - 1)
    assert isinstance(dropped, BadExample)
    assert f"long: {fits} tokens with its images, a row holds {fits - 1}; raise config.data.max_length" in dropped.reason
    cut = encoded("cut", fits - 5)
    assert isinstance(cut, EncodedExample)
    assert cut.length == fits - 5
    np.testing.assert_array_equal(cut.ids, whole.ids[:-5])
    np.testing.assert_array_equal(cut.supervised, whole.supervised[:-5])
    with pytest.raises(OverlongError, match=f"long: {fits} tokens .* holds {fits - 1}; raise .*overlong to 'drop' or 'cut'"):
        encoded("error", fits - 1)
    strict = make_config({"data.overlong": "error", "data.max_length": fits - 1})
    with pytest.raises(OverlongError):
        measure_rows(range(1), [long_example()], Encoder(strict.data_spec))


def test_no_image_is_cut_and_nothing_is_kept_that_teaches_nothing():
    later = (Message("human", QUESTION), Message("gpt", "yes"), Message("human", "<image>\nand this"), Message("gpt", ANSWER))
    two = encoded("error", 96, long_example(later))
    assert isinstance(two, EncodedExample)
    second = int(np.flatnonzero(two.ids == IMAGE_TOKEN)[1]) + 3  # where its 4 visual tokens begin
    for room in (second + 1, second + 3, 20):
        refused = encoded("cut", room, long_example(later))
        assert isinstance(refused, BadExample)
        assert "an image would be cut; raise config.data.max_length" in refused.reason
    assert isinstance(encoded("cut", second + 4, long_example(later)), EncodedExample)

    question = encoded("cut", 14)
    assert isinstance(question, BadExample)
    assert "no answer begins before the cut" in question.reason


@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_a_cut_text_is_a_beginning_with_all_images_and_something_to_learn(visual, data):
    """0 stands for text, k for an image of k visual tokens."""
    kinds = data.draw(st.permutations([*visual, *[0] * data.draw(st.integers(1, 12))]))
    ids = np.array([IMAGE_TOKEN if kind else 5 + place for place, kind in enumerate(kinds)], np.int32)
    supervised = np.array([not kind and data.draw(st.booleans()) for kind in kinds])
    room, spans = data.draw(st.integers(5, 20)), [kind for kind in kinds if kind]
    config = make_config({"data.overlong": "cut"})
    config = replace(config, data=replace(config.data, max_length=room))
    example, total = Example(0, "drawn", (), ()), sum(kind or 1 for kind in kinds)
    try:
        cut = Encoder(config.data_spec).fit(example, EncodedText(ids, supervised), spans)
    except ExampleError:
        assert total > room
        return
    np.testing.assert_array_equal(cut.ids, ids[: cut.ids.size])
    np.testing.assert_array_equal(cut.supervised, supervised[: cut.ids.size])
    assert (cut.ids == IMAGE_TOKEN).sum() == len(spans)
    taken = sum(kind or 1 for kind in kinds[: cut.ids.size])
    assert taken == min(total, room)
    assert total <= room or cut.supervised[1:].any()


def test_placeholders_without_images_are_refused():
    encoder = Encoder(make_config().data_spec)
    with pytest.raises(ExampleError, match="odd: 1 image placeholder but 2 images"):
        encoder.encode(Example(0, "odd", (draw(1), draw(2)), (Message("human", QUESTION), Message("gpt", "x"))))


def test_words_too_many_for_the_name_of_a_file_have_an_index():
    words = " ".join(f"word{number}" for number in range(1000))
    config = make_config({"data.tokenizer": f"words:{words}", "decoder.vocab_size": 1003})
    with pytest.raises(SourceError, match="cannot be used"):  # for its texts, which are of other words
        length_index(MadeExamples(4), config.data_spec)
