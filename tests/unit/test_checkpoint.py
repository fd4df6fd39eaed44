"""Saving, restoring, falling back over damage, and the bounds of the quarantine."""

import json
import resource
import subprocess
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from deepstack_jax.config import Config, TrainConfig, to_dict
from deepstack_jax.data.example import BadExample
from deepstack_jax.train.checkpoint.checksums import _sum, checksums, checksums_on_disk
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.checkpoint.reading import CheckpointError
from deepstack_jax.train.core.state import new_state
from deepstack_jax.train.run.metrics import MetricsLog, Quarantine, QuarantineError, read_metrics
from deepstack_jax.train.run.replay import write_bundle
from deepstack_jax.train.run.resume import check_disk_space, check_same_run
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


def test_a_changed_number_is_found_though_every_file_can_be_read(saved, caplog):
    """Arrays without a check of their own: here the sum that was made before saving is changed, as a flipped bit would."""
    sums = saved / "checkpoints" / "3" / "sums" / "metadata"
    values = json.loads(sums.read_text())
    sums.write_text(json.dumps(values | {"params.a.kernel": values["params.a.kernel"] ^ 1}))
    state, _ = Checkpoints(saved, TrainConfig(keep=2)).restore(abstract())
    chex.assert_trees_all_equal(state, state_at(2))
    assert "1 arrays changed: params.a.kernel" in caplog.text


def test_a_damaged_checkpoint_is_put_aside_so_that_its_step_can_be_saved_again(saved):
    damage(saved / "checkpoints" / "3")
    again = Checkpoints(saved, TrainConfig(keep=2))
    again.restore(abstract())
    assert [path.name.split("-")[0] for path in (saved / "damaged").iterdir()] == ["3"]
    again.save(state_at(3), {"next_batch": 3}, {})
    again.finish(3)
    again.close()
    state, _ = Checkpoints(saved, TrainConfig(keep=2)).restore(abstract())
    chex.assert_trees_all_equal(state, state_at(3))


def test_who_only_reads_removes_nothing(saved):
    writing = saved / "checkpoints" / "4.orbax-checkpoint-tmp"
    writing.mkdir()
    damage(saved / "checkpoints" / "3")
    reader = Checkpoints(saved, TrainConfig(keep=2), read_only=True)
    state, _ = reader.restore(abstract())
    reader.close()
    chex.assert_trees_all_equal(state, state_at(2))
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["2", "3", writing.name]


def test_who_only_reads_needs_no_checkpoint(tmp_path):
    reader = Checkpoints(tmp_path, TrainConfig(), read_only=True)
    assert reader.restore(abstract()) is None
    assert list(tmp_path.iterdir()) == []


def steps_in(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())


def test_the_newest_every_nth_the_best_and_what_a_replay_needs_stay(tmp_path):
    write_bundle(tmp_path, 8, [1, 2], 7, {"loss": float("nan"), "grad_norm": 1.0})
    checkpoints = Checkpoints(tmp_path, TrainConfig(keep=2, keep_every=5, keep_best=1))
    losses = {3: 0.9, 6: 0.2, 9: 0.5}
    for step in range(1, 13):
        checkpoints.save(state_at(step), {}, {}, losses.get(step))
    checkpoints.finish(12)
    assert steps_in(tmp_path) == [5, 6, 7, 10, 11, 12]
    checkpoints.close()
    later = Checkpoints(tmp_path, TrainConfig(keep=1, keep_best=1))  # losses are known of what an earlier attempt saved
    later.save(state_at(13), {}, {}, 0.4)
    later.finish(13)
    assert steps_in(tmp_path) == [6, 7, 13]
    later.close()


def test_no_checkpoint_goes_before_a_newer_one_was_read_back(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path, TrainConfig(keep=1))
    checkpoints.save(state_at(1), {}, {})
    checkpoints.settle()

    def lose_an_array(folder):
        sums = checksums_on_disk(folder)
        del sums["params.a.kernel"]
        return sums

    monkeypatch.setattr("deepstack_jax.train.checkpoint.manager.checksums_on_disk", lose_an_array)
    checkpoints.save(state_at(2), {}, {})
    with pytest.raises(CheckpointError, match=r"state of step 2 could not be saved .* newest good checkpoint is step 1"):
        checkpoints.finish(2)
    assert "checkpoint 2 could not be written (1 arrays missing: params.a.kernel" in caplog.text
    assert steps_in(tmp_path) == [1]
    monkeypatch.undo()
    checkpoints.save(state_at(3), {}, {})
    checkpoints.finish(3)
    assert steps_in(tmp_path) == [3]
    checkpoints.close()


