"""config.json of a workdir: what an earlier release wrote is read, and what may change when a run goes on."""

import json
import warnings
from dataclasses import dataclass
from typing import Annotated

import pytest

from deepstack_jax.config import (
    LENGTH,
    MAY_CHANGE,
    SAME_EXAMPLES,
    Config,
    DecoderConfig,
    build_config,
    default_config,
    differences,
    from_stored,
    on_resume,
    register_section,
    to_stored,
    upgrade,
)
from deepstack_jax.config.fields import positive
from deepstack_jax.config.schema import SECTIONS
from deepstack_jax.errors import ConfigError
from tests.unit.tiny import tiny_config

pytestmark = pytest.mark.quick


def test_what_is_written_is_read():
    config = tiny_config({"data.buckets": (24, 28)})
    stored = json.loads(json.dumps(to_stored(config)))
    assert stored["schema"] == upgrade.SCHEMA
    assert from_stored(stored) == config
    assert differences(config, stored) == {}


def test_a_file_without_a_number_is_of_the_first_release_and_what_it_lacks_has_its_default():
    stored = json.loads(json.dumps(to_stored(tiny_config())))
    del stored["schema"], stored["vision"]["architecture"], stored["train"]["keep_best"]
    assert from_stored(stored) == tiny_config()
    assert differences(tiny_config(), stored) == {}


@pytest.mark.parametrize("schema", [upgrade.SCHEMA + 1, -1, "1", None])
def test_a_later_schema_is_refused(schema):
    with pytest.raises(ConfigError, match=r"config\.json has schema .*, this release knows 0 to \d+; read it with the release"):
        from_stored({"schema": schema})


def test_a_renamed_key_keeps_its_value_and_a_removed_one_is_named(monkeypatch):
    monkeypatch.setattr(upgrade, "RENAMED", {0: {"train.save_every": "train.checkpoint_every", "towers": "mesh"}})
    monkeypatch.setattr(upgrade, "REMOVED", {0: {"train.magic": "it did nothing", "decoder.a.b": "never there"}})
    old = {"train": {"save_every": 7, "magic": True}, "decoder": {"a": 1}}
    with pytest.warns(UserWarning, match=r"config\.json has train\.magic True, which is no longer there: it did nothing"):
        assert upgrade.upgrade(old) == {"train": {"checkpoint_every": 7}, "decoder": {"a": 1}}
    assert old["train"] == {"save_every": 7, "magic": True}, "the file's own"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = {"schema": upgrade.SCHEMA, "train": {"save_every": 7}}
        assert upgrade.upgrade(new) == {"train": {"save_every": 7}}, "of today: there it is a mistake"
    with pytest.raises(ConfigError, match=r"unknown key config\.train\.save_every"):
        from_stored(new)


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        (("name", "decoder.scan", "decoder.remat", "data.workers", "data.prefetch", "data.max_bad_fraction"), MAY_CHANGE),
        (("train.log_every", "train.checkpoint_every", "train.keep", "train.keep_every", "train.keep_best"), MAY_CHANGE),
        (("train.max_bad_steps", "train.wandb", "train.weights", "train.tower", "train.projector"), MAY_CHANGE),
        (("train.changed_data", "evaluation.every", "mesh.fsdp", "profile.steps"), MAY_CHANGE),
        (("data.root", "data.tokenizer"), SAME_EXAMPLES),
        (("train.steps", "train.epochs"), LENGTH),
        (("seed", "decoder.width", "data.template", "data.seed", "train.batch_size", "train.loss_chunk"), ""),
        (("optimizer.groups.default.lr", "train.compute_dtype", "image.mode", "data.sets.a.repeat", "no.such.key"), ""),
    ],
)
def test_what_may_change_when_a_run_goes_on(keys, rule):
    assert {key: on_resume(key) for key in keys} == dict.fromkeys(keys, rule)


@dataclass(frozen=True)
class SoftcapConfig(DecoderConfig):
    """A decoder with a key more."""

    softcap: Annotated[float, positive()] = 30.0  # most that a logit can be


@pytest.fixture
def softcap(monkeypatch):
    monkeypatch.setitem(SECTIONS["decoder"], "softcap", None)  # so that it goes again
    register_section("decoder", "softcap", SoftcapConfig)


@pytest.mark.usefixtures("softcap")
def test_a_section_has_the_keys_of_its_architecture():
    source = default_config(decoder="softcap")
    source.decoder.softcap = 50.0
    config = build_config(source)
    assert isinstance(config.decoder, SoftcapConfig)
    assert (config.decoder.softcap, config.decoder.architecture, config.decoder.width) == (50.0, "softcap", 4096)
    assert from_stored(json.loads(json.dumps(to_stored(config)))) == config
    assert build_config({"decoder": {"architecture": "softcap"}}).decoder == SoftcapConfig(architecture="softcap")
    for value, message in (
        (0.0, "config.decoder.softcap got 0.0, expected a number above 0"),
        ("a", "got 'a' .str., expected float"),
    ):
        source.decoder = source.decoder.to_dict() | {"softcap": value}
        with pytest.raises(ConfigError, match=message):
            build_config(source)


@pytest.mark.usefixtures("softcap")
def test_the_keys_of_another_architecture_are_unknown():
    with pytest.raises(ConfigError, match=r"unknown key config\.decoder\.softcap; nearest valid name: "):
        build_config({"decoder": {"softcap": 1.0}})
    with pytest.raises(ConfigError, match=r"config\.decoder\.architecture got 'softcup'; nearest valid name: 'softcap'"):
        build_config({"decoder": {"architecture": "softcup"}})
    with pytest.raises(ConfigError, match=r"decoder architecture got 'softcup'; nearest valid name: 'softcap'"):
        default_config(decoder="softcup")


def test_the_plain_configuration_is_that_of_the_defaults():
    assert build_config(default_config()) == Config()
