"""A configuration that leaves its sizes to the weights: filled from every form that is read, and held against what is given."""

import dataclasses
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.tiny_recipe import Run, load_recipe, write_weights
from deepstack_jax.config import Config, build_config, config_from_weights, left_open, to_dict, to_stored
from deepstack_jax.errors import ConfigError, WeightsError
from deepstack_jax.families.base import DECODERS
from deepstack_jax.train.checkpoint.fill_config import fill_config
from deepstack_jax.train.checkpoint.init_weights import find_weights
from deepstack_jax.train.core.optimizer import adapt_groups, assign_groups
from deepstack_jax.weights.adapters import is_adapter
from deepstack_jax.weights.load import stored_leaves
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from deepstack_jax.weights.save import save_checkpoint
from tests.parity.goldens import GOLDEN, write_folder

RECIPE = Path(__file__).parents[2] / "configs" / "finetune.py"
CASES = ("l_2d", "v", "hd", "phi", "llava15", "llava_next")
SECTIONS = ("image", "vision", "projector", "decoder", "deepstack")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints with a tokenizer, by golden case."""
    made = {}
    for case in CASES:
        made[case] = write_folder(case, tmp_path_factory.mktemp(case))
        shutil.copytree(
            GOLDEN / "tokenizer" / ("phi3_rstrip" if case == "phi" else "llama_legacy_false"), made[case], dirs_exist_ok=True
        )
    return made


def values(weights: Path | str, argument: str = "lora", **changes: object) -> dict[str, Any]:
    """What the recipe and the flags of a command line give."""
    config = runpy.run_path(str(RECIPE))["get_config"](argument)
    config.train.weights = str(weights)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config.to_dict()


def filled(weights: Path | str, argument: str = "lora", **changes: object) -> Config:
    return build_config(dict(fill_config(values(weights, argument, **changes))))


def a_run(folder: Path, config: Config, step: int = 1) -> Path:
    """A workdir as far as its files are looked at before anything is read."""
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_stored(config)))
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*never used")
def test_all_that_is_left_open_is_as_the_folder_says(folders, case):
    config, stored = filled(folders[case]), open_checkpoint(folders[case])
    for section in SECTIONS:
        assert getattr(config, section) == getattr(stored.config, section)
    assert (config.data.template, config.data.tokenizer) == (stored.template, str(folders[case]))
    assert config.layout.max_tokens < config.data.max_length <= stored.config.data.max_length
    assert find_weights(config).tensors.keys() == stored.tensors.keys()


@pytest.mark.parametrize("argument", ["lora", "full", "projector"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*never used")
def test_every_parameter_has_its_group(folders, case, argument):
    config = filled(folders[case], argument)
    groups, adapted = adapt_groups(assign_groups(list(NameTable(config).leaves), config.optimizer.table), config.optimizer)
    trained = {path for path, group in groups.items() if group != "frozen"}
    whole = {"projector"} | ({"image_newline"} if config.image.newline else set())
    whole |= {"embed", "layers", "head"} if argument == "full" else set()
    assert {path.split("/")[0] for path in trained if not is_adapter(path)} == whole
    kernels = {path for path in groups if path.startswith("layers/") and path.endswith("/kernel")}
    assert set(adapted) == (kernels if argument == "lora" else set())


@pytest.mark.parametrize("case", ["llava15", "llava_next"])
def test_a_folder_of_llava_hf(folders, case, tmp_path):
    official = open_checkpoint(folders[case])
    save_checkpoint(stored_leaves(official.tensors, official.config), official.config, tmp_path / "hf", form="llava-hf")
    config, wanted = filled(tmp_path / "hf", data__tokenizer=str(folders[case])), filled(folders[case])
    rows = wanted.decoder.vocab_size + 1  # one more, for the image
    wanted = dataclasses.replace(wanted, decoder=dataclasses.replace(wanted.decoder, vocab_size=rows))
    assert [getattr(config, name) for name in SECTIONS] == [getattr(wanted, name) for name in SECTIONS]


def test_a_run_serves_as_weights_and_says_all_by_itself(folders, tmp_path):
    config = filled(folders["l_2d"], data__max_length=300, data__template="plain")
    again = filled(a_run(tmp_path / "run", config))
    assert again == dataclasses.replace(config, train=dataclasses.replace(config.train, weights=str(tmp_path / "run")))


def test_a_run_that_has_begun_needs_its_weights_no_more(folders, tmp_path):
    config = filled(folders["l_2d"])
    given: dict[str, Any] = values(folders["l_2d"]) | {"name": "other"}
    given["train"]["weights"] = "gone"
    again = build_config(dict(fill_config(given, a_run(tmp_path / "run", config))))
    assert again == dataclasses.replace(config, name="other", train=dataclasses.replace(config.train, weights="gone"))


def test_a_bare_language_model_takes_the_method_from_the_defaults_and_the_rest_from_its_tower(tmp_path):
    tiny = load_recipe(Run("llava15", "finetune", ""))
    write_weights(tmp_path, tiny)
    pixels = tmp_path / "clip" / "preprocessor_config.json"
    pixels.write_text(json.dumps(json.loads(pixels.read_text()) | {"image_mean": [0.5, 0.5, 0.5], "resample": 2}))
    config = filled(tmp_path / "llm", train__tower=str(tmp_path / "clip"))
    assert (config.vision, config.decoder) == (tiny.vision, tiny.decoder)
    assert (config.image.mode, config.image.size, config.image.mean[0]) == ("deepstack", tiny.image.size, 0.5)
    assert config.image.crop_filter == config.image.global_filter == "bilinear", "which no official folder may say of crops"
    assert config.deepstack == Config().deepstack
    wider = filled(tmp_path / "llm", train__tower=str(tmp_path / "clip"), vision__feature_layer=-1, projector__layers=1)
    assert (wider.vision.feature_layer, wider.projector.layers) == (-1, 1)
    with pytest.raises(
        WeightsError, match=r"is a bare llama: .*; give the vision tower's folder with --config.train.tower=DIR"
    ):
        filled(tmp_path / "llm")


def test_what_is_no_business_of_the_weights_can_be_changed(folders):
    config = filled(folders["llava15"], image__mode="deepstack", deepstack__stack="crops", decoder__remat="none")
    assert (config.image.mode, config.deepstack.stack, config.decoder.remat) == ("deepstack", "crops", "none")
    assert filled(folders["l_2d"], image__num_crops=2).image.num_crops == 2


@pytest.mark.parametrize(
    ("case", "changes", "messages"),
    [
        (
            "l_2d",
            {"image__size": 336, "decoder__rope__theta": 5.0},
            [
                "config.image.size got 336, {} has 28; leave --config.image.size out, and the weights say it",
                "config.decoder.rope.theta got 5.0, {} has 10000.0; leave",
            ],
        ),
        ("l_2d", {"decoder__architecture": "phi3"}, ["config.decoder.architecture got 'phi3', {} has 'llama'; leave"]),
        ("l_2d", {"vision__feature_layer": -1}, ["config.vision.feature_layer got -1, {} has -2; leave"]),
        (
            "llava15",
            {"image__mode": "deepstack"},
            ["config.image.mode got 'deepstack', whose crops {} does not use"],
        ),
        ("llava15", {"train__tower": "org/none/clip"}, ["no folder org/none/clip: hf download none/clip --local-dir"]),
    ],
)
def test_what_contradicts_the_weights_is_named(folders, case, changes, messages):
    with pytest.raises(ConfigError) as caught:
        filled(folders[case], **changes)
    assert len(caught.value.args) == len(messages)
    said = sorted(caught.value.args)
    assert all(line.startswith(wanted.format(folders[case])) for line, wanted in zip(said, sorted(messages), strict=True)), said


def test_a_missing_tower_is_said_with_the_flag_that_names_it(folders, tmp_path):
    shutil.copytree(folders["l_2d"], tmp_path / "alone")
    with pytest.raises(
        WeightsError, match=r"mm_vision_tower is 'clip', which is not a folder here; .* --config\.train\.tower=DIR"
    ):
        filled(tmp_path / "alone")
    tower = str(folders["l_2d"].parent / "clip")
    assert filled(tmp_path / "alone", train__tower=tower).vision == filled(folders["l_2d"]).vision


def test_without_weights_it_says_which_flag_names_them():
    with pytest.raises(ConfigError, match=r"config.train.weights is empty, .*--config.train.weights=DIR"):
        filled("")
    assert fill_config(to_dict(Config())) == to_dict(Config())


def test_keys_of_every_architecture_are_open_and_no_others():
    keys = {tuple(key.split(".")[:2]) for key in left_open(config_from_weights().to_dict())}
    assert {section for section, _ in keys} == {*SECTIONS, "data", "train"}
    for family in DECODERS.values():
        assert {("decoder", field.name) for field in dataclasses.fields(family.section)} <= keys
    assert left_open({"name": None, "data": {"root": None}}) == []


def test_embeddings_that_are_the_head_too_stay_so_or_become_a_head_of_its_own(tmp_path):
    """Of its own in a run that was begun, or is written out, with one."""
    tiny = load_recipe(Run("llava15", "finetune", ""))
    write_weights(tmp_path, tiny)
    file, said = tmp_path / "llm" / "model.safetensors", tmp_path / "llm" / "config.json"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, file)
    said.write_text(json.dumps(json.loads(said.read_text()) | {"tie_word_embeddings": True}))
    run = filled(tmp_path / "llm", train__tower=str(tmp_path / "clip"))
    assert run.decoder.tied_head
    assert "lm_head.weight" not in find_weights(run).tensors
    run = dataclasses.replace(run, decoder=dataclasses.replace(run.decoder, tied_head=False))
    with pytest.warns(UserWarning, match="has its embeddings as head too; here the head is a copy of them"):
        found = find_weights(run).tensors
    assert (found["lm_head.weight"].read() == tensors["model.embed_tokens.weight"]).all()
    save_file(tensors, file)  # a head that says the opposite, as transformers takes it
    with pytest.warns(UserWarning, match="holds a head that differs from its embeddings"):
        assert not filled(tmp_path / "llm", train__tower=str(tmp_path / "clip")).decoder.tied_head
    table = {"lm_head.weight": tensors["model.embed_tokens.weight"]}  # twice the same, or under the other name
    for one in (tensors | table, {name: t for name, t in (tensors | table).items() if name != "model.embed_tokens.weight"}):
        save_file(one, file)
        run = filled(tmp_path / "llm", train__tower=str(tmp_path / "clip"))
        assert run.decoder.tied_head
        assert "lm_head.weight" not in find_weights(run).tensors


def test_a_template_whose_end_of_turn_the_tokenizer_lacks_gives_way_to_one_that_it_has(folders, tmp_path):
    """A LLaMA usually has `v1`, whose turns end with </s>; a tokenizer with <|end|> and without </s> was made for Phi-3's."""
    copied = shutil.copytree(folders["l_2d"], tmp_path / "hf")
    shutil.copytree(GOLDEN / "tokenizer" / "phi3_rstrip", copied, dirs_exist_ok=True)
    tower = {"train__tower": str(folders["l_2d"].parent / "clip")}
    with pytest.warns(UserWarning, match="usually have config.data.template='v1', but </s> is no token of the tokenizer"):
        assert filled(copied, **tower).data.template == "phi3_instruct"
    assert filled(copied, **tower, data__template="mpt").data.template == "mpt"


def test_the_dtype_of_activations_is_left_to_the_device(folders):
    given, kinds = values(folders["l_2d"]), ["float32", "bfloat16"]
    assert [build_config(dict(fill_config(given, dtype=kind))).train.compute_dtype for kind in kinds] == kinds
    assert filled(folders["l_2d"], train__compute_dtype="float32").train.compute_dtype == "float32"