@pytest.mark.parametrize("good", [True, False])
def test_a_save_does_not_wait_until_the_one_before_was_read_back(good, tmp_path, monkeypatch, caplog):
    """And nothing goes until then, nor goes the new one with an old one that turns out to be damaged."""
    checkpoints = Checkpoints(tmp_path, TrainConfig(keep=1))
    checkpoints.save(state_at(1), {}, {})
    checkpoints.settle()
    there = []

    def read_slowly(folder):
        deadline = time.monotonic() + 20
        while not (tmp_path / "checkpoints" / "20").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        there.append(steps_in(tmp_path))
        return checksums_on_disk(folder) if good or folder.parent.name != "2" else {}

    monkeypatch.setattr("deepstack_jax.train.checkpoint.manager.checksums_on_disk", read_slowly)
    checkpoints.save(state_at(2), {}, {})
    checkpoints.save(state_at(20), {"next_batch": 20}, {})
    checkpoints.finish(20)
    assert there[0] == [1, 2, 20]
    assert steps_in(tmp_path) == [20]
    assert ("checkpoint 2 could not be written" in caplog.text) is not good
    checkpoints.save(state_at(21), {}, {})
    checkpoints.finish(21)
    checkpoints.close()
    assert Checkpoints(tmp_path, TrainConfig(keep=1)).latest == 21


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for one checkpoint of 4 MB and not for two."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", tmp_path], check=False, capture_output=True
    ).returncode:
        pytest.skip("a disk that fills needs the right to mount one")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_stops_no_training_and_costs_no_good_checkpoint(small_disk, caplog):
    noise = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)  # nothing that compresses

    def large(step):
        params = {"a": {"kernel": jax.lax.bitcast_convert_type(jnp.asarray(noise + step), jnp.float32)}}
        return new_state(params, {"a/kernel": "default"}, optax.sgd(1e-3)).replace(step=jnp.asarray(step, jnp.int32))

    checkpoints = Checkpoints(small_disk, TrainConfig(keep=1))
    for step in (1, 2):
        checkpoints.save(large(step), {"next_batch": step}, {})
    checkpoints.settle()
    assert checkpoints.latest == 1
    assert "checkpoint 2 could not be written" in caplog.text
    assert "newest good one is step 1; training goes on" in caplog.text
    checkpoints.save(large(3), {}, {})
    with pytest.raises(CheckpointError, match=r"step 3 could not be saved .* step 1: make room and run the same command again"):
        checkpoints.finish(3)
    assert steps_in(small_disk) == [1], "what a failed save leaves is taken away, it fills the disk"
    checkpoints.close()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), large(0))
    state, data = Checkpoints(small_disk, TrainConfig(keep=1)).restore(wanted)
    assert (int(state.step), data) == (1, {"next_batch": 1})


def megabytes(count):
    return {"a": jax.ShapeDtypeStruct((count * 2**18,), jnp.float32)}


def test_room_is_looked_at_before_anything_is_computed(small_disk):
    train = TrainConfig(keep=2, checkpoint_every=10)
    assert check_disk_space(small_disk, megabytes(1), train, 100) is None
    warning = check_disk_space(small_disk, megabytes(3), train, 100)
    assert "a checkpoint takes 3.1 MB" in warning
    assert "is to hold 3, of which 0 are there" in warning
    with pytest.raises(CheckpointError, match=r"takes 8\.4 MB, .* has 6.* MB free; make room or choose another --workdir"):
        check_disk_space(small_disk, megabytes(8), train, 100)


