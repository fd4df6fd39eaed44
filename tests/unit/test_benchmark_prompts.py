"""How benchmarks ask: the words of the papers' code, other words behind them, and the demo's pages as benchmarks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.demo_tasks import write
from deepstack_jax.config import Config
from deepstack_jax.data.formats.image_files import read_image
from deepstack_jax.data.synthetic import DocumentPages
from deepstack_jax.evaluate.benchmarks.benchmark import Item
from deepstack_jax.evaluate.benchmarks.registry import TASKS, find_task
from tests.unit.test_benchmarks import made, questions_of

GOLDEN = Path(__file__).parents[1] / "golden" / "scorers"


def prompt_of(row: dict[str, Any]) -> str:
    """What our prompt is for a document of the recorded prompts."""
    extra, doc = row["extra"], row["extra"]["doc"]
    name = {"seedbench": "seed", "mmmu_mc": "mmmu", "mmmu_open": "mmmu"}.get(extra["task"], extra["task"])
    protocol = "deepstack-paper" if extra["version"] == "deepstack" else "own"
    if name == "textvqa" and (extra["kwargs"] or {}).get("ocr"):
        name, protocol = "textvqa_ocr", "deepstack-paper"
    if name == "mmvet" and protocol == "own":
        protocol = "lmms-eval"
    options = doc.get("options") or [doc[f"choice_{letter}"] for letter in "abcd" if f"choice_{letter}" in doc]
    options = json.loads(options.replace("'", '"')) if isinstance(options, str) else options
    details = {"ocr_tokens": doc.get("ocr_tokens"), "open": doc.get("question_type") == "open"}
    protocols = TASKS[name].protocols
    return protocols.get(protocol, protocols["own"]).prompt(Item("1", doc["question"], (), tuple(options), details=details))


def test_prompts_are_those_of_the_papers_base_code():
    rows = json.loads((GOLDEN / "prompts.json").read_text())
    assert len(rows) == 15
    for row in rows:
        assert prompt_of(row) == row["score"], row["extra"]


@pytest.mark.parametrize(("name", "form"), [("vqav2", "json"), ("mmmu", "parquet"), ("ai2d", "json")])
@pytest.mark.parametrize("suffix", ["", "\nOne word."])
def test_what_follows_every_question_may_be_another(name, form, suffix, tmp_path):
    own = questions_of(made(tmp_path, name, form))
    task = find_task(name, str(tmp_path), suffix=suffix)
    bodies = [one.words.partition("\nAnswer")[0].strip() for one in own]
    assert [one.words for one in questions_of(task)] == [f"{body}{suffix}" for body in bodies]
    assert task.suffix == suffix


def test_the_demos_pages_are_files_of_benchmarks(tmp_path):
    write(tmp_path, pages=2)
    pages = DocumentPages(0, 2, questions=4, split="validation")
    for name in ("vqav2", "gqa", "docvqa"):
        found = questions_of(find_task(name, str(tmp_path), suffix=""))
        assert len(found) == 8
        for number, one in enumerate(found):
            page, turn = pages[number // 4], number % 4
            assert one.words == page.messages[2 * turn].text.removeprefix("<image>\n")
            assert set(one.references) == {page.messages[2 * turn + 1].text}
            shown = np.asarray(read_image(one.turns[0].images[0], Config().data)[0].convert("RGB"))
            np.testing.assert_array_equal(shown, page.images[0])
