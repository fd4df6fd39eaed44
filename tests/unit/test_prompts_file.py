"""Prompts from a file: one a line, whatever else Unicode takes for the end of a line."""

import pytest

from deepstack_jax.api import ConfigError
from deepstack_jax.generate.__main__ import read_prompts


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_line_is_a_prompt(tmp_path, ending, mark):
    lines = ["What is\u2028this?", "", "and\x0b that\x85 or\x0c these?", "last"]
    (tmp_path / "prompts.txt").write_bytes((mark + ending.join(lines)).encode())
    assert read_prompts(["first"], str(tmp_path / "prompts.txt")) == ["first", lines[0], lines[2], "last"]


def test_another_coding_is_one_line_with_the_way_out(tmp_path):
    (tmp_path / "prompts.txt").write_text("What?", "utf-16")
    with pytest.raises(ConfigError, match=r"prompts\.txt cannot be read: .*one prompt per line, as UTF-8"):
        read_prompts([], str(tmp_path / "prompts.txt"))
