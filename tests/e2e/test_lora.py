"""A run with adapters from the command line: killed and resumed, its checkpoints small, its export merged."""

import signal
from pathlib import Path

import numpy as np
import pytest

import deepstack_jax as dsx
from tests.e2e.receipts import draw_receipts
from tests.e2e.test_convert import convert
from tests.e2e.verb import assert_same_bytes, read_lines, saved_state, train, train_until
from tests.parity.goldens import write_folder

STEPS = 12
CONFIG = '''
import runpy


def get_config():
    """Adapters over decoder and tower, a projector that trains whole."""
    config = runpy.run_path(FINETUNE)["get_config"]("full")
    config.optimizer.table = TABLE
    config.optimizer.groups = {
        "projector": {"lr": 1e-3},
        "adapters": {"lr": 1e-2, "lora": True},
    }
    config.lora.rank, config.lora.alpha = 2, 4.0
    config.train.weights, config.data.root, config.data.train = WEIGHTS, DATA, "train.json"
    config.data.tokenizer, config.data.max_length, config.data.workers = "bytes", 900, 0
    config.train.steps, config.train.batch_size = STEPS, 3
    config.train.log_every, config.train.checkpoint_every = 1, 2
    config.train.compute_dtype = "float32"
    return config
'''
TABLE = (("^(layers|vision_tower)/.*block/.*kernel$", "adapters"), ("^projector/", "projector"), (".*", "frozen"))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("lora")
    root = draw_receipts(folder / "data", train=6, validation=1)
    weights = write_folder("l_2d", folder / "base")
    finetune = Path(__file__).parents[2] / "configs" / "finetune.py"
    names = {"FINETUNE": str(finetune), "DATA": str(root), "WEIGHTS": str(weights), "STEPS": STEPS, "TABLE": TABLE}
    text = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    (folder / "lora.py").write_text(text + CONFIG)
    return str(folder / "lora.py")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(config, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = train(config, straight, {})
    assert done.returncode == 0, done.stderr
    assert "layers/layers/block/attention/q/kernel" in done.stdout
    code, printed = train_until(f"step 7/{STEPS} ", signal.SIGKILL, config, killed, {})
    assert code == -signal.SIGKILL, printed
    last = train(config, killed, {})
    assert last.returncode == 0, last.stderr
    assert "resumed from step " in last.stdout
    assert_same_bytes(saved_state(killed), saved_state(straight))
    merged = convert(f"--from={killed}", f"--to={tmp_path / 'merged'}")
    assert "logits differ by " in merged.stdout, merged.stderr
    ids = np.array([[1, 5, 7, 9, 11, 4]])
    expected = dsx.load(killed).logits(ids)
    np.testing.assert_allclose(dsx.load(tmp_path / "merged").logits(ids), expected, atol=1e-5 * np.abs(expected).max())
    alone = convert(f"--from={killed}", f"--to={tmp_path / 'adapter'}", "--format=peft")
    assert "adapters of run finetune-full, step 12, peft, 17,312 parameters" in alone.stdout, alone.stderr
    found = dsx.load(dsx.load(killed).config.train.weights, adapter=tmp_path / "adapter").logits(ids)
    np.testing.assert_array_equal(found, expected)
    losses = [line["loss"] for line in read_lines(straight / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    assert [line["loss"] for line in read_lines(killed / "metrics.jsonl") if "loss" in line] == losses
