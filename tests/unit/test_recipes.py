"""The recipes: every one builds, covers every parameter, holds the paper's numbers, and `tiny` changes sizes and data alone."""

import runpy
from itertools import product
from pathlib import Path

import jax
import pytest
from flax import linen as nn

from deepstack_jax.batch import empty_batch
from deepstack_jax.config import Config, build_config, differences, to_dict
from deepstack_jax.data.open import open_source
from deepstack_jax.errors import ConfigError
from deepstack_jax.families.build import build_model
from deepstack_jax.train.checkpoint.init_weights import find_weights
from deepstack_jax.train.core.optimizer import assign_groups, describe_groups, flatten
from deepstack_jax.weights.names import NameTable
from tests.unit.tiny import decoder_schedule, tower_schedule

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = ("pretrain", "finetune")
PHI3 = ("deepstack", "encoder", "baseline", "dummy", "sampling1d", "samplinggrid", "letterbox", "string")
WORDS = {
    "llava15": [",".join(words) for words in product(STAGES, ("7b", "13b", "phi3"))],
    "llava15_baseline": [",".join(words) for words in product(STAGES, ("7b", "13b", "phi3"))],
    "deepstack_v": [",".join(words) for words in product(STAGES, ("7b", "13b", "phi3"))],
    "deepstack_hd": [",".join(words) for words in product(("7b", "13b"), ("next", "llava15"), ("rebuilt", "published"))],
    "llava_next": [",".join(words) for words in product(STAGES, ("7b", "13b"))],
    "phi3": [",".join(words) for words in product(STAGES, PHI3)],
}
ALL = [(name, words) for name, listed in WORDS.items() for words in listed]
# What `tiny` may change, and nothing else.
SIZES = ("image.size", "image.pinpoints", "vision.", "decoder.", "deepstack.vision_start")
DATA = ("data.max_length", "data.workers", "data.sets.", "train.batch_size")


def recipe(name: str, words: str = "") -> Config:
    return build_config(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](words))


@pytest.mark.parametrize(("name", "words"), ALL)
@pytest.mark.filterwarnings("error")
def test_every_recipe_builds_and_its_table_covers_every_parameter(name, words):
    config = recipe(name, words)
    leaves = NameTable(config).leaves
    groups = assign_groups(list(leaves), config.optimizer.table)
    trained = {path.split("/")[0] for path, group in groups.items() if group != "frozen"}
    tuned = name in ("deepstack_v", "deepstack_hd", "llava_next") or "encoder" in words
    language = {"embed", "head", "layers", "projector"} | ({"image_newline"} if config.image.newline else set())
    assert trained == ({"projector"} if "pretrain" in words else language | ({"vision_tower"} if tuned else set()))
    rates = {group: config.optimizer.groups[group].lr for group in set(groups.values()) - {"frozen"}}
    stage2 = {"language": 2e-5} | ({"vision": 2e-6} if tuned else {}) | ({"newline": 2e-5} if config.image.newline else {})
    assert rates == ({"projector": 1e-3} if "pretrain" in words else stage2)
    optimizer = config.optimizer
    assert (optimizer.schedule.kind, optimizer.schedule.warmup, optimizer.schedule.final) == ("cosine", 0.03, 0.0)
    assert optimizer.clip_norm == 1.0
    assert all((group.algorithm, group.weight_decay) == ("adamw", 0.0) for group in optimizer.groups.values())
    assert (config.train.batch_size, config.train.epochs) == (256 if "pretrain" in words else 128, 1.0)
    template = "plain" if "pretrain" in words else "phi3_instruct" if "phi3" in words or name == "phi3" else "v1"
    assert config.data.template == template


@pytest.mark.parametrize(("name", "words"), ALL)
def test_tiny_changes_sizes_and_data_and_nothing_else(name, words):
    full, tiny = recipe(name, words), recipe(name, f"{words},tiny")
    changed = differences(tiny, to_dict(full))
    assert not [key for key in changed if not key.startswith(SIZES + DATA)]
    assert {"vision.layers", "decoder.width", "decoder.layers", "data.max_length", "train.batch_size"} <= changed.keys()
    assert not [key for key in changed if key.startswith(("vision.feature", "decoder.arch"))]
    assert tiny.layout.grids == full.layout.grids
    assert (tiny.layout.groups, tiny.image.newline, tiny.layout.max_views) == (
        full.layout.groups,
        full.image.newline,
        full.layout.max_views,
    )
    assert [group for group in decoder_schedule(tiny) if group >= 0] == [
        group for group in decoder_schedule(full) if group >= 0
    ]
    assert decoder_schedule(tiny)[:5] == decoder_schedule(full)[:5]
    assert tower_schedule(tiny)[-4:] == tower_schedule(full)[-4:]


