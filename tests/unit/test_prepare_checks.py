"""What `prepare` leaves out is what training would leave out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from configs.receipts import get_config
from deepstack_jax.config import build_config
from deepstack_jax.data.encode.encoder import Encoder, try_record
from deepstack_jax.data.encode.sizes import example_check
from deepstack_jax.data.example import BadExample
from deepstack_jax.data.open import open_source
from deepstack_jax.prepare.chunks import Job, make_chunk


def rows_of_every_kind(folder: Path) -> Path:
    """Rows that a run can use, and rows that it cannot, each for another reason."""
    Image.new("RGB", (90, 60)).save(folder / "a.png")
    Image.new("RGB", (200, 100)).save(folder / "large.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:40])

    def row(name: str, images: list[str], answer: str | None = "That.", **more) -> dict:
        turns = [{"from": "human", "value": "<image>" * len(images) + "What?"}]
        return {
            "id": name,
            "image": images,
            "conversations": turns + [{"from": "gpt", "value": answer}] * (answer is not None),
        } | more

    rows = [
        row("good", ["a.png"]),
        row("two images", ["a.png", "a.png"]),
        row("long", ["a.png"], "x" * 5000),
        row("no answer", ["a.png"], None),
        row("cut", ["cut.png"]),
        row("missing", ["b.png"]),
        row("large", ["large.png"]),
        row("text", [], more=2**70, half="\ud83d", score=float("nan")),
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def test_prepare_leaves_out_what_training_would(tmp_path):
    config = get_config()
    config.data.root, config.data.train, config.data.images = str(tmp_path), "rows.json", "."
    config.data.max_pixels = 10_000
    rows_of_every_kind(tmp_path)
    config = build_config(config)
    source = open_source(config.data, "train")
    check, asked = example_check(config.data_spec)
    chunk = make_chunk(Job(source, 8, "", check, 10_000), 0, lambda: None)
    encoder = Encoder(config.data_spec)
    trained = [row for row in range(8) if isinstance(try_record(source, row, encoder.encode), BadExample)]
    assert [bad.row for bad in chunk.bad] == trained == [1, 2, 3, 4, 5, 6]
    reasons = {bad.id: bad.reason for bad in chunk.bad}
    assert "config.data.max_images" in reasons["two images"]
    assert "config.data.max_length" in reasons["long"]
    assert "config.data.max_pixels" in reasons["large"]
    assert "expected its last turn to be 'gpt'" in reasons["no answer"]
    assert {"config.data.max_images": 1, "config.data.overlong": "drop"}.items() <= asked.items()

    with pytest.warns(UserWarning, match=r"the lengths of examples are not checked: config\.data\.tokenizer is empty"):
        check, asked = example_check(replace(config, data=replace(config.data, tokenizer="")).data_spec)
    chunk = make_chunk(Job(source, 8, "", check, 10_000), 0, lambda: None)
    assert [bad.row for bad in chunk.bad] == [1, 3, 4, 5, 6]
    assert "config.data.max_length" not in asked
