"""The parts of README.md that scripts of benchmarks/ write."""

import re
from importlib import import_module

import pytest

from benchmarks import readme_table
from benchmarks.readme_finetune import excerpt

README = (readme_table.REPOSITORY / "README.md").read_text()
PRINTED = """Packing, first epoch
│ examples           │ 840                                              │
finetune-lora: 166,125,504 parameters, 2 steps of 8, mesh data 1, fsdp 1, tensor 1
┃ group     ┃ optimizer ┃ lr     ┃ tensors ┃ parameters  ┃
│ frozen    │ -         │ -      │ 42      │ 165,682,194 │
│ lora      │ adamw     │ 0.0002 │ 14      │ 19,537,920  │
│ layers/layers/block/attention/k/kernel │ lora  │ 30      │ 1,474,560  │
step of length 2048 compiled in 75.9 s
step 1/2 loss 5.3191 acc 0.127 lr 2.00e-05 grad 23.16 padding 30.2%
step 2/2 loss 4.9050 acc 0.119 lr 1.87e-04 grad 11.86 0.0 ex/s 5 tok/s padding 41.1% left 3m 02s
"""


def part(name: str) -> str:
    (found,) = re.findall(rf"<!-- {name}:begin [^\n]*-->\n(.*?)\n<!-- {name}:end -->", README, re.DOTALL)
    return found


def test_of_a_run_readme_shows_what_does_not_depend_on_the_machine():
    kept = (2, 4, 5)
    lines = PRINTED.splitlines()
    steps = ["step 1/2 loss 5.3191 acc 0.127 lr 2.00e-05 grad 23.16", "step 2/2 loss 4.9050 acc 0.119 lr 1.87e-04 grad 11.86"]
    assert excerpt(PRINTED).splitlines() == ["```text", *(lines[at] for at in kept), *steps, "```"]


def test_what_readme_shows_of_a_fine_tuning_is_what_the_script_writes():
    """All groups of the setting, and every step to the last."""
    shown = part("finetune")
    assert excerpt(shown) == shown
    settings = import_module("configs.finetune").SETTINGS["lora"]
    assert set(re.findall(r"^│ (\w+)", shown, re.MULTILINE)) == {group for _, group in settings[0]}
    steps = [tuple(map(int, pair)) for pair in re.findall(r"^step (\d+)/(\d+) ", shown, re.MULTILINE)]
    assert steps == [(number, len(steps)) for number in range(1, len(steps) + 1)] != []


@pytest.mark.parametrize("name", ["demo", "answers", "finetune"])
def test_a_part_is_written_between_its_marks_and_nothing_else_is(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readme_table, "REPOSITORY", tmp_path)
    (tmp_path / "README.md").write_text(README)
    assert readme_table.write_parts({name: "other words"}) == 0
    assert (tmp_path / "README.md").read_text() == README.replace(part(name), "other words")


def test_a_missing_mark_is_said_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readme_table, "REPOSITORY", tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert readme_table.write_parts({"demo": "other"}) == 1
    assert "README.md has no demo:begin" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "words"
