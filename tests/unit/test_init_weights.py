"""What a run starts from, and what is said where that is not there or does not fit; whole chains: tests/e2e/test_recipes.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny_recipe import Run, load_recipe, write_weights
from deepstack_jax.config import Config, to_stored
from deepstack_jax.data.encode.tokenizer import ByteTokenizer, load_tokenizer
from deepstack_jax.errors import WeightsError, fetch_command
from deepstack_jax.train.checkpoint import init_weights
from deepstack_jax.train.checkpoint.init_weights import find_weights, open_start, run_tensors
from deepstack_jax.train.checkpoint.restore_params import is_workdir
from deepstack_jax.weights.names import NameTable


@pytest.fixture(scope="module")
def tiny() -> Config:
    return load_recipe(Run("llava15", "finetune", ""))


@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder, tiny)
    return folder


def a_run(folder: Path, config: Config, *steps: int) -> str:
    """A workdir as far as its files are looked at before anything is read."""
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_stored(config)))
    return str(folder)


def starting(config: Config, **train: str) -> Config:
    return replace(config, train=replace(config.train, **train))


def test_a_projector_comes_from_stage_1_and_the_rest_from_the_weights(tiny, weights, tmp_path):
    stage1 = a_run(tmp_path / "stage1", load_recipe(Run("llava15", "pretrain", "")), 3)
    folders = {"weights": str(weights / "llm"), "tower": str(weights / "clip")}
    found = open_start(starting(tiny, **folders, projector=stage1))
    assert found.tensors.keys() == NameTable(tiny).tensors.keys()
    from_run = {name for name, tensor in found.tensors.items() if str(tensor.file) == stage1}
    assert from_run == {name for name in found.tensors if ".mm_projector." in name}
    bare = open_start(starting(tiny, **folders, projector=""))
    assert not any(".mm_projector." in name for name in bare.tensors)


def test_image_newline_comes_along_where_both_runs_have_one(weights, tmp_path):
    """From LLaVA-NeXT to HD it does; a baseline has no use for it."""
    runs = {name: load_recipe(Run(name, stage, "")) for name, stage in (("llava_next", "finetune"), ("deepstack_hd", ""))}
    trained = a_run(tmp_path / "next", runs["llava_next"], 6)
    assert "model.image_newline" in run_tensors(trained, ("image_newline",))
    whole = open_start(starting(runs["deepstack_hd"], weights=trained))
    assert whole.tensors.keys() == NameTable(runs["deepstack_hd"]).tensors.keys()
    baseline = load_recipe(Run("llava15_baseline", "finetune", ""))
    assert "model.image_newline" not in open_start(starting(baseline, weights=trained, projector="")).tensors
    folders = {"weights": str(weights / "llm"), "tower": str(weights / "clip")}
    assert "model.image_newline" not in open_start(starting(baseline, **folders, projector=trained)).tensors


def test_a_run_has_the_tokenizer_of_its_config(tiny, tmp_path):
    config = replace(tiny, data=replace(tiny.data, tokenizer="bytes"))
    assert isinstance(load_tokenizer(a_run(tmp_path / "run", config, 1)), ByteTokenizer)


def test_what_is_a_workdir(tiny, weights, tmp_path):
    assert is_workdir(a_run(tmp_path / "run", tiny))
    assert not is_workdir(weights / "llm")
    assert not is_workdir(tmp_path / "nowhere")


def test_what_is_missing_is_said_at_once_with_what_to_fetch(tiny):
    with pytest.raises(WeightsError) as caught:
        open_start(tiny)
    for part in (
        "no folder checkpoints/lmsys/vicuna-7b-v1.5: hf download lmsys/vicuna-7b-v1.5 --local-dir checkpoints/lmsys/vicuna",
        "--config.train.weights=DIR",
        "hf download openai/clip-vit-large-patch14-336",
        "--config.train.tower=DIR",
        "no projector at runs/llava15-7b-pretrain: train stage 1 with --workdir=runs/llava15-7b-pretrain",
        "--config.train.projector=PATH",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_runs_that_cannot_serve(tiny, tmp_path):
    with pytest.raises(WeightsError, match="empty is a run without a checkpoint; let it train until it has one"):
        open_start(starting(tiny, weights=a_run(tmp_path / "empty", tiny), projector=""))
    other = a_run(tmp_path / "other", replace(tiny, decoder=replace(tiny.decoder, width=96)), 1)
    with pytest.raises(WeightsError, match=r"weights are of another model.*decoder\.width is 48, the weights have 96"):
        open_start(starting(tiny, weights=other, projector=""))
    (tmp_path / "other" / "config.json").write_text('{"nme": "x"}')
    with pytest.raises(WeightsError, match=r"config\.json cannot be used: unknown key config\.nme"):
        open_start(starting(tiny, weights=other, projector=""))


def test_a_run_is_told_the_flag_that_it_has(monkeypatch, tiny):
    def no_tower(_):
        raise WeightsError("no tower; give one with --tower=DIR", "other")

    monkeypatch.setattr(init_weights, "open_start", no_tower)
    with pytest.raises(WeightsError) as caught:
        find_weights(tiny)
    assert caught.value.args == ("no tower; give one with --config.train.tower=DIR", "other")


def test_what_to_fetch_is_said_of_names_of_the_hub_only():
    assert fetch_command("checkpoints/lmsys/vicuna") == "hf download lmsys/vicuna --local-dir checkpoints/lmsys/vicuna"
    assert fetch_command("https://host/lmsys/vicuna") == fetch_command("vicuna") == ""
