"""docs/results.md: as the registry has the paper's numbers, and filled by whoever trained a model."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate.results_table import fill_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "results.md"


def results(score: float, rows: int = 5, bad: int = 0) -> dict[str, Any]:
    return {"rows": rows, "rows_in_all": 5, "bad_examples": bad, "scores": {"anls": {"score": score}}}


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copy(DOCUMENT, tmp_path))


def test_the_document_is_as_the_registry_has_it(copy):
    fill_table(copy, "mine", {})
    assert copy.read_text() == DOCUMENT.read_text(), "call fill_table(docs/results.md, '', {})"


def test_scores_go_into_the_last_column_and_others_stay(copy):
    fill_table(copy, "mine", {"docvqa": results(0.39123), "docvqa:deepstack-paper": results(0.5, rows=2, bad=1)})
    fill_table(copy, "yours", {"infovqa": results(0.25), "mmvet": results(0.0)})
    lines = {line.split("`")[1]: line for line in copy.read_text().splitlines() if line.startswith("| `")}
    assert lines["docvqa"].endswith("| 39.1 (mine) |")
    assert lines["docvqa:deepstack-paper"].endswith("| 50.0 (mine, the first 2 rows, 1 left out) |")
    assert lines["infovqa"].endswith("| 25.0 (yours) |")
    assert lines["mmvet"].endswith("| to be scored (yours) |")
    assert lines["gqa"].endswith("|  |")


def test_another_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        fill_table(tmp_path / "gone.md", "mine", {})
    (tmp_path / "other.md").write_text("# Other\n")
    with pytest.raises(ConfigError, match="has no lines <!-- results -->"):
        fill_table(tmp_path / "other.md", "mine", {})
