"""Configurations with absurd values at any key: what is built is small enough to run, what is not is refused in one line."""

import json
import math
import sys
import tracemalloc
import warnings
from typing import Any

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

from deepstack_jax import cli
from deepstack_jax.config import Config, build_config, to_dict
from deepstack_jax.config.fields import choices, leaves
from deepstack_jax.errors import ConfigError
from tests.fuzz.watch import is_one_line
from tests.unit.tiny import decoder_schedule, tower_schedule

MEMORY = 50e6  # bytes that checking may take


def keys(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every key of the defaults, sections too."""
    found = [path] if path else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += keys(inner, (*path, name))
    return found


DEFAULTS = to_dict(Config())
KEYS = keys(DEFAULTS)


def deep(levels: int, wrap: Any) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = wrap(value)
    return value


whole = st.sampled_from([0, 1, -1, 2, 3, 7, 64, 1023, 10**4, 10**5, 10**7, 10**9, 2**31, 2**32, 2**63, 10**400, 10**5000])
real = st.sampled_from([0.0, -0.0, 1.0, 0.5, 1e-300, 1e9, 1e308, -1e308, math.inf, -math.inf, math.nan])
NASTY = ["", "nan", "1e9", "1:2", "9" * 5000 + ":1", "x" * 10**6, "a\0b", "\x1b[2J", "\u202e", "\ud83d", "\n", "(" * 500, ".."]
text = st.sampled_from([*NASTY, *(name for leaf in leaves(Config(), Config) for name in choices(leaf.kind, leaf.marks))])
odd = st.sampled_from([None, True, False, b"x", {}, [], (), [[]], {"a": 1}, {"": {}}, {3: 4}, {"x" * 10**5: 1}])
huge = st.sampled_from(
    [deep(100_000, lambda inner: [inner]), deep(100_000, lambda inner: {"a": inner}), [1] * 10**5, ["x" * 10**4] * 100]
)
pairs = st.lists(st.tuples(text | whole, text | whole), max_size=3)
values = st.one_of(whole, real, text, odd, huge, pairs, st.lists(whole | real, max_size=5))


def changed(changes: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """The defaults with other values at some keys, or more keys."""
    config = json.loads(json.dumps(DEFAULTS))
    for path, value in changes:
        place = config
        for name in path[:-1]:
            if not isinstance(place.get(name), dict):
                break
            place = place[name]
        else:
            place[path[-1]] = value
    return config


def check(build, *arguments: Any) -> None:
    """A Config whose sizes can be worked with, or one line; neither takes much memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracemalloc.start()
        try:
            config = build(*arguments)
            assert config.data_spec.crop_slots * config.image.size**2 * 3 < 2**40
            assert len(decoder_schedule(config)) == config.decoder.layers
            assert len(tower_schedule(config)) <= 2 * 4096
            assert config.data_spec.batch_shape(1, config.data.max_length)
        except ConfigError as error:
            is_one_line(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peak < MEMORY, f"{peak / 1e6:.0f} MB"


unknown = st.tuples(st.sampled_from(KEYS), st.text(max_size=9)).map(lambda pair: (*pair[0], pair[1]))


@given(st.lists(st.tuples(st.sampled_from(KEYS) | unknown, values), min_size=1, max_size=4))
def test_any_value_at_any_key(changes):
    check(build_config, changed(changes))


@given(values)
def test_anything_in_place_of_a_configuration(value):
    check(build_config, value)


MODEL = [key for key in KEYS if key[0] in ("image", "vision", "projector", "decoder", "deepstack")]
sizes = st.dictionaries(st.sampled_from(MODEL), st.integers(1, 12).map(lambda power: 4**power), max_size=6)


@given(sizes, st.sampled_from(["deepstack", "hd", "pad"]))
def test_sizes_that_are_possible_one_by_one(changes, mode):
    check(build_config, changed([*changes.items(), (("image", "mode"), mode)]))


def from_command_line(words: list[str]) -> Config:
    """As a verb reads its flags; what it prints before it exits comes as a ConfigError."""
    sys.argv = ["verb", "--config=configs/demo.py", *words]
    flags.FLAGS.unparse_flags()
    cli.parse_flags()
    return cli.parse_config()


@pytest.fixture(scope="module", autouse=True)
def command_line():
    before = sys.argv
    if "config" not in flags.FLAGS:
        cli.CONFIG.define()
    yield
    sys.argv = before


def written(value: Any) -> str:
    """A value as somebody types it."""
    try:
        return str(value).replace("\0", "")[:5000]
    except ValueError:  # an int that is too long
        return "9" * 5000


said = (whole | real | text | odd | pairs).map(written) | st.sampled_from(["(" * 5000, "[" * 500 + "]" * 500, "1e400"])


@given(st.lists(st.tuples(st.sampled_from(KEYS) | unknown, said), min_size=1, max_size=3))
def test_any_override_on_the_command_line(changes):
    check(from_command_line, [f"--config.{'.'.join(path)}={value}" for path, value in changes])
