"""What a run leaves at its end: scores that are computed once, and again where the file is damaged."""

import json

from rich.console import Console

from deepstack_jax.config import Config
from deepstack_jax.evaluation.reports import finish
from deepstack_jax.training.metrics import MetricsLog


def test_results_are_made_once_and_anew_where_they_are_damaged(tmp_path, capsys):
    def end(**facts):
        finish(None, Config(), None, {"steps": 3, **facts}, tmp_path, MetricsLog(None, 3), Console())
        return json.loads((tmp_path / "results.json").read_text())

    assert end(parameters=7)["parameters"] == 7
    assert end(parameters=8)["parameters"] == 7, "they are there"
    for left in (b"", b'{"steps": 3, "na', b"[3]", b"\0\xff"):
        (tmp_path / "results.json").write_bytes(left)
        capsys.readouterr()
        assert end(parameters=9)["parameters"] == 9
        assert "results.json is damaged" in capsys.readouterr().out
