"""Held-out rows that cannot be used: named, counted and bounded, and never a loss made of nothing."""

import io
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.example import SourceError
from deepstack_jax.data.open import open_files
from deepstack_jax.evaluate.held_out import HeldOut
from deepstack_jax.evaluate.in_training import TrainingEvaluation
from deepstack_jax.families.build import build_model
from deepstack_jax.generate.decoding import NO_TOKEN, Greedy
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.printing import Console
from deepstack_jax.train.core.step import LossSums
from deepstack_jax.train.run.metrics import MetricsLog, read_metrics
from tests.unit.made_examples import MadeExamples
from tests.unit.tiny import tiny_config

SETTINGS = {
    "data.template": "direct",
    "data.tokenizer": "bytes",
    "data.max_length": 96,
    "decoder.vocab_size": 512,
    "evaluation.examples": 8,
    "evaluation.batch_size": 4,
}


def two_per_token(_: Any, batch: Batch) -> LossSums:
    weight = batch.loss_weights.sum()
    return LossSums(2 * weight, weight, weight)


def infinite(_: Any, batch: Batch) -> LossSums:
    return two_per_token(_, batch)._replace(loss=jnp.inf)


def say_nothing(_: Any, params: Any, batch: Batch, **__: Any) -> Any:
    rows = batch.tokens.shape[0]
    return Greedy(jnp.full((rows, 1), NO_TOKEN, jnp.int32), jnp.full(rows, jnp.inf))


def held_out(bad: tuple[int, ...], allowed: float, loss: Any = two_per_token) -> tuple[HeldOut, Config]:
    """Eight rows, those of `bad` unusable; of them rows 1, 3, 5, 7 have images that cannot be decoded."""
    config = tiny_config(SETTINGS | {"data.max_bad_fraction": allowed})
    broken = tuple(row for row in bad if row % 2)
    source = MadeExamples(8, broken=broken, refused=tuple(row for row in bad if row not in broken))
    return HeldOut(source, config, loss, build_model(config), make_mesh(config.mesh), say_nothing), config


def training(subject: HeldOut, config: Config, workdir: Path, log: MetricsLog, printed: io.StringIO) -> TrainingEvaluation:
    """What evaluates in a run, with these rows and this for a model."""
    evaluation = TrainingEvaluation(config, workdir, Console(file=printed, width=200))
    evaluation.held_out, evaluation.log, evaluation.train = subject, log, subject.task.source
    return evaluation


def said_of(tmp_path, bad: tuple[int, ...], allowed: float, loss: Any = two_per_token, times: int = 1) -> tuple[Any, str]:
    """What `times` reports return and print."""
    subject, config = held_out(bad, allowed, loss)
    printed, log = io.StringIO(), MetricsLog(tmp_path, 0)
    evaluation = training(subject, config, tmp_path, log, printed)
    values = [evaluation.report({}, step) for step in range(1, times + 1)]
    log.close()
    return values, printed.getvalue()


def test_rows_that_cannot_be_used_are_counted_and_named_once(tmp_path):
    values, printed = said_of(tmp_path, (1, 6), 0.25, times=2)
    assert values == [2.0, 2.0]
    assert [record["validation_bad_examples"] for record in read_metrics(tmp_path)] == [2, 2]
    assert printed.count("held-out row 1 (made1) is left out: ") == 1
    assert printed.count("held-out row 6 (made6) is left out: row 6 is refused") == 1
    assert printed.count("validation loss 2.0000") == 2


def test_more_than_allowed_are_warned_of_once_and_make_a_loss_that_is_compared_with_none(tmp_path):
    values, printed = said_of(tmp_path, (1, 3, 6), 0.25, times=2)
    assert values == [None, None]
    assert printed.count("warning: 3 of 8 held-out rows cannot be used, more than config.data.max_bad_fraction=0.25") == 1
    assert printed.count("is left out") == 3
    assert printed.count("validation loss 2.0000") == 2


def checked(bad: tuple[int, ...], allowed: float, starts: bool) -> tuple[Any, str]:
    """What a look at the rows before a run returns or raises, and prints."""
    subject, config = held_out(bad, allowed)
    printed = io.StringIO()
    evaluation = training(subject, config, Path(), MetricsLog(None, 0), printed)
    try:
        evaluation.check(subject.task.source, starts=starts)
    except SourceError as error:
        return error, printed.getvalue()
    return evaluation.named, printed.getvalue()


