"""Packs: every example once, none beyond its row's room, rows well used; steps as the recipe wants; packed equals unpacked."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.encode.encoder import Encoder
from deepstack_jax.data.order.batches import PackedBatches, PaddedBatches
from deepstack_jax.data.order.lengths import measure_rows
from deepstack_jax.data.order.mixture import EpochOrder
from deepstack_jax.data.order.packing import RowCapacity, describe_packs, pack
from deepstack_jax.data.pipeline import BatchLoader
from deepstack_jax.errors import ConfigError
from deepstack_jax.printing import Console
from tests.unit.made_examples import MadeExamples
from tests.unit.tiny import tiny_config

LIMITS = RowCapacity(tokens=40, crops=10, visual=24, examples=5)
RECIPE = RowCapacity(tokens=2048, crops=15, visual=1728, examples=16)  # DeepStack-L at 336 pixels
SIZES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 40), st.just(0), st.just(0)),
        st.tuples(st.integers(8, 40), st.integers(1, 10), st.integers(1, 8)),
    ),
    min_size=1,
    max_size=60,
)


def as_sizes(rows: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, 3)


def instruction_mix(count: int, seed: int = 0) -> np.ndarray:
    """Lengths like those of the 665k mix: an image is 576 tokens in 3 to 5 crops; dialogues are text and longer."""
    rng = np.random.default_rng(seed)
    kinds = {
        "receipts, transcribed": (0.24, rng.normal(280, 110, count).clip(60, 700)),
        "several questions": (0.50, rng.gamma(3, 40, count).clip(40, 900)),
        "one word answered": (0.20, rng.integers(45, 80, count)),
        "dialogues": (0.06, np.exp(rng.normal(6.6, 0.8, count)).clip(30, 2048)),
    }
    which = rng.choice(len(kinds), count, p=[share for share, _ in kinds.values()])
    tokens = np.choose(which, [lengths for _, lengths in kinds.values()]).astype(np.int32)
    image = which < 3
    visual, crops = np.where(image, 576, 0), np.where(image, rng.choice([3, 4, 5], count, p=[0.2, 0.2, 0.6]), 0)
    return np.stack([tokens + visual, crops, visual], axis=1).astype(np.int32)


@given(SIZES, st.integers(1, 20), st.integers(0, 5))
def test_every_example_is_in_one_pack_and_no_pack_is_too_full(rows, window, seed):
    sizes = as_sizes(rows)
    examples = np.random.default_rng(seed).permutation(len(sizes))
    packs = pack(examples, sizes, LIMITS, window)
    assert sorted(packs.members.tolist()) == list(range(len(sizes)))
    for number in range(len(packs)):
        inside = packs[number]
        assert 1 <= len(inside) <= LIMITS.examples
        assert (sizes[inside].sum(axis=0) <= LIMITS[:3]).all()
    again = pack(examples, sizes, LIMITS, window)
    np.testing.assert_array_equal(again.members, packs.members)
    np.testing.assert_array_equal(again.starts, packs.starts)


@given(SIZES, st.integers(1, 20))
def test_a_pack_begins_with_the_example_that_waits_longest(rows, window):
    sizes = as_sizes(rows)
    packs = pack(np.arange(len(sizes)), sizes, LIMITS, window)
    left = set(range(len(sizes)))
    for number in range(len(packs)):
        inside = packs[number]
        assert inside[0] == min(left)
        assert max(inside) < min(left) + window + sum(place > min(left) for place in set(range(len(sizes))) - left)
        left -= set(inside)


def test_a_row_that_comes_several_times_is_packed_as_often():
    packs = pack(np.array([0, 1, 0, 0]), as_sizes([(20, 0, 0), (30, 0, 0)]), LIMITS, 4)
    assert sorted(packs.members.tolist()) == [0, 0, 0, 1]


def test_two_that_fill_a_row_to_the_last_token_are_found():
    sizes = as_sizes([(10, 0, 0), (25, 0, 0), (24, 0, 0), (13, 0, 0), (17, 0, 0)])
    packs = pack(np.arange(5), sizes, LIMITS, 5)
    assert sorted(packs[0]) == [0, 3, 4]  # 10 + 13 + 17 = 40; the longest first would end at 35


def test_text_fills_rows_whose_crop_slots_are_taken():
    sizes = as_sizes([(12, 6, 4), (12, 6, 4), (12, 0, 0), (14, 0, 0), (26, 6, 4)])
    packs = pack(np.arange(5), sizes, LIMITS, 5)
    assert [sorted(packs[number]) for number in range(len(packs))] == [[0, 2, 3], [1], [4]]


def test_unusable_examples_take_a_place_and_no_room():
    sizes = as_sizes([(40, 0, 0), (0, 0, 0), (0, 0, 0), (40, 0, 0)])
    packs = pack(np.arange(4), sizes, LIMITS._replace(examples=2), 4)
    assert sorted(packs.members.tolist()) == [0, 1, 2, 3]
    assert len(packs) == 2


def test_an_example_larger_than_a_pack_is_refused():
    with pytest.raises(
        ValueError, match=r"record 1 of the source takes \[41, 2, 3\] tokens.* a pack has \[40, 10, 24\]; measure"
    ):
        pack(np.arange(2), as_sizes([(4, 0, 0), (41, 2, 3)]), LIMITS, 4)


def test_packs_keep_their_members_when_their_order_changes():
    packs = pack(np.arange(200), instruction_mix(200), RECIPE, 64)
    order = np.random.default_rng(0).permutation(len(packs))
    moved = packs.reordered(order)
    assert [moved[place] for place in range(len(packs))] == [packs[int(number)] for number in order]


@pytest.mark.parametrize("window", [64, 256])
def test_at_least_95_percent_of_the_token_slots_are_useful(window):
    sizes = instruction_mix(4000)
    packs = pack(np.arange(4000), sizes, RECIPE, window)
    assert packs.fill(sizes)[0] >= 0.95 * len(packs) * RECIPE.tokens
    assert sizes[:, 0].sum() < 0.4 * len(sizes) * RECIPE.tokens  # what padding would reach


def test_the_table_says_how_well_rows_are_used():
    sizes = as_sizes([(30, 5, 8), (10, 0, 0), (20, 5, 8), (0, 0, 0)])
    packs = pack(np.arange(4), sizes, LIMITS, 4)
    assert len(packs) == 2
    console = Console(width=120)
    with console.capture() as captured:
        console.print(describe_packs(packs, sizes, LIMITS, rows=4, filled=2.0))
    shown = [" ".join(line.replace("│", " ").split()) for line in captured.get().splitlines()]
    assert "examples 4, 1 of them unusable" in shown
    assert "packs 2" in shown
    assert "examples per pack 2.00 (1 to 3 of 5)" in shown
    assert "useful token slots 75.0% of 40" in shown
    assert "used crop slots 50.0% of 10" in shown
    assert "without packing 37.5% useful token slots" in shown
    assert "rows per step 4, 2.00 of them filled: 37.5% useful token slots" in shown
    assert "examples per step 4.0" in shown


def make_schedule(count: int, batch_size: int, divisor: int = 1, *, shuffle: bool = True, seed: int = 0) -> PackedBatches:
    order = EpochOrder((count,), (1.0,), seed, shuffle)
    return PackedBatches(order, instruction_mix(count), RECIPE, 32, batch_size, divisor)


def given_out(schedule: PackedBatches, numbers: range) -> list[int]:
    return [index for number in numbers for row in schedule.step(number).rows for index in row]


@settings(max_examples=12, deadline=None)
@given(st.integers(20, 80), st.integers(4, 24), st.sampled_from([1, 2, 3, 8]), st.booleans())
def test_an_epoch_gives_every_example_once_and_steps_the_recipes_number(count, batch_size, divisor, shuffle):
    schedule = make_schedule(count, batch_size, divisor, shuffle=shuffle)
    epochs = 4
    seen = given_out(schedule, range(schedule.steps(epochs) + 2))
    for epoch in range(epochs - 1):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert schedule.rows % divisor == 0
    assert all(len(schedule.step(number).rows) == schedule.rows for number in range(4))
    per_step = schedule.filled * count / len(schedule.epoch(0))
    assert abs(per_step - batch_size) <= Fraction(2, 100) * batch_size
    assert schedule.filled <= schedule.rows < schedule.filled + divisor + 1
    assert schedule.step(1) == make_schedule(count, batch_size, divisor, shuffle=shuffle).step(1)


@pytest.mark.parametrize("divisor", [1, 8])
@pytest.mark.parametrize("epochs", [0.5, 1, 3])
def test_packed_and_padded_runs_take_the_same_number_of_steps(divisor, epochs):
    packed, padded = make_schedule(3000, 32, divisor), PaddedBatches(EpochOrder((3000,), (1.0,), 0), 32)
    assert packed.steps(epochs) == pytest.approx(padded.steps(epochs), rel=0.021)
    steps = packed.steps(epochs)
    assert len(given_out(packed, range(steps))) / steps == pytest.approx(32, rel=0.03)


def test_epochs_and_seeds_have_orders_of_their_own():
    schedule, other = make_schedule(60, 8), make_schedule(60, 8, seed=1)
    firsts = [schedule.epoch(0)[0], schedule.epoch(1)[0], other.epoch(0)[0]]
    assert firsts[0] != firsts[1]
    assert firsts[0] != firsts[2]
    plain = make_schedule(60, 8, shuffle=False)
    assert plain.epoch(0)[0] == plain.epoch(1)[0]
    assert plain.epoch(0)[0][0] == 0


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 30), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4, 8]))
def test_a_run_goes_on_with_another_number_of_devices(stop, before, after):
    saved, resumed = (make_schedule(50, 8, divisor, shuffle=False) for divisor in (before, after))
    first = resumed.resume(saved.place(stop))
    assert resumed.place(first) == saved.place(stop)
    if before == after:
        assert first == stop
        assert resumed.step(first) == saved.step(stop)
    both = given_out(saved, range(stop)) + given_out(resumed, range(first, first + 24))
    for epoch in range(3):
        assert sorted(both[epoch * 50 : (epoch + 1) * 50]) == list(range(50))
    assert resumed.step(0).rows[0], "the first batch of all is still whole"


def test_a_batch_smaller_than_a_row_is_refused():
    with pytest.raises(
        ConfigError, match=r"batch_size 1 is less than the 2.\d examples of a packed row; raise it to 3 or more, or"
    ):
        make_schedule(60, 1)


TINY = {
    "data.template": "direct",
    "data.tokenizer": "bytes",
    "data.max_length": 96,
    "data.max_images": 2,
    "data.packing.enabled": True,
    "data.packing.max_examples": 6,
    "data.packing.max_images": 3,
}


def stepper(config: Config, source: MadeExamples, measured: MadeExamples | None = None) -> BatchLoader:
    """Steps of 6 examples of `source`, planned from the lengths of `measured`."""
    sizes = measure_rows(range(len(source)), measured or source, Encoder(config.data_spec))
    order = EpochOrder((len(source),), (1.0,), 0)
    schedule = PackedBatches(order, sizes, RowCapacity.of(config.data_spec), 16, 6)
    return BatchLoader(source, Encoder(config.data_spec), schedule, sizes, 0, 1)


def segments(batch: Batch, patches: int) -> dict[int, list[np.ndarray]]:
    """By example: its tokens, targets, weights and positions, and what its visual tokens show, all read off the batch."""
    found = {}
    for row, ids in enumerate(batch.example_id):
        for segment, index in enumerate(ids):
            here = np.flatnonzero(batch.segment_ids[row] == segment + 1)
            if index < 0 or not here.size:
                continue
            assert (np.diff(here) == 1).all()
            texts = [array[row, here] for array in (batch.tokens, batch.targets, batch.loss_weights, batch.positions)]
            placed = batch.visual_index[row, here]
            pictures = [batch.token_source[row, placed[placed >= 0]], *batch.stack_source[row][:, placed[placed >= 0]]]
            shown = [shows(batch.pixels[row], source, patches) for source in pictures]
            found[int(index)] = [*texts, placed >= 0, *shown]
    return found


def shows(pixels: np.ndarray, source: np.ndarray, patches: int) -> np.ndarray:
    """The crop of every encoded token and its number in the crop, or the sentinel and nothing."""
    crops = pixels.reshape(len(pixels), -1)[np.maximum(source, 0) // patches] * (source >= 0)[:, None]
    return np.concatenate([np.where(source >= 0, source % patches, source)[:, None], crops], axis=1)


VARIANTS = {
    "L": {},
    "V": {"deepstack.into": "vision", "image.grid": "square"},
    "HD": {"image.mode": "hd", "data.max_length": 160},
    "pad": {"image.mode": "pad", "deepstack.stack": "none"},
}


@pytest.mark.filterwarnings("ignore:.*maps fall after the tower layer")
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_unpacked_for_every_example(variant):
    config = tiny_config(TINY | VARIANTS[variant])
    alone = tiny_config(TINY | VARIANTS[variant] | {"data.packing.enabled": False})
    source = MadeExamples(30)
    packed, steps = stepper(config, source), 6
    together: dict[int, list[np.ndarray]] = {}
    for number in range(steps):
        delivered = packed(number)
        assert delivered.batch.tokens.shape == (packed.schedule.rows, config.data.max_length)
        assert delivered.examples == len(packed.rows(number)[0][0]) + sum(map(len, packed.rows(number)[0][1:]))
        together |= segments(delivered.batch, config.layout.patches)
    assert len(together) >= 25
    order = PaddedBatches(EpochOrder((30,), (1.0,), 0), 30)
    padded = BatchLoader(source, Encoder(alone.data_spec), order, None, 0, 1)
    apart = segments(padded(0).batch, alone.layout.patches)
    for index, arrays in together.items():
        for ours, theirs in zip(arrays, apart[index], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert max(len(row) for number in range(steps) for row in packed.rows(number)[0]) > 1


@pytest.mark.parametrize("what", ["broken", "changed", "refused"])
def test_an_unusable_example_is_blank_in_its_place_and_the_others_stay_where_they_were(what):
    config, good = tiny_config(TINY), MadeExamples(30)
    maker = stepper(config, good)
    row = next(row for row in maker.rows(0)[0] if len(row) > 1 and any(index % 4 in (1, 3) for index in row[:-1]))
    victim = next(index for index in row[:-1] if index % 4 in (1, 3))
    bad = stepper(config, MadeExamples(30, **{what: (victim,)}), measured=good)
    whole, blanked = maker(0), bad(0)
    assert [example.index for example in blanked.bad] == [victim]
    reason = {"broken": "cannot read image", "changed": "its data changed since", "refused": f"row {victim} is refused"}
    assert reason[what] in blanked.bad[0].reason
    assert blanked.examples == whole.examples
    np.testing.assert_array_equal(blanked.batch.example_id, whole.batch.example_id)

    at, segment = np.argwhere(whole.batch.example_id == victim)[0]
    theirs = whole.batch.segment_ids[at] == segment + 1
    for name in ("loss_weights", "segment_ids", "tokens"):
        assert not getattr(blanked.batch, name)[at, theirs].any()
    assert (blanked.batch.visual_index[at, theirs] == -1).all()
    for name in ("tokens", "targets", "loss_weights", "positions", "segment_ids", "visual_index"):
        ours, before = getattr(blanked.batch, name).copy(), getattr(whole.batch, name).copy()
        ours[at, theirs] = before[at, theirs] = 0
        np.testing.assert_array_equal(ours, before)
    ours, before = segments(blanked.batch, config.layout.patches), segments(whole.batch, config.layout.patches)
    assert before.keys() - ours.keys() == {victim}
    for index in ours:
        for one, other in zip(ours[index], before[index], strict=True):
            np.testing.assert_array_equal(one, other)


def test_shapes_and_room_come_from_the_configuration():
    config = tiny_config(TINY)
    assert config.data_spec.batch_shape(3, 96) == (3, 96, 15, 8, 12, 4, 6)
    assert config.data_spec.padded_shape(3, 96) == (3, 96, 10, 8, 8, 4, 1)
    assert RowCapacity.of(config.data_spec) == (96, 15, 12, 6)
    assert tiny_config(TINY | {"data.packing.max_images": 100}).data_spec.images_per_row == 96 // 4
    plain = tiny_config(TINY | {"data.packing.enabled": False})
    assert plain.data_spec.batch_shape(3, 96) == plain.data_spec.padded_shape(3, 96) == config.data_spec.padded_shape(3, 96)


def test_packing_that_cannot_work_is_refused():
    with pytest.raises(ConfigError, match=r"packing.max_images 1 is below config.data.max_images 2: .* at least 2"):
        tiny_config(TINY | {"data.packing.max_images": 1})
    with pytest.raises(ConfigError, match=r"data.buckets \(64,\) with packing, whose rows are all 96 long; set buckets=\(\)"):
        tiny_config(TINY | {"data.buckets": (64,)})
    with pytest.raises(ConfigError, match=r"data.overlong got 'clip'; "):
        tiny_config(TINY | {"data.overlong": "clip"})
    for key in ("window", "max_examples", "max_images"):
        with pytest.raises(ConfigError, match=rf"data.packing.{key} got 0"):
            tiny_config(TINY | {f"data.packing.{key}": 0})


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=40), st.integers(1, 12)
)
def test_no_pack_is_overfull_where_equal_lengths_have_other_visual_tokens(sizes, window):
    """Examples of equal tokens and crops may differ in visual tokens, as those of several images do."""
    limits = RowCapacity(tokens=12, crops=4, visual=9, examples=4)
    wanted = np.array(sizes, np.int32)
    packs = pack(np.arange(len(wanted)), wanted, limits, window)
    filled = [wanted[packs[number]].sum(axis=0) for number in range(len(packs))]
    assert all((total <= limits[:3]).all() for total in filled)
    assert sorted(row for number in range(len(packs)) for row in packs[number]) == list(range(len(wanted)))


def test_two_of_one_kind_are_weighed_one_by_one():
    sizes = np.array([[2, 1, 1], [5, 1, 1], [5, 1, 9]], np.int32)
    packs = pack(np.arange(3), sizes, RowCapacity(tokens=12, crops=4, visual=9, examples=4), 3)
    assert [sorted(packs[number]) for number in range(len(packs))] == [[0, 1], [2]]
