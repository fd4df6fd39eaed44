"""The laboratory's cards: blind at low resolution, a digit a box at high resolution, questions that do not tell each other."""

import numpy as np
import pytest
from PIL import Image

from deepstack_jax.config import ConfigError, build_config, default_config
from deepstack_jax.data.cards import (
    BOXES,
    CHANCE,
    DARKER,
    FONT,
    KINDS,
    MARKS,
    QUESTION_WORDS,
    SIDES,
    VOCABULARY,
    Cards,
    draw_card,
)
from deepstack_jax.data.encode.image import make_views
from deepstack_jax.data.open import open_source

GRIDS = ((2, 2), (1, 2), (2, 1), (1, 4), (4, 1), (4, 3))


def low_res(card: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(card).resize((48, 48), Image.Resampling.BOX))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_low_res_view_shows_marks_and_dark_halves_and_nothing_else(grid):
    source = Cards(0, 10, grids=(grid,))
    for index in range(3):
        example = source[index]
        plain = MARKS[example.info["marks"]].reshape(3, 3, 3).repeat(16, 0).repeat(16, 1)
        view = low_res(example.images[0]).astype(int)
        for box, side in enumerate(example.info["sides"]):
            y, x = box // 3 * 16, box % 3 * 16
            darker = plain[y : y + 16, x : x + 16] - view[y : y + 16, x : x + 16]
            half = {"top": np.s_[:8], "bottom": np.s_[8:], "left": np.s_[:, :8], "right": np.s_[:, 8:]}[SIDES[side]]
            assert (darker[half] == DARKER).all()
            assert darker.sum() == darker[half].sum()  # and the rest is the mark itself


@pytest.mark.parametrize("grid", GRIDS)
def test_every_digit_can_be_read_from_one_patch_of_the_card(grid):
    example = Cards(1, 10, grids=(grid,))[4]
    rows, cols = grid
    card = example.images[0]
    assert card.shape == (48 * rows, 48 * cols, 3)
    for box, (digit, place) in enumerate(zip(example.info["digits"], example.info["places"], strict=True)):
        y, x = (box // 3 * rows + place // cols) * 16, (box % 3 * cols + place % cols) * 16
        patch = card[y : y + 16, x : x + 16, 0].astype(int)
        ink = patch[::2, ::2] > patch[::2, 1::2]
        np.testing.assert_array_equal(ink[:7, 1:6], FONT[digit])
        assert ink.sum() == FONT[digit].sum()


def test_a_blurred_card_is_its_low_res_view():
    example, sharp = Cards(0, 10, sharp=False)[2], Cards(0, 10)[2]
    assert example.messages == sharp.messages
    np.testing.assert_array_equal(low_res(example.images[0]), low_res(sharp.images[0]))
    np.testing.assert_array_equal(example.images[0], low_res(sharp.images[0]).repeat(2, 0).repeat(2, 1))


def test_answers_are_those_of_the_boxes_asked_for():
    for index in range(40):
        example = Cards(3, 100)[index]
        info, asked = example.info, []
        of_mark = np.argsort(info["marks"])
        turns = zip(example.messages[::2], example.messages[1::2], info["kinds"], strict=True)
        for question, answer, kind in turns:
            word = question.text.removeprefix("<image>\n")
            number = QUESTION_WORDS[kind].index(word)
            box = {"coarse": of_mark[number], "fine": number, "cued": of_mark[number], "before": of_mark[number] - 1}[kind]
            assert answer.text == (SIDES[info["sides"][box]] if kind == "coarse" else str(info["digits"][box]))
            asked.append(box)
        assert sorted(asked) == list(range(BOXES))  # none twice, none of the wrapped -1


def test_kinds_have_their_shares_and_a_blind_guess_its_chance():
    kinds, right = [], []
    for index in range(300):
        example = Cards(5, 1000)[index]
        kinds += example.info["kinds"]
        right += [answer.text == "7" for answer in example.messages[1::2]]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in KINDS}
    assert all(abs(shares[kind] - KINDS[kind]) < 0.04 for kind in KINDS)
    fine = [hit for hit, kind in zip(right, kinds, strict=True) if kind == "fine"]
    assert abs(np.mean(fine) - CHANCE["fine"]) < 0.03
    assert set(CHANCE) == set(KINDS)
    assert len(VOCABULARY) == len(set(VOCABULARY))


def test_unseen_grids_are_on_held_out_cards_alone_and_their_kinds_say_so():
    train = Cards(0, 200, unseen=((1, 4),), split="train")
    held_out = Cards(0, 200, unseen=((1, 4),), split="validation")
    assert {train[index].info["grid"] for index in range(60)} == {(2, 2)}
    found = {example.info["grid"]: set(example.info["kinds"]) for example in map(held_out.__getitem__, range(60))}
    assert set(found) == {(2, 2), (1, 4)}
    assert found[2, 2] <= set(KINDS)
    assert found[1, 4] <= {f"{kind}_unseen" for kind in KINDS}


def test_splits_and_seeds_share_no_card():
    cards = [Cards(seed, 5, split=split)[1].images[0].tobytes() for seed in (0, 1) for split in ("train", "validation")]
    assert len(set(cards)) == 4
    np.testing.assert_array_equal(Cards(0, 5)[1].images[0], Cards(0, 9)[1].images[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "expected one of train, validation"),
        ({"questions": 10}, "questions 10: expected"),
        ({"grids": ((3, 3),)}, "grid 3x3 must have an even side"),
        ({"grids": ()}, "name at least one"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Cards(0, 10, **arguments)
    with pytest.raises(IndexError, match="card 10 is outside"):
        Cards(0, 10)[10]


def test_the_configuration_opens_them():
    config = default_config()
    config.data.source = "cards"
    config.data.cards.seed = 4
    config.data.cards.grids = ((1, 2), (2, 2))
    config.data.tokenizer = "words:" + " ".join(VOCABULARY)
    source = open_source(build_config(config).data, "validation")
    assert isinstance(source, Cards)
    assert (source.seed, source.grids, source.split) == (4, ((1, 2), (2, 2)), "validation")
    for grids, message in (((3, 1),), "3x1: one side must be even"), ((), "grids is empty"):
        config.data.cards.grids = grids
        with pytest.raises(ConfigError, match=message):
            build_config(config)
    config.data.source = "card"
    with pytest.raises(ConfigError, match="cards"):
        build_config(config)


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)])
def test_crops_keep_every_pixel(grid):
    config = default_config()
    config.image.size, config.image.crop_filter, config.image.global_filter = 48, "nearest", "box"
    config.vision.patch_size = 16
    zeros = np.zeros(9, int)
    card = draw_card(grid, zeros + 8, np.arange(9), zeros, zeros, True)
    views = make_views(Image.fromarray(card), build_config(config).image)
    assert views.grid == grid
    rows, cols = grid
    joined = views.pixels[1:].reshape(rows, cols, 48, 48, 3).swapaxes(1, 2).reshape(card.shape)
    np.testing.assert_array_equal(joined, card)
