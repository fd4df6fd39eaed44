"""Taps: hidden states of the tower at the global view, each by a merger of its own, into layers of the decoder.

Prefill and decode, training over eight devices, checkpoints, export and `plan` of a model with taps are in
tests/unit/test_families.py, the comparison with transformers is in tests/parity/test_taps.py.
"""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from deepstack_jax.audit.inputs import injecting_layers
from deepstack_jax.audit.page import layer_tags, method
from deepstack_jax.batch import NEWLINE, ZERO
from deepstack_jax.config import Config
from deepstack_jax.errors import ConfigError, WeightsError
from deepstack_jax.families.build import build_model
from deepstack_jax.families.forms import check_against
from deepstack_jax.train.core.optimizer import assign_groups
from deepstack_jax.train.flops import step_flops
from deepstack_jax.weights.names import NameTable
from tests.unit.tiny import decoder_schedule, example, make_batch, model_params, only_rows, tiny_config

# Crops into layers 0, 2, 3, two taps between and after them: one of the tower's input, one past the feature layer (2).
SCHEDULE = (0, -1, 1, 2, -1)
BOTH = {"deepstack.stack": "crops_taps", "deepstack.taps": ((0, 1), (-1, 4)), "deepstack.schedule": SCHEDULE}
TAPS = {"deepstack.stack": "taps", "deepstack.taps": ((0, 1), (-1, 4))}
CONFIG = tiny_config(BOTH)
MODEL = build_model(CONFIG)
P = 4


@pytest.fixture(scope="module")
def rows():
    packed = [example(CONFIG, 7, [(2, 1)], words=1), example(CONFIG, 8, [(1, 2)], words=2, answer=2)]
    return [[example(CONFIG, 0)], [example(CONFIG, 1, [(2, 2)])], packed, [packed[0]], [packed[1]]]


@pytest.fixture(scope="module")
def batch(rows):
    return make_batch(CONFIG, rows)


@pytest.fixture(scope="module")
def params(batch):
    return model_params(MODEL, batch)


@pytest.fixture(scope="module")
def run():
    """Hidden states, and the gradients of a weighted sum of them: of the parameters, and of the pixels."""

    @jax.jit
    def run(params, batch, weights):
        def value(params, pixels):
            hidden = MODEL.apply({"params": params}, batch._replace(pixels=pixels)).hidden
            return (hidden * weights[..., None]).sum(), hidden

        (_, hidden), gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(
            params, jnp.asarray(batch.pixels, jnp.float32)
        )
        return hidden, *gradients

    return run


def weights_of(batch, *rows):
    """On the text of these rows."""
    at = np.isin(np.arange(len(batch.tokens)), rows)[:, None]
    return jnp.asarray((at & (batch.visual_index < 0) & (batch.segment_ids > 0)).astype(np.float32))


def of_mergers(tree) -> dict[str, np.ndarray]:
    flat = traverse_util.flatten_dict(jax.device_get(tree), sep="/")
    return {path: leaf for path, leaf in flat.items() if path.startswith("deepstack_mergers_")}


def without_output(params) -> Any:
    """The last linear map of every merger zero."""
    flat = traverse_util.flatten_dict(params, sep="/")
    last = {path: jnp.zeros_like(leaf) for path, leaf in flat.items() if "mergers" in path and "/fc2/" in path}
    assert len(last) == 4
    return traverse_util.unflatten_dict(flat | last, sep="/")


def test_mergers_that_say_nothing_are_the_model_without_taps(batch, params, run):
    config = tiny_config({"deepstack.schedule": SCHEDULE})
    plain = batch._replace(stack_source=batch.stack_source[:, :4])
    ours = {name: tree for name, tree in params.items() if "mergers" not in name}
    expected = jax.jit(lambda params: build_model(config).apply({"params": params}, plain).hidden)(ours)
    real, weights = batch.segment_ids > 0, weights_of(batch)
    found = np.asarray(run(without_output(params), batch, weights)[0])
    np.testing.assert_allclose(found[real], np.asarray(expected)[real], atol=1e-5)
    assert np.abs(np.asarray(run(params, batch, weights)[0]) - expected)[1].max() > 0.1