@pytest.mark.parametrize(
    ("options", "steps", "most"),
    [
        ({"keep": 1}, 100, 2),
        ({"keep": 4}, 100, 5),
        ({"keep": 2, "keep_best": 3}, 100, 6),
        ({"keep": 1, "keep_every": 20}, 100, 7),
        ({"keep": 4}, 10, 2),  # it saves once
    ],
)
def test_the_room_is_that_of_the_checkpoints_that_will_be_there(options, steps, most, small_disk):
    size = min(5, 6 // most + 1)  # so many do not fit, one does
    train = TrainConfig(checkpoint_every=10, **options)
    assert f"is to hold {most}, " in check_disk_space(small_disk, megabytes(size), train, steps)


def test_a_run_that_goes_on_is_not_refused_for_want_of_room(small_disk):
    """What is there needs no room any more, and a run that is done saves nothing."""
    train = TrainConfig(keep=1, checkpoint_every=10)
    (small_disk / "checkpoints" / "90").mkdir(parents=True)
    assert check_disk_space(small_disk, megabytes(4), train, 100) is None
    assert "is to hold 2, of which 1 are there" in check_disk_space(small_disk, megabytes(8), train, 100)
    (small_disk / "checkpoints" / "100").mkdir()
    assert check_disk_space(small_disk, megabytes(8), train, 100) is None


def test_weights_of_another_model_are_all_named(saved):
    other = abstract()
    kernel = other.params["a"]["kernel"]
    wrong = other.replace(
        params={"a": {"kernel": jax.ShapeDtypeStruct((2, 4), kernel.dtype), "bias": kernel}},
        step=jax.ShapeDtypeStruct((), jnp.float32),
    )
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(saved, TrainConfig(keep=2)).restore(wrong)
    for part in (
        "3 arrays of checkpoint 3",
        "params.a.bias is missing",
        "params.a.kernel has the shape (2, 3), expected (2, 4)",
        "step is int32, expected float32",
        "choose a new --workdir",
    ):
        assert part in str(caught.value)
    assert steps_in(saved) == [2, 3], "it is whole: it is not put aside"


@given(st.integers(0, 2**31), st.sampled_from(["float32", "bfloat16", "int32"]), st.lists(st.integers(1, 5), max_size=3))
@settings(deadline=None, max_examples=20)
def test_checksums_on_the_device_and_on_disk_agree_and_every_bit_counts(seed, dtype, shape):
    bits = np.random.default_rng(seed).integers(0, 2**16, shape, dtype=np.uint16)
    array = jnp.asarray(bits).astype(dtype)
    assert checksums({"a": array})["a"] == _sum(np.asarray(array))
    flipped = np.asarray(array).copy().reshape(-1).view(f"u{array.dtype.itemsize}")
    flipped[seed % flipped.size] ^= 1 << (seed % (8 * array.dtype.itemsize))
    assert _sum(flipped.reshape(shape)) != _sum(np.asarray(array))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64,), (8, 256), (4, 16, 32)])
