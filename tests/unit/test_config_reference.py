"""docs/config.md and `--config.help`: every key, with its meaning, default and valid values."""

import subprocess
import sys

import pytest

from benchmarks.config_reference import OUTPUT, page
from deepstack_jax.config import Config
from deepstack_jax.config.fields import leaves
from deepstack_jax.config.reference import as_text, reference
from tests.unit.tiny import tiny_config

pytestmark = pytest.mark.quick


def test_the_page_is_as_the_script_writes_it():
    assert OUTPUT.read_text() == page(), "run python -m benchmarks.config_reference"


def test_every_key_has_a_meaning_and_valid_values():
    listed = {key.name: key for section in reference() for key in section.keys}
    assert not [name for name, key in listed.items() if not (key.meaning and key.valid and key.value)]
    keys = {leaf.key.partition("[")[0].replace("groups.default", "groups.NAME") for leaf in leaves(Config(), Config)}
    assert keys <= listed.keys()
    assert listed["decoder.width"][1:4] == ("4096", "whole number above 0, at most 1,048,576", "size of a hidden state")
    assert (listed["data.root"].resume, listed["mesh.fsdp"].resume, listed["seed"].resume) == ("same examples", "free", "")


def test_the_values_are_those_of_the_configuration():
    text = as_text(tiny_config({"decoder.width": 40, "decoder.heads": 5, "decoder.kv_heads": 5}))
    assert "  --config.decoder.width=40\n" in text
    assert "--config.optimizer.groups.default.lr=2e-05\n" in text
    assert "NAME" not in text


def test_a_verb_prints_them():
    command = [sys.executable, "-m", "deepstack_jax.audit", "--config=demo.py", "--config.help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "--config.data.source='pages'" in done.stdout