def test_scanned_layers_are_unrolled_ones(batch, params, run):
    loop = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, scan=False, remat="none"))
    found = jax.jit(lambda params: build_model(loop).apply({"params": params}, batch).hidden)(params)
    np.testing.assert_allclose(found, run(params, batch, weights_of(batch))[0], atol=1e-5)


def test_a_packed_row_equals_its_examples_alone(rows, batch, params, run):
    hidden, at = run(params, batch, weights_of(batch))[0], 0
    for row, one in ((3, rows[3][0]), (4, rows[4][0])):
        length = int((batch.segment_ids[row] > 0).sum())
        np.testing.assert_allclose(hidden[2, at : at + length], hidden[row, :length], atol=1e-5)
        at += length
        assert one.layouts[0].stack.shape == (6, P)


def test_every_merger_learns_and_of_its_own_rows_alone(batch, params, run):
    """Those of rows with images; the pixels of a row concern no other, and a row of text nobody's."""
    of_both, text = (run(params, batch, weights_of(batch, *rows))[1:] for rows in ((1, 2), (0,)))
    sizes = {path: np.abs(leaf).max() for path, leaf in of_mergers(of_both[0]).items()}
    assert len(sizes) == 12
    assert min(sizes.values()) > 1e-4, sizes
    assert not any(leaf.any() for leaf in of_mergers(text[0]).values())
    assert not np.asarray(text[1]).any()
    of_one = run(params, batch, weights_of(batch, 1))
    moved = np.abs(np.asarray(of_one[2])).max(axis=(1, 2, 3, 4)) > 0
    assert moved.tolist() == [False, True, False, False, False]
    alone = run(params, only_rows(batch, 1), weights_of(batch, 1))
    for path, leaf in of_mergers(of_one[1]).items():
        np.testing.assert_allclose(leaf, of_mergers(alone[1])[path], rtol=1e-4, atol=1e-5)


def test_taps_are_the_last_groups_and_hold_the_global_view():
    grids = {"pad": None, "stretch": None, "deepstack": (1, 3), "hd": (1, 2), "anyres": (1, 2)}
    for mode, grid in grids.items():
        changes = {"image.mode": mode, "deepstack.stack": "taps", "deepstack.taps": ((1, 1), (2, 3)), "data.max_images": 1}
        changes |= {"image.merge": "spatial_unpad"} if grid == (1, 2) else {}
        pinpoints = {"image.pinpoints": ((8, 16), (16, 8))} if mode == "anyres" else {}
        config = quiet_config(changes | pinpoints | {"data.max_length": 128})
        layout = config.layout.layout(grid, (64, 48))
        assert layout.stack.shape == (2, layout.tokens.size) == (config.layout.groups, layout.tokens.size)
        np.testing.assert_array_equal(layout.stack[:, :P], [range(P), range(P)])
        assert (layout.stack[:, P:] == ZERO).all()
        assert (NEWLINE in layout.tokens) == (grid == (1, 2))
    both = CONFIG.layout.layout((1, 3), (64, 48))
    np.testing.assert_array_equal(both.stack[4:], [range(P), range(P)])
    np.testing.assert_array_equal(both.stack[:3].ravel() >= P, True)
    assert decoder_schedule(CONFIG) == (0, 4, 1, 2, 5)


