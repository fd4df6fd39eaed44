"""A run's parameters for those that use them: to the byte, and never those of a damaged checkpoint."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepstack_jax.config import TrainConfig, to_stored
from deepstack_jax.train.checkpoint.manager import Checkpoints
from deepstack_jax.train.checkpoint.reading import CheckpointError
from deepstack_jax.train.checkpoint.restore_params import restore_params
from deepstack_jax.train.core.optimizer import unflatten
from deepstack_jax.train.core.state import new_state
from deepstack_jax.weights.names import NameTable
from tests.unit.tiny import tiny_config

CONFIG = tiny_config({"decoder.vocab_size": 512})  # so that one array is much the largest
SHAPES = {path: leaf.shape for path, leaf in NameTable(CONFIG).leaves.items()}
EMBEDDING = "embed/embedding"


def noise(step: int) -> dict[str, np.ndarray]:
    """Bits that do not compress, so that a changed one in the file is a changed number and no broken archive."""
    rng = np.random.default_rng(step)
    return {path: rng.integers(0, 2**31 - 2**24, shape, dtype=np.uint32).view(np.float32) for path, shape in SHAPES.items()}


def save(workdir: Path, *steps: int, frozen: tuple[str, ...] = ()) -> Path:
    """A run's workdir with these checkpoints, `frozen` parameters in bfloat16."""
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(to_stored(CONFIG)))
    checkpoints = Checkpoints(workdir, TrainConfig(keep=len(steps)))
    groups = {path: "frozen" if path in frozen else "default" for path in SHAPES}
    for step in steps:
        params = unflatten(jax.tree.map(jnp.asarray, noise(step)))
        state = new_state(params, groups, optax.sgd(1e-3), "bfloat16")
        checkpoints.save(state.replace(step=jnp.asarray(step, jnp.int32)), {}, {})
    checkpoints.finish(steps[-1])
    checkpoints.close()
    return workdir


def flip_a_bit(workdir: Path, step: int) -> None:
    """In the middle of the file that holds the arrays."""
    files = [path for path in (workdir / "checkpoints" / str(step) / "state").rglob("d/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def assert_holds(params: dict[str, np.ndarray], step: int) -> None:
    for path, leaf in noise(step).items():
        assert params[path].tobytes() == leaf.tobytes(), path


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("run") / "two", 1, 2)


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_the_newest_parameters_come_to_the_byte(run):
    step, config, params = restore_params(run)
    assert (step, config) == (2, CONFIG)
    assert_holds(params, 2)


def test_a_changed_bit_is_noticed_and_the_one_before_is_taken(run, caplog):
    flip_a_bit(run, 2)
    step, _, params = restore_params(run)
    assert step == 1
    assert_holds(params, 1)
    assert "2 is damaged, trying the one before: step 2: 1 arrays changed: params." in caplog.text


def test_one_error_where_no_checkpoint_is_whole(run):
    for step in (1, 2):
        flip_a_bit(run, step)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read \(step 2: 1 arrays changed.*step 1: 1 arrays"):
        restore_params(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*; train it first"):
        restore_params(run)


def test_what_is_stored_in_bfloat16_is_summed_before_it_is_cast(tmp_path, caplog):
    run = save(tmp_path / "run", 1, frozen=(EMBEDDING,))
    step, _, params = restore_params(run)
    assert (step, caplog.text) == (1, "")
    assert params[EMBEDDING].dtype == np.float32
    np.testing.assert_array_equal(params[EMBEDDING], np.asarray(jnp.asarray(noise(1)[EMBEDDING], jnp.bfloat16), np.float32))


def test_only_what_is_asked_for_is_read_and_compared(run):
    sums = run / "checkpoints" / "2" / "sums" / "metadata"
    values = json.loads(sums.read_text())
    sums.write_text(json.dumps(values | {"params.embed.embedding": values["params.embed.embedding"] ^ 1}))
    step, _, params = restore_params(run, ("projector/",))
    assert step == 2
    assert params.keys() == {path for path in SHAPES if path.startswith("projector/")}
    assert restore_params(run)[0] == 1


def test_a_checkpoint_from_before_there_were_checksums_is_read(run, caplog):
    shutil.rmtree(run / "checkpoints" / "2" / "sums")
    step, _, params = restore_params(run)
    assert (step, caplog.text) == (2, "")
    assert_holds(params, 2)


def test_checksums_that_cannot_be_read_are_damage(run):
    (run / "checkpoints" / "2" / "sums" / "metadata").write_text("{")
    assert restore_params(run)[0] == 1
