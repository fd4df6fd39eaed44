"""Saving, restoring, falling back over damage, and the bounds of the quarantine."""

import json

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from deepstack_jax.config import Config, TrainConfig, to_dict
from deepstack_jax.data.encode import BadExample
from deepstack_jax.training.checkpoint import CheckpointError, Checkpoints, check_same_run
from deepstack_jax.training.metrics import MetricsLog, Quarantine, QuarantineError, read_metrics
from deepstack_jax.training.state import new_state
from deepstack_jax.types import TrainState


def state_at(step: int) -> TrainState:
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3) + step}}
    state = new_state(params, {"a/kernel": "default"}, optax.adam(1e-3))
    return state.replace(step=jnp.asarray(step, jnp.int32))


def abstract() -> TrainState:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state_at(0))


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, TrainConfig(keep=2))
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), {"next_batch": step}, to_dict(Config()))
    checkpoints.finish(3)
    yield tmp_path
    checkpoints.close()


def damage(folder):
    """Cut every file of a checkpoint in half."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.quick
def test_the_newest_checkpoint_comes_back_to_the_byte_and_old_ones_go(saved):
    checkpoints = Checkpoints(saved, TrainConfig(keep=2))
    state, data = checkpoints.restore(abstract())
    chex.assert_trees_all_equal(state, state_at(3))
    assert data == {"next_batch": 3}
    assert sorted(int(folder.name) for folder in (saved / "checkpoints").iterdir()) == [2, 3]


def test_a_damaged_newest_checkpoint_falls_back_loudly(saved, caplog):
    damage(saved / "checkpoints" / "3")
    state, data = Checkpoints(saved, TrainConfig(keep=2)).restore(abstract())
    chex.assert_trees_all_equal(state, state_at(2))
    assert data == {"next_batch": 2}
    assert "checkpoint 3 is damaged" in caplog.text


def test_nothing_starts_anew_over_damaged_checkpoints(saved):
    for step in (2, 3):
        damage(saved / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        Checkpoints(saved, TrainConfig(keep=2)).restore(abstract())


def test_no_checkpoint_is_no_error(tmp_path):
    assert Checkpoints(tmp_path, TrainConfig(keep=1)).restore(abstract()) is None


def test_another_configuration_is_refused_and_listed(tmp_path):
    stored = to_dict(Config())
    stored["decoder"]["layers"] = 7
    stored["train"]["log_every"] = 99
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"decoder\.layers: 7 there, 32 now") as caught:
        check_same_run(Config(), tmp_path)
    assert "log_every" not in str(caught.value), "how often to log is no part of what is computed"


def test_the_quarantine_counts_each_example_once_and_stops_past_its_share(tmp_path):
    quarantine = Quarantine(tmp_path, max_fraction=0.01, examples=200)
    first, second, third = (BadExample(index, f"id{index}", f"reason {index}") for index in (5, 9, 11))
    assert quarantine.add((first,)) == 1
    assert quarantine.add((first, second)) == 2
    assert Quarantine(tmp_path, 0.01, 200).add((second,)) == 1, "what was mended since does not count again"
    quarantine.check(quarantine.add(()), seen=16)
    with pytest.raises(QuarantineError, match=r"3 of 200 .* reason 11"):
        quarantine.check(quarantine.add((third,)), seen=24)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["id5", "id9", "id11"]


def test_metrics_past_the_checkpoint_are_dropped_on_resume(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "lo')
    MetricsLog(tmp_path, resume_step=2).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