def test_checksums_see_the_order_of_what_an_array_holds(shape, dtype, monkeypatch, tmp_path):
    """Rows, and halves of a row, that changed places; of float32 also such as hold bfloat16 values, whose low bits are zero."""
    array = np.random.default_rng(0).normal(size=shape).astype("bfloat16").astype(dtype)
    rows = array.reshape(shape[0], -1)
    half = rows.shape[1] // 2
    swapped = [rows[::-1], np.concatenate([rows[shape[0] // 2 :], rows[: shape[0] // 2]])]
    swapped += [np.concatenate([rows[:, half:], rows[:, :half]], axis=1)] if half else []
    for other in swapped:
        assert checksums({"a": jnp.asarray(other.reshape(shape))}) != checksums({"a": jnp.asarray(array)})
        assert checksums({"a": other.reshape(shape)}, 1) == checksums({"a": array}, 1), "the sum of bits alone does not"
    spread = jax.device_put(array, NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec("x")))
    assert checksums({"a": spread}) == checksums({"a": jnp.asarray(array)})
    monkeypatch.setattr("deepstack_jax.train.checkpoint.checksums._READ_AT_ONCE", array.nbytes // shape[0])  # a row at a time
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "state", {"a": jnp.asarray(array)})
    assert checksums_on_disk(tmp_path / "state") == checksums({"a": jnp.asarray(array)})


def test_a_checkpoint_with_sums_of_bits_alone_is_compared_by_them(tmp_path):
    """As they were written before an element's place counted."""
    checkpoints = Checkpoints(tmp_path, TrainConfig(keep=1))
    checkpoints.save(state_at(1), {"next_batch": 1}, {})
    checkpoints.finish(1)
    checkpoints.close()
    file = tmp_path / "checkpoints" / "1" / "sums" / "metadata"
    old = checksums(state_at(1), 1)
    assert old == checksums_on_disk(file.parents[1] / "state", 1)
    file.write_text(json.dumps(old))
    assert Checkpoints(tmp_path, TrainConfig(keep=1), read_only=True).restore(abstract())[1] == {"next_batch": 1}
    file.write_text(json.dumps(old | {"params.a.kernel": old["params.a.kernel"] ^ 1}))
    with pytest.raises(CheckpointError, match=r"1 arrays changed: params\.a\.kernel"):
        Checkpoints(tmp_path, TrainConfig(keep=1), read_only=True).restore(abstract())


def test_no_checkpoint_is_no_error(tmp_path):
    assert Checkpoints(tmp_path, TrainConfig(keep=1)).restore(abstract()) is None


def test_another_configuration_is_refused_and_listed(tmp_path):
    stored = to_dict(Config())
    stored["decoder"]["layers"] = 7
    stored["train"]["log_every"] = 99
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"decoder\.layers: 7 there, 32 now") as caught:
        check_same_run(Config(), tmp_path)
    assert "log_every" not in str(caught.value), "how often to log is not part of what is computed"


def test_harmless_differences_are_listed_and_accepted(tmp_path):
    stored = to_dict(Config())
    changed = {
        "train": ("log_every", 99, 10),
        "mesh": ("fsdp", 8, 1),
        "data": ("max_bad_fraction", 0.5, 0.01),
    }
    for part, (key, theirs, _) in changed.items():
        stored[part][key] = theirs
    stored["train"] |= {"weights": "old", "tower": "old", "projector": "old"}
    stored["name"] = "first"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    expected = {f"{part}.{key}: {theirs!r} there, {ours!r} now" for part, (key, theirs, ours) in changed.items()}
    expected |= {f"train.{key}: 'old' there, '' now" for key in ("weights", "tower", "projector")}
    assert {*check_same_run(Config(), tmp_path)} == expected | {"name: 'first' there, 'deepstack' now"}


def test_a_damaged_config_is_one_line_that_says_how_to_go_on(tmp_path):
    for left in (b"", b'{"name": "deep', b"\0\xff"):
        (tmp_path / "config.json").write_bytes(left)
        with pytest.raises(CheckpointError, match=r"config\.json is damaged \(.*delete the file and run the same"):
            check_same_run(Config(), tmp_path)


def test_a_damaged_bundle_ends_no_run_and_a_whole_one_keeps_its_checkpoint(tmp_path):
    (tmp_path / "replay").mkdir()
    for step, left in enumerate(("", "[]", "{}", json.dumps({"checkpoint": 1}))):
        (tmp_path / "replay" / f"step-{step}.json").write_text(left)
    checkpoints = Checkpoints(tmp_path, TrainConfig(keep=1))
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), {}, {})
    checkpoints.finish(3)
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 3]


def test_a_failed_save_takes_away_what_is_its_own_alone(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, TrainConfig())
    for name in ("1.mine", "1.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    monkeypatch.setattr("deepstack_jax.train.checkpoint.manager.checksums_on_disk", lambda _: {})
    checkpoints.save(state_at(1), {}, {})
    checkpoints.close()
    checkpoints.settle()
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["1.mine"]
    checkpoints.close()


def test_a_save_that_fails_while_a_run_ends_hides_no_other_error(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, TrainConfig())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # what a full disk does to a write
    try:
        checkpoints.save(state_at(1), {}, {})
        checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "could not be written" in caplog.text


def test_the_quarantine_counts_each_example_once_and_stops_past_its_share(tmp_path):
    quarantine = Quarantine(tmp_path, max_fraction=0.01, examples=200)
    first, second, third = (BadExample(index, f"id{index}", f"reason {index}") for index in (5, 9, 11))
    assert quarantine.add((first,)) == 1
    assert quarantine.add((first, second)) == 2
    assert Quarantine(tmp_path, 0.01, 200).add((second,)) == 1, "what was fixed since does not count again"
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
