"""The demo's pages: blind at low resolution, exact at high resolution, disjoint between the splits."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from deepstack_jax.data.synthetic import (
    AMPLITUDE,
    CHANCE,
    FONT,
    INK,
    QUESTION_WORDS,
    SHADE_WORDS,
    SHADES,
    VOCABULARY,
    DocumentPages,
    digit_tiles,
    draw_page,
)

CELLS = 16  # 2x2 cells along a box


# Where a glyph may be in a box of the checker style.
PLACES = len(digit_tiles("checker")[1])


def per_box(high: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.int64, 16, elements=st.integers(0, high - 1))


def low_res(page: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(page).resize((64, 64), Image.Resampling.BOX))


def box_of(view: np.ndarray, box: int) -> np.ndarray:
    side = len(view) // 4
    row, column = divmod(box, 4)
    return view[row * side : (row + 1) * side, column * side : (column + 1) * side, 0].astype(int)


def find_digit(ink: np.ndarray, dots: np.ndarray) -> tuple[int, int, int]:
    """(digit, y, x) of the only glyph placement that gives exactly this ink map."""
    _, height, width = dots.shape
    found = []
    for y in range(CELLS - height + 1):
        for x in range(CELLS - width + 1):
            window = ink[y : y + height, x : x + width]
            if window.sum() == ink.sum():
                found += [(digit, y, x) for digit in range(10) if np.array_equal(window, dots[digit])]
    assert len(found) == 1, found
    return found[0]


def read_digit(page: np.ndarray, box: int) -> tuple[int, int, int]:
    """Digit and place from the full-resolution checker page: a cell is ink where its top left is the brighter phase."""
    pixels = box_of(page, box)
    return find_digit(pixels[::2, ::2] > pixels[::2, 1::2], FONT)


@settings(max_examples=40, deadline=None)
@given(per_box(10), per_box(10), per_box(4), per_box(PLACES), per_box(PLACES))
def test_pages_that_differ_in_digits_alone_have_bit_identical_low_res_views(digits, others, shades, places, elsewhere):
    view = low_res(draw_page("checker", digits, shades, places))
    np.testing.assert_array_equal(view, low_res(draw_page("checker", others, shades, elsewhere)))
    uniform = np.asarray(SHADES)[shades].reshape(4, 4).repeat(16, 0).repeat(16, 1)
    np.testing.assert_array_equal(view, uniform[:, :, None].repeat(3, 2))


def test_the_area_filter_is_blind_and_bicubic_is_not():
    """Whoever changes the low-res filter of the demo must change the pattern too."""
    zeros = np.zeros(16, int)
    one, two = (Image.fromarray(draw_page("checker", zeros + digit, zeros, zeros)) for digit in (1, 2))
    filters = Image.Resampling
    assert one.resize((64, 64), filters.BOX).tobytes() == two.resize((64, 64), filters.BOX).tobytes()
    assert one.resize((64, 64), filters.BICUBIC).tobytes() != two.resize((64, 64), filters.BICUBIC).tobytes()


def test_the_full_page_determines_every_digit_at_every_place_and_shade():
    _, corners = digit_tiles("checker")
    digits, places = (grid.ravel() for grid in np.meshgrid(np.arange(10), np.arange(len(corners))))
    for start in range(0, len(digits), 16):
        some, there = digits[start : start + 16], places[start : start + 16]
        page = draw_page("checker", some, np.arange(16) % 4, there)
        for box in range(16):
            digit, y, x = read_digit(page, box)
            assert digit == some[box]
            corner = corners[there[box]]
            assert (y // 8, x // 8) == divmod(int(corner), 2), "starts in its corner"
            assert ((y + 6) // 8, (x + 4) // 8) == divmod(int(corner), 2), "ends in its corner"


def test_every_gray_level_is_the_shade_plus_or_minus_the_amplitude():
    shades = np.arange(16) % 4
    for style in ("checker", "legible"):
        places = np.arange(16) % len(digit_tiles(style)[1])
        page = draw_page(style, np.arange(16) % 10, shades, places)
        assert page.dtype == np.uint8
        assert page.shape == (128, 128, 3)
        for box in range(16):
            shade = SHADES[shades[box]]
            assert set(np.unique(box_of(page, box))) == (
                {shade - AMPLITUDE, shade + AMPLITUDE} if style == "checker" else {shade - INK, shade}
            )


@pytest.mark.parametrize("style", ["checker", "legible"])
def test_questions_are_answered_by_the_page(style):
    source = DocumentPages(seed=3, length=60, style=style)
    for page in map(source.__getitem__, range(len(source))):
        assert len(page.messages) == 24
        assert [message.role for message in page.messages] == ["human", "gpt"] * 12
        assert page.messages[0].text.startswith("<image>\n")
        assert sum(message.text.count("<image>") for message in page.messages) == 1
        words = " ".join(message.text for message in page.messages).replace("<image>", "").split()
        assert set(words) <= set(VOCABULARY)
        asked = []
        for kind, question, answer in zip(page.info["kinds"], page.messages[::2], page.messages[1::2], strict=True):
            word = question.text.replace("<image>\n", "")
            row, column = divmod(QUESTION_WORDS[{"fine": "digit", "coarse": "shade"}[kind]].index(word), 4)
            if kind == "fine":
                assert answer.text == str(page.info["digits"][row, column])
            else:
                assert answer.text == SHADE_WORDS[page.info["shades"][row, column]]
            asked.append((kind, word))
        assert len(set(asked)) == 12, "no box twice within a kind"


def test_checker_pages_hold_the_digits_their_answers_name():
    source = DocumentPages(seed=5, length=20)
    for example in map(source.__getitem__, range(len(source))):
        (page,) = example.images
        assert isinstance(page, np.ndarray)
        for box in range(16):
            digit, y, x = read_digit(page, box)
            row, column = divmod(box, 4)
            assert digit == example.info["digits"][row, column]
            assert y // 8 * 2 + x // 8 == example.info["corners"][row, column]
            assert low_res(page)[row * 16, column * 16, 0] == SHADES[example.info["shades"][row, column]]


def test_the_legible_control_asks_the_same_and_is_readable_in_the_low_res_view():
    checker, legible = (DocumentPages(seed=5, length=20, style=style) for style in ("checker", "legible"))
    for index in range(20):
        hidden, plain = checker[index], legible[index]
        assert plain.messages == hidden.messages
        assert plain.info["kinds"] == hidden.info["kinds"]
        for key in ("digits", "shades"):
            np.testing.assert_array_equal(plain.info[key], hidden.info[key])
        (page,) = plain.images
        assert isinstance(page, np.ndarray)
        for box in range(16):
            view = box_of(low_res(page), box)
            shade = SHADES[plain.info["shades"].ravel()[box]]
            digit, _, _ = find_digit(view == shade - INK, FONT.repeat(2, 1).repeat(2, 2))
            assert digit == plain.info["digits"].ravel()[box]


def test_chance_without_the_high_res_view_is_one_in_ten():
    """Digits are uniform given everything that the low-res view shows; nothing but the page tells them."""
    source = DocumentPages(seed=11, length=2500)
    infos = [source[index].info for index in range(len(source))]
    digits = np.stack([info["digits"] for info in infos])
    shades = np.stack([info["shades"] for info in infos])
    for shade in range(4):
        share = np.bincount(digits[shades == shade], minlength=10) / (shades == shade).sum()
        np.testing.assert_allclose(share, CHANCE["fine"], atol=0.015)
    by_box = np.stack([(digits == digit).mean(axis=0) for digit in range(10)])
    np.testing.assert_allclose(by_box, CHANCE["fine"], atol=0.03)
    np.testing.assert_allclose(np.bincount(shades.ravel()) / shades.size, CHANCE["coarse"], atol=0.015)
    corners = np.stack([info["corners"] for info in infos])
    np.testing.assert_allclose(np.bincount(corners.ravel()) / corners.size, 0.25, atol=0.015)
    kinds = [kind for info in infos for kind in info["kinds"]]
    assert abs(kinds.count("fine") / len(kinds) - 0.7) < 0.015


def test_no_page_repeats_within_or_between_splits_and_seeds():
    sources = [DocumentPages(seed, 2000, split=split) for seed, split in ((0, "train"), (0, "validation"), (1, "train"))]
    pages = {image.tobytes() for source in sources for index in range(2000) for image in source[index].images}  # pyright: ignore
    assert len(pages) == 6000


def test_a_page_is_a_function_of_seed_split_and_index():
    source = DocumentPages(seed=2, length=10, split="validation")
    longer = pickle.loads(pickle.dumps(DocumentPages(seed=2, length=10_000, split="validation")))
    for index in (9, 0, np.int64(4)):
        one, two = source[index], longer[index]
        assert (one.index, one.name, one.messages) == (two.index, two.name, two.messages)
        assert one.index == index
        np.testing.assert_array_equal(one.images[0], two.images[0])


def test_a_page_may_be_changed_without_changing_the_next():
    source = DocumentPages(seed=2, length=1)
    (page,) = source[0].images
    assert isinstance(page, np.ndarray)
    before = page.copy()
    page[:] = 0
    np.testing.assert_array_equal(source[0].images[0], before)


def test_the_vocabulary_has_no_word_twice():
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 10 + 4 + 2 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "cheker"}, "style is 'cheker', expected one of checker, legible"),
        ({"split": "test"}, "split is 'test', expected one of train, validation"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"length": 0}, "length is 0, expected at least 1"),
        ({"questions": 17}, r"questions is 17, expected 1\.\.16"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DocumentPages(**{"seed": 0, "length": 4} | arguments)


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_the_source_is_an_error(index):
    with pytest.raises(IndexError, match=r"outside 0\.\.3"):
        DocumentPages(seed=0, length=4)[index]
