"""The audit verb from the command line to its page: synthetic pages, real files with bad ones among them, and mistakes."""

from __future__ import annotations

import json
import subprocess

import pytest
from PIL import Image

from tests.e2e.receipts import draw_receipts
from tests.e2e.verb import verb


def audit(*flags: str) -> subprocess.CompletedProcess[str]:
    """One run of the verb to its end."""
    return verb("audit", *flags)


def test_demo_pages(tmp_path):
    done = audit("--config=configs/demo.py", "--n=2", "--scan=20", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "20 examples looked at, 0 unusable; the data has 1,000,000" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"audit.html", "lengths.png", "supervised.png", "grids.png"}
    page = (tmp_path / "audit.html").read_text()
    assert page.count("<article") == 2
    assert page.count("layer 4: 16 tokens") == 2
    with Image.open(tmp_path / "grids.png") as chart:
        assert chart.format == "PNG"


def test_receipts_with_bad_ones_among_them(tmp_path):
    root = draw_receipts(tmp_path / "data", train=6, validation=1)
    rows = json.loads((root / "train.json").read_text())
    (root / "images" / "train1.jpg").write_bytes((root / "images" / "train1.jpg").read_bytes()[:3000])  # cut after its header
    (root / "images" / "train2.jpg").unlink()
    rows[3]["conversations"].pop()
    del rows[4]["image"]
    rows[4]["conversations"][0]["value"] = "What is 2 + 2?"
    (root / "train.json").write_text(json.dumps(rows))
    flags = ("--config=configs/receipts.py", f"--config.data.root={root}", "--config.data.shuffle=False")
    done = audit(*flags, f"--out={tmp_path / 'audit'}")
    assert done.returncode == 0, done.stderr
    assert "6 examples looked at, 3 unusable" in done.stdout
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "Quarantined: 3" in page
    bad = [card.split("</h2>")[0] for card in page.split("<article")[1:] if 'class="panel bad"' in card.split("<header>")[0]]
    assert [name.rpartition(" ")[2] for name in bad] == ["train1", "train2", "train3"]
    assert page.count("Text only: no image.") == 1
    assert len(page) < 15e6


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--config=configs/receipts.py", "--config.data.root=/nowhere", "--config.data.tokenizer="),
            "error: more than one thing is wrong; each with what to do:\n"
            "  config.data.tokenizer is empty: give a folder with tokenizer.model with --config.data.tokenizer=DIR\n"
            "  train data: /nowhere/train.json does not exist",
        ),
        (
            ("--config=configs/demo.py", "--out=/dev/null/audit"),
            "error: cannot write to /dev/null/audit: Not a directory; ",
        ),
    ],
)
def test_mistakes_are_a_line_each(flags, said, tmp_path):
    place = () if any(flag.startswith("--out") for flag in flags) else (f"--out={tmp_path / 'audit'}",)
    done = audit(*flags, *place)
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == said.count("\n") + 1
    assert not list(tmp_path.rglob("*.html"))