@pytest.mark.parametrize("name", WORDS)
def test_the_full_size_model_has_the_parameters_of_the_table(name):
    config = recipe(name, WORDS[name][-1])
    batch = empty_batch(config.data_spec.batch_shape(1, config.data.max_length))
    shapes = nn.unbox(jax.eval_shape(build_model(config).init, jax.random.key(0), batch)["params"])
    flat = flatten(shapes)
    assert {path: leaf.shape for path, leaf in flat.items()} == {p: leaf.shape for p, leaf in NameTable(config).leaves.items()}
    sizes = {path: leaf.size for path, leaf in flat.items()}
    rows = describe_groups(config.optimizer, assign_groups(list(sizes), config.optimizer.table), sizes)
    assert sum(row[-1] for row in rows) == sum(sizes.values())
    tower = next(row for row in rows if row[0] in ("vision", "frozen"))
    assert tower[-1] >= 303_507_456


def test_the_numbers_of_the_method():
    deepstack, v, hd = recipe("llava15"), recipe("deepstack_v"), recipe("deepstack_hd")
    assert decoder_schedule(deepstack) == (-1, 0, 1, 2, 3) + (-1,) * 27
    assert (deepstack.data.max_length, hd.data.max_length) == (2048, 4096)
    assert tower_schedule(v) == (-1,) * 20 + (0, 1, 2, 3)
    assert set(decoder_schedule(v)) == {-1}
    assert (hd.layout.max_tokens, hd.layout.max_views, hd.data_spec.crop_slots) == (2976, 25, 25)
    assert [recipe(name, words).image.mode for name in ("llava15", "llava15_baseline", "llava_next") for words in STAGES] == [
        *("deepstack", "deepstack", "square", "pad", "square", "anyres")
    ]
    assert sum(entry.paper or entry.rows for entry in hd.data.sets.values()) == 747_000


def test_flags_move_weights_and_tokenizer_together_or_apart():
    source = runpy.run_path(str(CONFIGS / "llava15.py"))["get_config"]("finetune")
    source.train.weights = "elsewhere"
    assert build_config(source).data.tokenizer == "elsewhere"
    source.data.tokenizer = "bytes"
    assert (build_config(source).train.weights, build_config(source).data.tokenizer) == ("elsewhere", "bytes")


@pytest.mark.parametrize(("name", "words"), [(name, listed[at]) for name, listed in WORDS.items() for at in (0, -1)])
def test_what_is_missing_is_said_with_its_command_and_its_flag(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = recipe(name, words)
    said = {}
    for part, opener in (("data", lambda: open_source(config.data, "train")), ("weights", lambda: find_weights(config))):
        with pytest.raises(ConfigError) as caught:
            opener()
        said[part] = str(caught.value)
        assert "\n" not in said[part]
    assert "--config.data.root=DIR" in said["data"]
    for entry in config.data.sets.values():
        assert f"/{entry.file}" in said["data"]
        assert entry.file_from.replace("$ROOT", ".") in said["data"]
    assert f"hf download {config.train.weights.removeprefix('checkpoints/')} --local-dir" in said["weights"]
    assert "--config.train.weights=DIR" in said["weights"]
    assert ("--config.train.tower=DIR" in said["weights"]) == bool(config.train.tower)
    assert ("--config.train.projector=PATH" in said["weights"]) == bool(config.train.projector)


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("words", ["pretrian", "7b,7b", "7B", "tiny,tiny"])
def test_a_bad_argument_is_said_with_the_valid_ones(name, words):
    with pytest.raises(ValueError, match=rf"configs/{name}\.py:.*at most one of each kind.*and tiny$") as caught:
        recipe(name, words)
    first = next(iter(WORDS[name][0].split(",")))
    assert first in str(caught.value)
    assert "\n" not in str(caught.value)
