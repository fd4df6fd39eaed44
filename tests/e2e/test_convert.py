"""The convert verb from the command line: a run and official folders in, folders that can be read out, mistakes in one line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deepstack_jax.train.checkpoint.restore_params import restore_params
from deepstack_jax.weights.load import load_params, stored_leaves
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from tests.e2e.verb import REPOSITORY, contents, train, verb
from tests.parity.goldens import GOLDEN, write_folder

TINY_RUN = {
    "train.steps": 1,
    "train.batch_size": 2,
    "data.synthetic.questions": 2,
    "data.max_length": 24,
    "evaluation.examples": 1,
    "evaluation.batch_size": 2,
    "evaluation.max_new_tokens": 2,
}


def convert(*flags: str) -> subprocess.CompletedProcess[str]:
    return verb("convert", *flags)


def test_an_official_folder_in_another_dtype_and_in_several_files(tmp_path):
    hf, out = write_folder("phi", tmp_path), tmp_path / "new" / "out"
    for file in (GOLDEN / "tokenizer" / "phi3_rstrip").iterdir():
        (hf / file.name).write_bytes(file.read_bytes())
    done = convert(f"--from={hf}", f"--to={out}", "--dtype=float16", "--max_shard=200KB")
    assert done.returncode == 0, done.stderr
    for shown in ("114 tensors", "official, float16, ", "237,200", "phi3, 6 layers of 48", "crops into decoder, 2d", str(hf)):
        assert shown in done.stdout
    assert json.loads((out / "config.json").read_text()) == json.loads((hf / "config.json").read_text()) | {
        "torch_dtype": "float16"
    }
    tensors = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in load_file(hf / "model.safetensors").items():
        assert tensors[name].tobytes() == tensor.astype(np.float16).tobytes(), name
    assert {"tokenizer.model", "tokenizer_config.json", "added_tokens.json", "clip"} <= {path.name for path in out.iterdir()}
    before = contents(out)
    refused = convert(f"--from={hf}", f"--to={out}")
    assert (refused.returncode, contents(out)) == (1, before)
    assert refused.stderr.splitlines() == [f"error: {out} is not empty; choose another folder, or replace it with --force"]
    assert convert(f"--from={hf}", f"--to={out}", "--force", "--max_shard=1GB").returncode == 0
    assert not (out / "model.safetensors.index.json").exists()


def test_a_training_run_becomes_an_official_folder(tmp_path):
    run = tmp_path / "run"
    trained = train("configs/demo.py", run, TINY_RUN)
    assert trained.returncode == 0, trained.stderr
    done = convert(f"--from={run}", f"--to={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "step 1" in done.stdout
    step, config, params = restore_params(run)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert step == 1
    assert checkpoint.config.deepstack == config.deepstack
    assert checkpoint.config.layout == config.layout
    for path, leaf in stored_leaves(checkpoint.tensors, checkpoint.config).items():
        np.testing.assert_array_equal(leaf[tuple(slice(None) for _ in leaf.shape)], params[path], err_msg=path)
    assert load_params(checkpoint.tensors, checkpoint.config)["embed"]["embedding"].shape == (
        config.decoder.vocab_size,
        config.decoder.width,
    )


def test_force_replaces_an_export_and_nothing_else(tmp_path):
    hf, mine = write_folder("l_2d", tmp_path / "source"), tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("years of work")
    before = contents(tmp_path)
    for target, message in (
        (mine, "is not an export of deepstack_jax"),
        (hf, "overlaps with"),
        (hf.parent, "overlaps with"),
        (REPOSITORY, "is or holds the working directory"),
    ):
        refused = convert(f"--from={hf}", f"--to={target}", "--force")
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1
        assert message in refused.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--from is missing; e.g. --from="),
        (("--from={hf}", "--to={out}", "--dtype=int8"), "--dtype got 'int8', expected float32, bfloat16, float16"),
        (("--from={hf}", "--to={out}", "--format=llava-hf"), "has no llava-hf form, expected LLaVA-1.5"),
        (("--from={hf}nowhere", "--to={out}"), "give a checkpoint folder with its config.json, or a hub id"),
    ],
)
def test_mistakes_are_said_in_one_line_and_nothing_is_written(flags, message, tmp_path):
    hf, out = write_folder("l_2d", tmp_path), tmp_path / "out"
    done = convert(*(flag.format(hf=hf, out=out) for flag in flags))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert {path.name for path in Path(tmp_path).iterdir()} == {"hf", "clip"}


def test_help_has_an_example():
    done = convert("--help")
    assert done.returncode == 0
    assert "python -m deepstack_jax.convert --from=" in done.stdout