def test_more_than_allowed_stop_a_start_after_all_were_named():
    error, printed = checked((0, 2, 6), 0.25, starts=True)
    assert isinstance(error, SourceError)
    for part in ("3 of 8 held-out rows cannot be used", "config.data.max_bad_fraction=0.25", "row 6 is refused", "fix them"):
        assert part in str(error)
    assert printed.count("is left out") == 3


def test_they_do_not_stop_a_run_that_goes_on():
    named, printed = checked((0, 2, 6), 0.25, starts=False)
    assert named == {0, 2, 6}
    assert printed.count("is left out") == 3
    assert printed.count("warning: 3 of 8 held-out rows cannot be used") == 1


def test_what_was_named_at_the_start_is_not_named_again(tmp_path):
    subject, config = held_out((1, 6), 0.25)
    printed = io.StringIO()
    evaluation = training(subject, config, tmp_path, MetricsLog(None, 0), printed)
    evaluation.check(subject.task.source, starts=True)
    assert evaluation.named == {6}, "row 1 shows when its image is decoded"
    evaluation.report({}, 1)
    assert printed.getvalue().count("held-out row 6 (made6) is left out") == 1
    assert printed.getvalue().count("held-out row 1 (made1) is left out") == 1


def test_no_supervised_token_is_no_loss(tmp_path):
    values, printed = said_of(tmp_path, tuple(range(8)), 1.0)
    assert values == [None], "a loss of 0 would be kept as the best"
    assert "no validation loss: none of the 8 held-out rows has a supervised token" in printed
    assert read_metrics(tmp_path) == [{"step": 1, "validation_bad_examples": 8}]


def test_a_loss_that_is_not_finite_is_shown_and_compared_with_none(tmp_path):
    values, printed = said_of(tmp_path, (), 0.0, infinite)
    assert values == [None]
    assert "validation loss inf" in printed
    assert math.isinf(read_metrics(tmp_path)[0]["validation_loss"])


@pytest.mark.parametrize(("bad", "loss"), [((1, 6), 2.0), (tuple(range(8)), None)])
def test_the_results_count_every_row_left_out(bad, loss, tmp_path):
    subject, config = held_out(bad, 1.0)
    log = MetricsLog(tmp_path, 0)
    training(subject, config, tmp_path, log, io.StringIO()).finish({}, {"steps": 3})
    log.close()
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["bad_examples"], results["questions"]) == (len(bad), 8 - len(bad))
    assert results.get("validation_loss") == loss
    assert np.isfinite([value for value in results.values() if isinstance(value, float)]).all()


def test_a_run_whose_rows_are_bad_has_results_all_the_same_and_new_ones_once_they_are_mended(tmp_path):
    def end(bad: tuple[int, ...]) -> dict[str, Any]:
        subject, config = held_out(bad, 0.25)
        training(subject, config, tmp_path, MetricsLog(None, 0), io.StringIO()).finish({}, {"steps": 3})
        return json.loads((tmp_path / "results.json").read_text())

    results = end((1, 3, 6))
    assert [(one["row"], one["id"]) for one in results["left_out"]] == [(1, "made1"), (3, "made3"), (6, "made6")]
    assert "row 6 is refused" in results["left_out"][2]["reason"]
    assert (results["bad_examples"], results["questions"], results["validation_loss"]) == (3, 5, 2.0)
    results = end((6,))
    assert (results["bad_examples"], results["questions"]) == (1, 7)
    assert end(())["questions"] == 7, "they are there: as many as are allowed are not a reason to evaluate again"


def test_hard_ids_reach_every_file_and_no_terminal(tmp_path):
    hard = "\ud800\x1b[2J\u2028\0"
    turns = [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "b"}]
    rows = [{"id": f"{hard}1", "conversations": turns}, {"id": f"{hard}2", "image": "gone.png", "conversations": turns}]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    source, printed = open_files(str(tmp_path / "val.json"), str(tmp_path)), io.StringIO()
    config = tiny_config(SETTINGS | {"data.max_bad_fraction": 1.0})
    subject, log = (
        HeldOut(source, config, two_per_token, build_model(config), make_mesh(config.mesh), say_nothing),
        MetricsLog(tmp_path, 0),
    )
    evaluation = training(subject, config, tmp_path, log, printed)
    evaluation.report({}, 1)
    evaluation.finish({}, {"steps": 3})
    log.close()
    lines = (tmp_path / "predictions.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"{hard}1".replace("\ud800", r"\ud800")]
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    shown = r"\ud800\u001b[2J\u2028\u00002"
    assert [one["id"] for one in results["left_out"]] == [shown]
    assert shown in printed.getvalue()
    assert not set("\ud800\x1b\u2028\0") & set(printed.getvalue())