def quiet_config(changes: dict[str, Any]) -> Config:
    """Without the warning that crops are encoded for nothing."""
    with warnings.catch_warnings(action="ignore"):
        return tiny_config(changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"deepstack.stack": "taps"}, r"stack='taps' with config\.deepstack\.taps \(\): expected pairs"),
        ({"deepstack.taps": ((1, 0),)}, r"stack='crops' with config\.deepstack\.taps"),
        (
            BOTH | {"deepstack.taps": ((1, 2), (2, 4))},
            "1 decoder layer would get two groups: 2; give each tap a layer of its own",
        ),
        (BOTH | {"deepstack.taps": ((1, 4), (2, 4))}, "would get two groups: 4;"),
        (BOTH | {"deepstack.schedule": ()}, "2 decoder layers would get two groups: 1, 4;"),
        (BOTH | {"deepstack.taps": ((4, 4),)}, r"the hidden state 4, expected -4\.\.3 of this tower"),
        (BOTH | {"deepstack.taps": ((-5, 4),)}, r"the hidden state -5, expected -4\.\.3"),
        (BOTH | {"deepstack.taps": ((1, 5),)}, r"the decoder layer 5, expected 0\.\.4"),
        (BOTH | {"deepstack.into": "vision", "image.grid": "square"}, "into='vision' needs a fixed square"),
        (BOTH | {"deepstack.pool": 2}, "taps do not go with config.deepstack.pool 2"),
        (TAPS | {"deepstack.sequence": "crops", "data.max_images": 1}, "belong to the global view"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(changes, said):
    with pytest.raises(ConfigError, match=said) as raised:
        tiny_config(changes)
    assert "\n" not in str(raised.value)


def test_crops_that_nothing_uses_are_warned_of():
    with pytest.warns(UserWarning, match="uses the global view alone.*'stretch' gives the same"):
        tiny_config({"deepstack.stack": "taps", "deepstack.taps": ((1, 0),)})


def test_mergers_have_a_group_of_their_own():
    paths = list(NameTable(CONFIG).leaves)
    groups = assign_groups(paths, ((r"^deepstack_mergers_\d+/", "mergers"), (".*", "frozen")))
    assert [path for path, group in groups.items() if group == "mergers"] == [path for path in paths if "mergers" in path]
    with pytest.raises(ConfigError, match="covers no group for deepstack_mergers_0/norm/scale"):
        assign_groups(paths, ((r"^(projector|vision_tower|embed|layers|head)/", "frozen"),))


def test_their_names_in_a_folder_and_their_flops():
    """Those of Qwen3-VL's mergers; the layer that only a tap needs is counted."""
    table = NameTable(CONFIG)
    names = [name for name in table.tensors if "mergers" in name]
    parts = [f"{part}.{leaf}" for part in ("norm", "linear_fc1", "linear_fc2") for leaf in ("weight", "bias")]
    assert names == [f"model.deepstack_mergers.{number}.{part}" for number in (0, 1) for part in parts]
    plain = tiny_config({"deepstack.schedule": SCHEDULE})
    frozen, trained = dict.fromkeys(table.leaves, "frozen"), dict.fromkeys(table.leaves, "default")
    tapped, untapped = ({p.name: p.forward for p in step_flops(c, frozen, 2, 32).parts} for c in (CONFIG, plain))
    tokens = 2 * 3 * P
    assert tapped["projector"] - untapped["projector"] == 2 * 2 * tokens * (16 * 16 + 16 * 32)
    # Two more layers of three would be half as much again: the feature is hidden state 2, the tap 3.
    assert 1.4 < tapped["tower"] / untapped["tower"] < 1.5
    backward = {part.name: part.backward for part in step_flops(CONFIG, trained, 2, 32).parts}
    assert backward["projector"] == 2 * tapped["projector"]


def test_weights_with_other_taps_are_refused():
    other = tiny_config(BOTH | {"deepstack.taps": ((1, 1), (-1, 4))})
    with pytest.raises(WeightsError, match=r"config\.deepstack\.taps is \(\(1, 1\), \(-1, 4\)\), the weights have \(\(0, 1\)"):
        check_against(other, CONFIG)
    check_against(CONFIG, tiny_config({"deepstack.schedule": SCHEDULE}))  # whose mergers are then drawn


def test_audit_says_which_hidden_state_enters_which_layer():
    assert [(layer.number, layer.state) for layer in injecting_layers(CONFIG)] == [
        (0, None),
        (1, 0),
        (2, None),
        (3, None),
        (4, -1),
    ]
    tags = [tag.label for tag in layer_tags(CONFIG)]
    assert tags[1] == "layer 1, group 4, tap of hidden state 0"
    assert tags[-1] == "never added, past the last layer: group 3"
    assert "sampling, and the global view's tokens by other layers of the tower (taps) are added" in method(CONFIG)
