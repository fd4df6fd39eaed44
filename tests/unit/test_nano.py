"""The recipes for one card: words go together, the tables cover every parameter, sizes are the published ones."""

import runpy
from itertools import product
from pathlib import Path

import pytest

from deepstack_jax.config import Config, build_config, differences, to_dict
from deepstack_jax.config.chat_template import with_own_template
from deepstack_jax.errors import ConfigError
from deepstack_jax.train.checkpoint.init_weights import find_weights
from deepstack_jax.train.core.optimizer import adapt_groups, assign_groups
from deepstack_jax.weights.names import NameTable
from tests.unit.tiny import decoder_schedule, tower_schedule

FILE = Path(__file__).parents[2] / "configs" / "nano.py"
RECIPE = runpy.run_path(str(FILE))
MODELS, TOWERS, FORMS = (tuple(RECIPE[name]) for name in ("MODELS", "TOWERS", "FORMS"))
# Published numbers of parameters, of the language model and of the tower with all of its layers.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
}


def recipe(*words: str) -> Config:
    return build_config(RECIPE["get_config"](",".join(words)))


def sizes(config: Config, *beginnings: str) -> int:
    """Parameters under these beginnings of their paths."""
    total = 0
    for path, leaf in NameTable(config).leaves.items():
        if path.startswith(beginnings):
            count = 1
            for side in leaf.shape:
                count *= side
            total += count
    return total


@pytest.mark.parametrize(("stage", "form"), list(product(("finetune", "lora", "pretrain"), FORMS)))
@pytest.mark.filterwarnings("error")
def test_every_word_goes_with_every_other(stage, form):
    for number, model in enumerate(MODELS):
        tower = TOWERS[number % len(TOWERS)]  # each with every stage and form, the two not in all pairs
        for words in ((stage, form, model, tower), (stage, form, model, tower, "tiny")):
            config = recipe(*words)
            groups = assign_groups(list(NameTable(config).leaves), config.optimizer.table)
            groups, adapted = adapt_groups(groups, config.optimizer)
            trained = {path.split("/")[0] for path, group in groups.items() if group != "frozen"}
            mergers = {f"deepstack_mergers_{number}" for number in range(3)} if form == "taps" else set()
            language = {"layers"} if stage == "lora" else {"embed", "layers"}
            tuned = {"vision_tower"} if (stage, form) == ("finetune", "v") else set()
            assert trained == {"projector"} | mergers | (set() if stage == "pretrain" else language | tuned), words
            assert bool(adapted) == (stage == "lora")
            assert len(decoder_schedule(config)) == config.decoder.layers


@pytest.mark.parametrize("model", MODELS)
def test_language_models_have_the_published_parameters(model):
    config = recipe(model, "clip-l")
    assert sizes(config, "embed/", "layers/", "head/") == PARAMETERS[model]


def test_towers_and_what_is_injected():
    views = {"siglip2-b16-256": 256, "siglip2-so400m-384": 576, "clip-l": 576}
    for tower in TOWERS:
        crops, v, taps, baseline = (recipe(tower, form) for form in FORMS)
        assert {config.layout.max_tokens for config in (crops, v, taps, baseline)} == {views[tower]}
        assert [config.layout.max_views for config in (crops, v, taps, baseline)] == [5, 5, 1, 1]
        assert decoder_schedule(crops)[:6] == (-1, 0, 1, 2, 3, -1)
        assert decoder_schedule(taps)[:5] == (-1, 0, 1, 2, -1)
        assert {*decoder_schedule(v), *decoder_schedule(baseline)} == {-1}
        assert [group for group in tower_schedule(v) if group >= 0] == [0, 1, 2, 3]
        assert not {state for state, _ in taps.deepstack.taps} & {taps.vision.layers_run}
        assert taps.deepstack.tower_layers(taps.vision) <= taps.vision.layers_run


def test_tiny_changes_sizes_and_data_and_nothing_else():
    sizes = ("image.size", "vision.", "decoder.", "deepstack.vision_start", "deepstack.taps", "data.max_length", "data.workers")
    sizes += ("data.packing.max_images",)
    for tower, form in product(TOWERS, FORMS):
        changed = differences(recipe(tower, form, "tiny"), to_dict(recipe(tower, form)))
        assert not [k for k in changed if not k.startswith((*sizes, "data.sets.", "train.batch_size", "train.accumulation"))]
        assert not {"vision.architecture", "vision.feature_layer", "decoder.architecture", "decoder.tied_head"} & changed.keys()


def test_a_bad_word_is_said_with_the_valid_ones():
    for words in ("smollm", "v,taps", "tiny,tiny"):
        with pytest.raises(ValueError, match=r"configs/nano\.py:.*at most one of each kind.*smollm2-135m.*and tiny$"):
            recipe(words)


def test_weights_that_are_still_to_be_fetched_are_said_before_their_template(tmp_path, monkeypatch):
    """And a plan needs neither: the configuration is built."""
    monkeypatch.chdir(tmp_path)
    values = with_own_template(to_dict(recipe("clip-l")))
    assert values["data"]["template"] == "model"
    with pytest.raises(ConfigError, match="hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir"):
        find_weights(build_config(values))
