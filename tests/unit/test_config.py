"""What a configuration accepts, what it refuses and how it says so."""

import dataclasses
import json
import math
import re
import warnings
from operator import attrgetter
from typing import Any

import pytest
from ml_collections import ConfigDict

from deepstack_jax.cli import writable_folder
from deepstack_jax.config import Config, build_config, check_config, default_config, differences, to_dict
from deepstack_jax.config.fields import Range, choices, leaves
from deepstack_jax.errors import ConfigError, nearest
from tests.unit.tiny import TINY, decoder_schedule, tiny_config

pytestmark = pytest.mark.quick

LEAVES = {leaf.key: leaf for leaf in leaves(Config(), Config)}
CHOICES = {key: valid for key, leaf in LEAVES.items() if (valid := choices(leaf.kind, leaf.marks))}
RANGES = {key: mark for key, leaf in LEAVES.items() for mark in leaf.marks if isinstance(mark, Range)}
POSITIVE = [key for key, valid in RANGES.items() if valid.above and "[" not in key]


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} of "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def test_defaults_build_and_stay_defaults():
    assert build_config(default_config()) == Config() == build_config({})


def test_round_trip_through_json():
    config = tiny_config({"data.buckets": (24, 28), "deepstack.schedule": (0, 1, 2, 3, -1), "optimizer.clip_norm": 2.0})
    assert build_config(to_dict(config)) == config
    assert build_config(json.loads(json.dumps(to_dict(config)))) == config
    assert build_config(ConfigDict(to_dict(config), convert_dict=True)) == config


def test_config_is_frozen_and_hashable_where_jit_needs_it():
    config: Any = tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.decoder.width = 3
    assert hash(config.decoder) == hash(tiny_config().decoder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decodr", {}, r"unknown key config\.decodr; nearest valid name: 'decoder'"),
        ("decoder.widht", 3, r"unknown key config\.decoder\.widht; nearest valid name: 'width'"),
        ("data.synthetic.sed", 3, r"unknown key config\.data\.synthetic\.sed; nearest valid name: 'seed'"),
        ("mesh.qqqq", 1, r"unknown key config\.mesh\.qqqq; valid names: data, fsdp, tensor"),
        ("optimizer.groups", {"default": {"rate": 1.0}}, r"unknown key config\.optimizer\.groups\.default\.rate"),
    ],
)
def test_unknown_key_names_the_nearest(key, value, message):
    with pytest.raises(ConfigError, match=message):
        build_config(nested(key, value))


def test_unknown_key_in_a_config_file_is_caught():
    config: Any = default_config()
    config.train.step = 3
    with pytest.raises(ConfigError, match=r"config\.train\.step; nearest valid name: 'steps'"):
        build_config(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decoder.width", "32", r"config\.decoder\.width got '32' \(str\), expected int"),
        ("decoder.width", 32.0, r"config\.decoder\.width got 32\.0 \(float\), expected int"),
        ("decoder.width", True, r"config\.decoder\.width got True \(bool\), expected int"),
        ("decoder.scan", 1, r"config\.decoder\.scan got 1 \(int\), expected bool"),
        ("decoder.norm_eps", "small", r"config\.decoder\.norm_eps got 'small' \(str\), expected float"),
        ("decoder.norm_eps", True, r"config\.decoder\.norm_eps got True"),
        ("name", 3, r"config\.name got 3 \(int\), expected str"),
        ("name", None, r"config\.name got None"),
        ("decoder", 3, r"config\.decoder got 3, expected the keys of DecoderConfig"),
        ("data.buckets", 512, r"config\.data\.buckets got 512, expected a list"),
        ("data.buckets", ["a"], r"config\.data\.buckets\[0\] got 'a'"),
        ("image.mean", [0.5, 0.5], r"config\.image\.mean got 2 values, expected 3"),
        ("image.pinpoints", [[672, 336, 1]], r"config\.image\.pinpoints\[0\] got 3 values, expected 2"),
        ("optimizer.table", [["head", "frozen"], [".*"]], r"config\.optimizer\.table\[1\] got 1 values, expected 2"),
        ("optimizer.groups", {"default": 1e-4}, r"config\.optimizer\.groups\.default got 0\.0001, expected the keys of"),
        ("optimizer.groups", "adamw", r"config\.optimizer\.groups got 'adamw', expected"),
    ],
)
def test_wrong_types_name_key_value_and_expectation(key, value, message):
    with pytest.raises(ConfigError, match=message):
        build_config(nested(key, value))


