"""A folder's own chat template on its way: load and prompts, a run's configuration, exports, and what is warned of."""

import dataclasses
import json
import warnings

import chex
import pytest
from transformers import PreTrainedTokenizerFast

import deepstack_jax as dsx
from benchmarks.tiny_recipe import Run, load_recipe, write_weights
from deepstack_jax.config import build_config, default_config
from deepstack_jax.config.chat_template import with_own_template
from deepstack_jax.data.encode.encoder import Encoder
from deepstack_jax.data.example import Example, Message
from deepstack_jax.errors import ConfigError, WeightsError
from deepstack_jax.generate.options import Options
from deepstack_jax.generate.prompts import Turn
from deepstack_jax.train.checkpoint.fill_config import fill_config
from deepstack_jax.train.checkpoint.reading import CheckpointError
from deepstack_jax.train.run.resume import check_same_run
from tests.parity.goldens import write_folder
from tests.unit.test_chat_template import CHATML, MARKED, PUBLISHED, as_dicts, chatml, write_model
from tests.unit.test_fill_config import a_run, filled, values

SMOL = (PUBLISHED / "smollm2.jinja").read_text()
TURNS = [Message("system", "Be brief."), Message("human", "Hi there"), Message("gpt", "Hello!")]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint whose tokenizer has SmolLM2's template."""
    return write_model(write_folder("l_2d", tmp_path), CHATML, {"eos_token": "<|im_end|>"}, SMOL)


def test_a_model_is_asked_in_its_own_form(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*template")
        lmm = dsx.load(folder)
    assert lmm.template == f"jinja:{SMOL}"
    assert "chat template of the model (sha256" in repr(lmm)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    turns = [Turn(message.role, message.text) for message in TURNS[:2]]
    expected = theirs.apply_chat_template(as_dicts(TURNS[:2]), add_generation_prompt=True, return_dict=False)
    assert lmm.answerer.encode(turns, Options()).ids.tolist() == expected
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    assert lmm.answerer.ends_of(Options()) == (sorted({end, 7, 9}), ())
    merged = lmm.answerer.encode(turns, Options(template="chatml")).ids  # which has no place for a system text
    assert (
        merged.tolist()
        == lmm.answerer.encode([Turn("human", "Be brief.\n\nHi there")], Options(template="chatml")).ids.tolist()
    )


def test_an_export_says_the_template_as_it_was_found(folder, tmp_path):
    lmm = dsx.load(folder)
    lmm.save_hf(tmp_path / "own")
    assert json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())["chat_template"] == SMOL
    assert not (tmp_path / "own" / "chat_template.jinja").exists()
    assert dsx.load(tmp_path / "own").template == lmm.template
    named = dataclasses.replace(
        lmm, config=dataclasses.replace(lmm.config, data=dataclasses.replace(lmm.config.data, template="v1"))
    )
    named.save_hf(tmp_path / "named")
    with pytest.warns(UserWarning, match="taken to be 'v1'"):  # whose end this tokenizer lacks
        assert dsx.load(tmp_path / "named").template == "v1"
    (folder / "chat_template.jinja").write_text(MARKED)  # since the model was loaded
    lmm.save_hf(tmp_path / "kept")
    assert (tmp_path / "kept" / "chat_template.jinja").read_text() == SMOL
    assert dsx.load(tmp_path / "kept").template == lmm.template


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for %}", "the chat template cannot be used: TemplateSyntaxError in line 1.*taken is 'v1'"),
        ("{{ messages[0].there.no }}", "is undefined|has no attribute 'there'"),
        (chatml("{{ message.content + '<|done|>' }}"), r"ends a turn with <\|done\|>, .* it has the end of turn of: chatml"),
        (chatml("{{ message.content }}"), "writes nothing after an answer"),
    ],
)
def test_a_template_that_does_not_go_with_the_folder_is_warned_of(text, said, folder):
    (folder / "chat_template.jinja").write_text(text)
    with pytest.warns(UserWarning, match=said):
        lmm = dsx.load(folder)
    assert lmm.template == ("v1" if "cannot be used" in said or "undefined" in said else f"jinja:{text}")


def test_a_run_takes_the_template_of_its_weights_and_keeps_it(folder, tmp_path):
    config = filled(folder)
    assert config.data.template == f"jinja:{SMOL}"
    assert "chat template of the model" in repr(config)
    example = Example(0, "a", (), tuple(TURNS))
    ids = Encoder(config.data_spec).encode(example).ids.tolist()
    assert ids == PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(as_dicts(TURNS), return_dict=False)
    run = a_run(tmp_path / "run", config)
    (folder / "chat_template.jinja").write_text(MARKED)
    assert build_config(fill_config(values(folder), run)).data.template == config.data.template
    assert filled(folder, data__template="chatml").data.template == "chatml"
    with pytest.raises(
        CheckpointError, match=r"data\.template: 'chat template of the model \(sha256 \w{12}\)' there, 'v1' now"
    ):
        check_same_run(dataclasses.replace(config, data=dataclasses.replace(config.data, template="v1")), run)


def test_a_configuration_may_ask_for_the_template_of_the_tokenizer(folder, tmp_path):
    config = default_config()
    config.data.template, config.data.tokenizer = "model", str(folder)
    found = build_config(with_own_template(config.to_dict()))
    assert found.data.template == f"jinja:{SMOL}"
    run = a_run(tmp_path / "run", found)
    (folder / "chat_template.jinja").write_text(MARKED)
    assert with_own_template(config.to_dict(), run)["data"]["template"] == found.data.template
    config.data.tokenizer = "bytes"
    with pytest.raises(
        ConfigError, match=r"config\.data\.template is 'model', but config\.data\.tokenizer=bytes has no chat template"
    ):
        with_own_template(config.to_dict())


def test_a_bare_language_model_with_a_tower_can_be_asked(tmp_path):
    """By its own template, without an argument; what joins the two is drawn, the same every time."""
    tiny = load_recipe(Run("llava15", "finetune", ""))
    write_weights(tmp_path, tiny)
    for file in (tmp_path / "llm").glob("*token*"):
        file.unlink()
    folder = write_model(tmp_path / "llm", CHATML, {"eos_token": "<|im_end|>"}, SMOL)
    with pytest.raises(WeightsError, match="is a bare llama"):
        dsx.load(folder)
    with pytest.warns(UserWarning, match="what joins it to the tower is drawn, and has to be trained"):
        lmm = dsx.load(folder, tower=tmp_path / "clip")
    assert lmm.template == f"jinja:{SMOL}"
    assert lmm.config.vision == tiny.vision
    with pytest.warns(UserWarning, match="what joins it to the tower is drawn"):
        again = dsx.load(folder, tower=tmp_path / "clip")
    chex.assert_trees_all_equal(lmm.params, again.params)
