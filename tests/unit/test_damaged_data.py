"""Damaged copies of real receipts on their way into a batch: for each damage, whether it works and what is said if not."""

import json
from pathlib import Path

import pytest
from PIL import Image

from configs.receipts import get_config
from deepstack_jax.config import build_config
from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.data.encode.encoder import Encoder, try_record
from deepstack_jax.data.example import BadExample
from deepstack_jax.data.open import open_files

REAL = Path(__file__).parents[3] / "shared" / "data" / "receipts"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def as_gif(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("P").save(path, format="GIF")


def as_palette(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("RGB").quantize(16).save(path, format="PNG")


def as_cmyk(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("CMYK").save(path, format="JPEG")


def as_wide(path: Path) -> None:
    with Image.open(path) as image:
        image.resize((30_000, 20)).save(path, format="JPEG")


WORKS = ""
IMAGE_DAMAGE = {
    "truncated file": (cut, "truncated"),
    "zero bytes": (lambda path: path.write_bytes(b""), "the file is empty"),
    "no image": (lambda path: path.write_bytes(b"<html>404</html>"), "not in any image format"),
    "missing": (Path.unlink, "No such file"),
    "GIF named .jpg": (as_gif, WORKS),
    "palette": (as_palette, WORKS),
    "CMYK": (as_cmyk, WORKS),
    "30,000 pixels wide": (as_wide, WORKS),
}


def receipt(folder: Path, **changes: object) -> Path:
    """A data file with one real receipt, its row changed, and the receipt's image beside it; skips without receipts."""
    if not REAL.is_dir():
        pytest.skip(f"no receipts in {REAL}")
    first = json.loads((REAL / "val.json").read_text())[0]
    image = folder / first["image"]
    image.parent.mkdir()
    image.write_bytes((REAL / first["image"]).read_bytes())
    kept = {key: value for key, value in (first | {"id": "damaged"} | changes).items() if value is not ...}
    sound = {"id": "sound", "conversations": ASKED}
    (folder / "data.json").write_text(json.dumps([kept, sound]))
    return image


def ask(question: str) -> dict:
    return {"from": "human", "value": question}


ASKED = [ask("What?"), {"from": "gpt", "value": "That."}]


def trained(folder: Path) -> tuple[EncodedExample | BadExample, EncodedExample | BadExample]:
    """What becomes of both rows of the data file on their way into a batch."""
    source, encoder = open_files(str(folder / "data.json"), str(folder)), Encoder(build_config(get_config()).data_spec)
    return try_record(source, 0, encoder.encode), try_record(source, 1, encoder.encode)


@pytest.mark.parametrize("damage", IMAGE_DAMAGE)
def test_damaged_images_of_real_receipts(tmp_path, damage):
    do, message = IMAGE_DAMAGE[damage]
    image = receipt(tmp_path)
    do(image)
    result, sound = trained(tmp_path)
    assert isinstance(sound, EncodedExample)
    if message == WORKS:
        assert isinstance(result, EncodedExample)
        assert len(result.pixels) == 1
        return
    assert isinstance(result, BadExample)
    assert (result.index, result.name) == (0, "damaged")
    assert str(image) in result.reason
    assert message in result.reason


MARKED = [ask("<image>\nWhat?"), {"from": "gpt", "value": "That."}]
ROW_DAMAGE = {
    "text without image": ({"image": ..., "conversations": ASKED}, WORKS),
    "empty answer": ({"conversations": [MARKED[0], {"from": "gpt", "value": ""}]}, WORKS),
    "first turn not human": ({"conversations": [{"from": "gpt", "value": "Hi."}, *MARKED]}, WORKS),
    "only an answer": (
        {"image": ..., "conversations": [{"from": "gpt", "value": "Hi."}]},
        "expected its last turn to be 'gpt'",
    ),
    "no answer": ({"conversations": MARKED[:1]}, "expected its last turn to be 'gpt': an answer to train on"),
    "two questions": ({"conversations": [MARKED[0], ASKED[0], ASKED[1]]}, "turn 1: got 'human', expected 'gpt'"),
    "image without placeholder": ({"conversations": ASKED}, "has 0 <image> for 1 image"),
    "placeholder without image": ({"image": ...}, "has 1 <image> for 0 images"),
    "two placeholders": (
        {"conversations": [{"from": "human", "value": "<image><image>"}, MARKED[1]]},
        "has 2 <image> for 1 image",
    ),
    "system prompt": ({"conversations": [{"from": "system", "value": "Be kind."}, *MARKED]}, "turn 0 is a system prompt"),
    "image of wrong type": ({"image": 5}, "image is 5, expected a path"),
    "path out of the root": ({"image": "images/../../x.jpg"}, "leaves the image root"),
    "path to a folder": ({"image": "images"}, "directory"),
    "longer than a row": ({"conversations": [MARKED[0], {"from": "gpt", "value": "x" * 2000}]}, "config.data.max_length"),
}


@pytest.mark.parametrize("damage", ROW_DAMAGE)
def test_damaged_rows_of_real_receipts(tmp_path, damage):
    changes, message = ROW_DAMAGE[damage]
    receipt(tmp_path, **changes)
    result, sound = trained(tmp_path)
    assert isinstance(sound, EncodedExample)
    if message == WORKS:
        assert isinstance(result, EncodedExample)
        assert result.supervised.any()
        assert len(result.pixels) == (damage != "text without image")
    else:
        assert isinstance(result, BadExample)
        assert (result.index, result.name) == (0, "damaged")
        assert message in result.reason