def test_whole_numbers_are_taken_for_floats():
    assert build_config(nested("optimizer.clip_norm", 2)).optimizer.clip_norm == 2.0
    assert isinstance(build_config(nested("image.mean", [0, 0, 1])).image.mean[2], float)


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_checked(key):
    with pytest.raises(ConfigError, match=rf"config\.{key} got 'qqq'; valid names: .*{CHOICES[key][0]}"):
        build_config(nested(key, "qqq"))
    near = CHOICES[key][-1] + "s"
    with pytest.raises(ConfigError, match=f"nearest valid name: '{CHOICES[key][-1]}'"):
        build_config(nested(key, near))


def test_a_value_as_a_whole_is_never_in_the_message():
    for key, value in (
        ("decoder.width", "9" * 10**6),
        ("data.buckets", {"a" * 10**6: 1}),
        ("x" * 10**6, 1),
        ("mesh", [1] * 10**5),
    ):
        with pytest.raises(ConfigError) as error:
            build_config(nested(key, value))
        assert len(str(error.value)) < 500
        assert str(error.value).startswith(("config.", "unknown key config."))


@pytest.mark.parametrize("key", POSITIVE)
def test_every_size_must_be_positive(key):
    kind = type(attrgetter(key)(Config()))
    for value in (kind(0), kind(-1), *([math.nan] if kind is float else [])):
        with pytest.raises(ConfigError, match=rf"config\.{key} got {value}, expected a number above 0"):
            build_config(nested(key, value))


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("optimizer.schedule.warmup", (500, -1, 1.01, math.nan), "a share of the steps, 0 to 1"),
        ("optimizer.schedule.tail", (-2, 200), "a share of the steps, 0 to 1"),
        ("optimizer.schedule.final", (-0.1, 2), "a share of the learning rate, 0 to 1"),
        ("optimizer.groups.default.lr", (-1, math.nan, math.inf), "a number from 0 on"),
        ("optimizer.groups.default.b2", (1.0, -0.1), "a number from 0 on and below 1"),
        ("optimizer.groups.default.weight_decay", (-0.1,), "a number from 0 on"),
        ("data.max_bad_fraction", (5, -0.5), "a share of the examples, 0 to 1"),
        ("data.workers", (-3,), "0 (a thread of this process) or a number of processes"),
        ("data.seed", (-1, 2**32), "a whole number from 0 to 4294967295"),
        ("evaluation.every", (-5,), "0 (at the end only) or a number of steps"),
        ("evaluation.samples", (-1,), "0 (none) or more"),
        ("train.keep_best", (-1,), "0 (none) or more"),
        ("deepstack.vision_start", (-2,), "-1 (half of the tower's layers) or a layer from 0 on"),
        ("vision.post_layers", (-1,), "0 (none) or more"),
        ("decoder.sliding_window", (-1,), "0 (all tokens before) or more"),
        ("data.buckets", ((0,),), "a number above 0"),
        ("image.std", ((1.0, 0.0, 1.0),), "a number above 0"),
        ("decoder.layers", (10**7,), "a number above 0, at most 4,096"),
        ("image.num_crops", (10**9,), "a number above 0, at most 1,024"),
        ("train.batch_size", (10**30, 10**5000), "a number above 0, at most 16,777,216"),
        ("train.log_every", (2**31,), "a number above 0, at most 2,147,483,647"),
        ("decoder.sliding_window", (2**40,), "0 (all tokens before) or more, at most 2,147,483,647"),
        ("deepstack.start", (2**31,), "a number, at most 2,147,483,647"),
        ("decoder.rope.theta", (math.inf, 10**400), "a number above 0, at most 1e+30"),
        ("decoder.rope.factor", (math.nan, -math.inf), "a number"),
        ("image.mean", ((0.5, math.nan, 0.5),), "a number"),
        ("data.buckets", ((2**40,),), "a number above 0, at most 2,147,483,647"),
        ("mesh.fsdp", (2**60,), "a number, at most 2,147,483,647"),
    ],
)
def test_a_number_outside_of_its_range_is_refused_with_the_range(key, values, expected):
    for value in values:
        with pytest.raises(ConfigError, match=rf"config\.{key}(\[\d\])? got [-.+ \w]+, expected {re.escape(expected)}"):
            build_config(nested(key, value))


def test_the_ends_of_a_range_belong_to_it():
    for key, valid in RANGES.items():
        if not valid.above and key != "train.keep_best":  # which needs evaluations
            build_config(nested(key, type(LEAVES[key].value)(valid.least)))
    build_config(nested("optimizer.schedule.warmup", 1))
    build_config(nested("optimizer.clip_norm", math.inf))


def test_every_number_is_bounded():
    """A new number needs a range, or a place here with what else bounds it."""
    elsewhere = {
        *("train.steps", "train.epochs", "vision.feature_layer", "deepstack.start", "mesh.data", "mesh.fsdp", "mesh.tensor"),
        *("decoder.rope.factor", "decoder.rope.low_freq_factor", "decoder.rope.high_freq_factor"),
        *(f"image.mean[{number}]" for number in range(3)),
    }

    assert {"train.batch_size", "data.seed", "optimizer.groups.default.lr", "image.std[2]"} < RANGES.keys()
    assert len(POSITIVE) == 47
    for key, leaf in LEAVES.items():
        if isinstance(leaf.value, int | float) and not isinstance(leaf.value, bool):
            assert (key in RANGES) != (key in elsewhere), key


IMPOSSIBLE = [
    (
        {"decoder.layers": 4000, "decoder.width": 2**16, "decoder.mlp": 2**18},
        "config.decoder has 2.1e+14 parameters, expected at most 1e+13; lower its layers or widths",
    ),
    ({"image.num_crops": 900, "image.size": 4096}, "visual tokens in its 901 groups, expected at most 16,777,216; lower image"),
    ({"train.batch_size": 2**24, "image.size": 512}, "GB of pixels, expected at most 1,100; lower batch_size, data.max_images"),
    (
        {"optimizer.table": (("(", "default"),)},
        "config.optimizer.table holds '(', which is not a regular expression: missing )",
    ),
    ({"profile.steps": "9" * 5000 + ":1"}, "99:1', expected FIRST:LAST from step 1 on, as 10:15"),
    ({"data.train": "a\0b"}, "config.data.train got 'a\\x00b', expected text without a null character"),
    ({"image.size": 10}, "image.size 10 is not divisible by config.vision.patch_size 4; nearest valid: 8"),
    ({"vision.heads": 3}, "vision.width 16 is not divisible by config.vision.heads 3; nearest valid: 15"),
    ({"decoder.kv_heads": 3}, "decoder.heads 4 is not divisible by config.decoder.kv_heads 3; nearest valid: 3"),
    ({"train.accumulation": 3}, "train.batch_size 8 is not divisible by config.train.accumulation 3; nearest valid: 6"),
    ({"decoder.head_dim": 7}, "head_dim 7 is odd"),
    ({"vision.feature_layer": -5}, "feature_layer -5 is outside a tower of 3 layers"),
    ({"vision.feature_layer": 4}, "feature_layer 4 is outside a tower of 3 layers"),
    ({"data.buckets": (16, 33)}, "buckets (16, 33) go beyond config.data.max_length 32"),
    ({"data.max_length": 12}, "3 images of 4 tokens take 12 positions; raise config.data.max_length 12 above 12"),
    ({"train.epochs": 0.0}, "steps 0 with epochs 0.0 trains nothing"),
    ({"train.steps": -1}, "steps -1 with epochs 1.0 trains nothing"),
    ({"image.num_crops": 1}, "num_crops 1 leaves no crop grid; use 2 or more"),
    ({"image.mode": "pad"}, "needs crops, but config.image.mode='pad' makes none"),
    ({"image.mode": "square", "deepstack.stack": "none", "deepstack.sequence": "crops", "data.max_images": 1}, "needs crops"),
    (
        {"deepstack.sequence": "global_crops", "data.max_images": 1},
        "already holds the crops; set config.deepstack.stack='none'",
    ),
    ({"deepstack.schedule": (0, 1)}, "schedule names 2 layers, config.decoder.layers is 5"),
    ({"deepstack.schedule": (0, 1, 2, 3, 4)}, "goes beyond the groups 0..3"),
    ({"deepstack.schedule": (0, 1, 2, 3, -2)}, "goes beyond the groups 0..3"),
    ({"deepstack.start": -1}, "start -1 is negative"),
    (
        {"decoder.rope.scaling": "llama3", "decoder.rope.original_positions": 8, "decoder.rope.low_freq_factor": 4.0},
        "low_freq_factor 4.0 and high_freq_factor 4.0: expected numbers above 0, the second above the first",
    ),
    ({"deepstack.start": 5}, "start 5 lies beyond the 5 decoder layers 0..4"),
    ({"optimizer.table": (("head", "hot"), (".*", "default"))}, "sends 'head' to 'hot'; valid names: default, frozen"),
    ({"optimizer.table": (("head", "frosen"), (".*", "default"))}, "nearest valid name: 'frozen'"),
    ({"optimizer.groups.default.algorithm": "adam"}, "groups.default.algorithm got 'adam'; nearest valid name: 'adamw'"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE, ids=[" ".join(changes) for changes, _ in IMPOSSIBLE])
def test_impossible_combinations_are_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        tiny_config(changes)
    assert message in str(error.value)
    assert "config." in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_just_possible_is_accepted():
    tiny_config({"data.max_length": 13})
    tiny_config({"vision.feature_layer": 3})
    tiny_config({"vision.feature_layer": -4})
    tiny_config({"deepstack.sequence": "global_crops", "deepstack.stack": "none", "data.max_images": 1})
    tiny_config({"image.mode": "pad", "deepstack.stack": "dummy"})
    tiny_config({"optimizer.table": (("head", "frozen"), (".*", "default"))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_config({"deepstack.schedule": (0, 0, 3, -1, -1)})
        tiny_config({"deepstack.start": 0})


@pytest.mark.parametrize(("start", "interval", "lost"), [(2, 1, 1), (4, 1, 3), (1, 2, 2)])
def test_groups_past_the_last_layer_are_warned_of(start, interval, lost):
    with pytest.warns(UserWarning, match=f"{lost} of 4 groups fall past the last of 5 layers"):
        config = tiny_config({"deepstack.start": start, "deepstack.interval": interval})
    assert sum(group >= 0 for group in decoder_schedule(config)) == 4 - lost


def test_check_config_sees_a_hand_made_config_too():
    config = dataclasses.replace(Config(), decoder=dataclasses.replace(Config().decoder, remat="blok"))
    with pytest.raises(ConfigError, match=r"config\.decoder\.remat got 'blok'; nearest valid name: 'block'"):
        check_config(config)


def test_nearest():
    assert nearest("colour", ["color", "size"]) == "nearest valid name: 'color'"
    assert nearest("zzz", ["size", "color"]) == "valid names: color, size"


def test_derived_sizes():
    config = tiny_config()
    assert (config.patch_side, config.layout.groups, config.layout.max_tokens, config.data_spec.crop_slots) == (2, 4, 4, 15)
    assert decoder_schedule(config) == (-1, 0, 1, 2, 3)
    assert config.data_spec.batch_shape(6, 24) == (6, 24, 15, 8, 12, 4, 1)
    pad = tiny_config({"image.mode": "pad", "deepstack.stack": "none"})
    assert (pad.data_spec.crop_slots, pad.layout.groups, decoder_schedule(pad)) == (3, 0, (-1,) * 5)
    assert decoder_schedule(tiny_config({"deepstack.schedule": (3, -1, 0, -1, 3)})) == (3, -1, 0, -1, 3)


def test_differences_name_dotted_keys_with_both_values():
    config = tiny_config()
    assert differences(config, json.loads(json.dumps(to_dict(config)))) == {}
    other = json.loads(json.dumps(to_dict(tiny_config({"decoder.width": 64, "data.buckets": (16,)}))))
    del other["seed"]
    other["mesh"]["old"] = 1
    assert differences(config, other) == {
        "decoder.width": (TINY["decoder.width"], 64),
        "data.buckets": ([], [16]),
        "seed": (0, None),
        "mesh.old": (None, 1),
    }


def test_a_workdir_in_a_bucket_is_refused_before_a_folder_of_that_name_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--workdir=gs://bucket/run is a URL; expected a folder: mount the bucket"):
        writable_folder("gs://bucket/run", "workdir")
    assert list(tmp_path.iterdir()) == []
