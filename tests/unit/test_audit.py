"""The audit page: colours and labels against counts made another way, bad samples, and HTML that needs nothing outside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.small_tokenizer import train_bpe
from deepstack_jax.audit import pictures, survey
from deepstack_jax.audit.cards import make_card
from deepstack_jax.audit.charts import draw_charts
from deepstack_jax.audit.inputs import ModelInput, injecting_layers, model_input
from deepstack_jax.audit.page import layer_tags, method, quarantined, render_page
from deepstack_jax.audit.prompt import prompt_runs, special_names, token_texts
from deepstack_jax.batch import NEWLINE
from deepstack_jax.config import Config, build_config, default_config
from deepstack_jax.data.encode.encoder import Encoder
from deepstack_jax.data.encode.templates import get_template, images_to_front, render
from deepstack_jax.data.encode.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from deepstack_jax.data.example import BadExample, Example, ExampleError, Message
from deepstack_jax.data.order import lengths
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.printing import Console

GOLDEN = Path(__file__).parents[1] / "golden"
SIZE, PATCH, SIDE = 32, 8, 4
SMALL = {
    "image.size": SIZE,
    "vision.patch_size": PATCH,
    "vision.layers": 6,
    "decoder.layers": 6,
    "deepstack.start": 1,
    "data.tokenizer": "bytes",
    "data.template": "direct",
    "data.max_images": 2,
    "data.max_length": 512,
    "train.batch_size": 2,
}
SQUARE, WIDE = (64, 64), (96, 32)  # (width, height): grids 2x2 and 1x3
TURNS = (Message("human", "<image>\nWhat?"), Message("gpt", "A <b>café</b> 漢 & co."))


def small_config(**changes: object) -> Config:
    config = default_config()
    config.update_from_flattened_dict(SMALL | {key.replace("__", "."): value for key, value in changes.items()})
    return build_config(config)


class Listed:
    """Examples from a list; an exception in it is raised."""

    def __init__(self, examples: Sequence[Example | ExampleError]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index) -> Example:
        found = self.examples[index]
        if isinstance(found, ExampleError):
            raise found
        return found


def example(
    index: int, *sizes_wh: tuple[int, int], turns: Sequence[Message] = TURNS, gray: int | None = None, **info
) -> Example:
    """A conversation with images of these sizes, noise or an even gray."""
    rng = np.random.default_rng(index)
    pictures = [
        rng.integers(0, 256, (h, w, 3), dtype=np.uint8) if gray is None else np.full((h, w, 3), gray, np.uint8)
        for w, h in sizes_wh
    ]
    return Example(index, f"example{index}", tuple(pictures), tuple(turns), info)


def seen(config: Config, *sizes_wh: tuple[int, int], gray: int | None = None) -> ModelInput:
    turns = (Message("human", "<image>\n" * len(sizes_wh) + "What?"), TURNS[1])
    found = model_input(Listed([example(0, *sizes_wh, turns=turns, gray=gray)]), 0, config)
    assert isinstance(found, ModelInput), found
    return found


def sheets_of(config: Config, found: ModelInput) -> dict[str, pictures.Sheet]:
    layers = injecting_layers(config)
    token = config.vision.patch_size * config.deepstack.pool
    return {sheet.name: sheet for sheet in pictures.make_sheets(found.images[0], layers, config.layout, token)}


def blend(colour: Sequence[int] | np.ndarray, strength: float, gray: int) -> np.ndarray:
    return np.round(gray * (1 - strength) + np.array(colour, float) * strength).astype(np.uint8)


@pytest.mark.parametrize(("size_wh", "grid"), [(SQUARE, (2, 2)), (WIDE, (1, 3))])
def test_colours_follow_the_papers_dilated_sampling(size_wh, grid):
    config = small_config()
    found = seen(config, size_wh, gray=100)
    assert found.images[0].grid == grid
    sheet, colours = sheets_of(config, found)["crops"], pictures.layer_colours(4)
    painted = pictures.paint(sheet, colours)
    rows, cols = grid
    for y in range(rows * SIDE):
        for x in range(cols * SIDE):
            # Paper section 3.2, counted over the whole picture: token (y, x) is in group (y mod rows) * cols + (x mod cols),
            # and group k enters layer start + k.
            group = (y % rows) * cols + x % cols
            block = painted[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
            assert np.all(block == blend(colours[group], pictures.TINT, 100)), (y, x)
    card = make_card(1, found, config, ByteTokenizer())
    filled = [f"layer {1 + group}: {SIDE**2} tokens" for group in range(rows * cols)]
    assert [tag.label for tag in card.images[0].tags] == [*filled, "layer 4: exact zeros"][:4]


def test_the_global_view_is_not_coloured_and_nothing_is_unused():
    config = small_config()
    sheet = sheets_of(config, seen(config, SQUARE))["global view"]
    assert sheet.sequence.all()
    assert sheet.unused == 0
    np.testing.assert_array_equal(pictures.paint(sheet, pictures.layer_colours(4)), sheet.pixels)


def test_a_dummy_stack_shows_every_layer_in_each_token_and_the_crops_gray():
    config = small_config(deepstack__stack="dummy")
    found = seen(config, SQUARE, gray=100)
    sheets, colours = sheets_of(config, found), pictures.layer_colours(4)
    token = pictures.paint(sheets["global view"], colours)[:PATCH, :PATCH]
    for layer in range(4):
        assert np.all(token[:, 2 * layer : 2 * layer + 2] == blend(colours[layer], pictures.TINT, 100)), layer
    assert sheets["crops"].unused == 4 * SIDE**2
    assert np.all(pictures.paint(sheets["crops"], colours) == blend(pictures.GRAY, pictures.DIM, 100))


def test_a_schedule_may_skip_repeat_and_reorder_groups():
    config = small_config(deepstack__schedule=(-1, 3, -1, 0, 1, 0))
    assert [(layer.number, layer.group) for layer in injecting_layers(config)] == [(1, 3), (3, 0), (4, 1), (5, 0)]
    sheet = sheets_of(config, seen(config, SQUARE))["crops"]
    y, x = np.indices(sheet.sequence.shape) % 2
    for layer, (row, col) in enumerate([(1, 1), (0, 0), (0, 1), (0, 0)]):  # group 3 is the odd rows and columns, ...
        np.testing.assert_array_equal(sheet.injected[layer], (y == row) & (x == col))
    assert sheet.unused == 4 * SIDE**2 // 4  # group 2 is in no layer


def test_pixels_that_no_pooled_token_covers_are_gray():
    config = small_config(deepstack__pool=3)  # one token of 24 pixels per crop of 32: the last patch of each side is dropped
    sheet = sheets_of(config, seen(config, SQUARE, gray=100))["crops"]
    assert sheet.sequence.shape == (2, 2)
    painted, dropped = pictures.paint(sheet, pictures.layer_colours(4)), blend(pictures.GRAY, pictures.DIM, 100)
    gray = np.all(painted == dropped, axis=-1)
    inside = np.arange(64) % 32 < 24
    np.testing.assert_array_equal(gray, ~np.logical_and.outer(inside, inside))


def test_hd_cells_have_a_stack_each_and_the_upsampled_picture_is_put_together_again():
    config = small_config(image__mode="hd")
    found = seen(config, SQUARE)
    sheets = sheets_of(config, found)
    assert list(sheets) == ["global view", "cells", "global view, upsampled", "cells, upsampled"]
    original = Image.fromarray(np.asarray(example(0, SQUARE).images[0]))
    upsampled = original.resize((2 * 2 * SIZE, 2 * 2 * SIZE), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(sheets["cells, upsampled"].pixels, np.asarray(upsampled))
    # Each of the 4 cells and the global view is seen again in 2x2 crops, whose tokens are dealt into 4 groups of P.
    per_layer = sum(sheet.injected.sum(axis=(1, 2)) for sheet in sheets.values())
    np.testing.assert_array_equal(per_layer, [5 * SIDE**2] * 4)
    y, x = np.indices(sheets["cells, upsampled"].sequence.shape)
    np.testing.assert_array_equal(sheets["cells, upsampled"].injected.argmax(axis=0), y % 2 * 2 + x % 2)
    newlines = int((found.images[0].tokens == NEWLINE).sum())
    assert newlines == 2 * SIDE
    runs = prompt_runs(found, ByteTokenizer(), special_names(ByteTokenizer(), get_template("direct")))
    assert f"image 1: {5 * SIDE**2 + newlines} visual tokens, {newlines} newlines among them" in [
        p.text for _, run in runs for p in run
    ]


def test_vision_injection_names_layers_of_the_tower_and_groups_past_the_last_are_unused():
    config = small_config(deepstack__into="vision", image__grid="square", deepstack__vision_start=4)
    assert [layer.name for layer in injecting_layers(config)] == ["vision layer 4", "vision layer 5"]
    assert layer_tags(config)[-1].label == "never added, past the last layer: group 2, 3"
    assert "inside the vision tower" in method(config)
    assert sheets_of(config, seen(config, SQUARE))["crops"].unused == 2 * SIDE**2


@pytest.mark.parametrize(
    ("into", "layers", "said"),
    [
        ("input", {"layer 0"}, "hidden states of the decoder"),
        ("channels", {"part 1", "part 2", "part 3", "part 4"}, "channels"),
    ],
)
def test_groups_that_enter_at_once_are_all_used(into, layers, said):
    config = small_config(deepstack__into=into)
    assert {layer.name for layer in injecting_layers(config)} == layers
    assert not any("never added" in tag.label for tag in layer_tags(config))
    assert said in method(config)
    assert sheets_of(config, seen(config, SQUARE))["crops"].unused == 0


def test_letterbox_that_spatial_unpad_cuts_away_is_unused():
    config = small_config(
        image__mode="anyres", image__merge="spatial_unpad", image__pinpoints=((64, 64),), deepstack__stack="none"
    )
    found = seen(config, (64, 32))
    sheet = sheets_of(config, found)["crops"]
    # A picture twice as wide as high fills the middle half of a square: 2 of 8 token rows go above and below.
    np.testing.assert_array_equal(np.flatnonzero(sheet.sequence.all(axis=1)), [2, 3, 4, 5])
    assert sheet.unused == 4 * 8
    assert make_card(1, found, config, ByteTokenizer()).images[0].tags[0].label == "not used: 32 tokens"


def test_every_image_of_a_row_is_read_back_from_its_own_slots():
    config = small_config()
    both, alone = seen(config, SQUARE, WIDE), seen(config, SQUARE)
    assert [image.grid for image in both.images] == [(2, 2), (1, 3)]
    np.testing.assert_array_equal(both.images[0].pixels, alone.images[0].pixels)
    for image in both.images:
        used = np.union1d(image.tokens, image.stack)
        np.testing.assert_array_equal(used[used >= 0], np.arange(len(image.pixels) * SIDE**2))
    assert [int((both.image_of == image).sum()) for image in (0, 1)] == [SIDE**2] * 2


def test_many_layers_have_colours_of_their_own():
    for count in (0, 1, 8, 36):
        assert len(np.unique(pictures.layer_colours(count), axis=0)) == count


def test_prompt_is_the_conversation_and_marks_its_answers():
    config = small_config(data__template="v1")
    found = seen(config, SQUARE)
    template = get_template("v1")
    rendered = render(images_to_front(TURNS, template), template)
    runs = prompt_runs(found, ByteTokenizer(), special_names(ByteTokenizer(), template))
    names = {"BOS": "", "EOS": "</s>", f"image 1: {SIDE**2} visual tokens": "<image>"}
    text = "".join(names[piece.text] if piece.kind != "text" else piece.text for _, run in runs for piece in run)
    assert text == rendered.text
    marked = ["".join(names.get(piece.text, piece.text) for piece in run) for learnt, run in runs if learnt]
    assert marked == [rendered.text[start:end] for start, end in rendered.spans]
    hints = {piece.text: piece.hint for _, run in runs for piece in run}
    assert re.fullmatch(r"positions \d+ to \d+, ids \[\d+, \d+, \d+\]", hints["漢"])  # three bytes make up the character
    assert hints["BOS"] == "position 0, id 1"


def test_special_tokens_are_shown_as_the_template_writes_them():
    folder, template = str(GOLDEN / "tokenizer" / "phi3_rstrip"), get_template("phi3_instruct")
    config = small_config(data__template="phi3_instruct", data__tokenizer=folder, decoder__vocab_size=600)
    found = model_input(Listed([example(0, SQUARE)]), 0, config)
    assert isinstance(found, ModelInput)
    tokenizer = load_tokenizer(folder)
    runs = prompt_runs(found, tokenizer, special_names(tokenizer, template))
    special = [(piece.text, learnt) for learnt, run in runs for piece in run if piece.kind == "special"]
    assert [name for name, _ in special] == ["BOS", "<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]
    assert [learnt for _, learnt in special] == [False] * 6 + [True]


def test_a_card_says_how_much_was_cut():
    config = small_config(data__overlong="cut", data__max_length=40)
    source = Listed([example(0, SQUARE, turns=(TURNS[0], Message("gpt", answer))) for answer in ("x" * 60, "x")])
    cut, whole = (dict(make_card(1, model_input(source, row, config), config, ByteTokenizer()).facts) for row in (0, 1))
    tokens = len(Encoder(config.data_spec).text(source[0]).ids) - 1 + SIDE**2  # the placeholder is a token of its own
    assert cut["tokens"] == "40"
    assert cut["cut from its end"] == f"{tokens - 40} tokens"
    assert "cut from its end" not in whole


def _tokenizers(folder: Path) -> dict[str, Tokenizer]:
    bpe = train_bpe(["a pier on a lake, the pier and the lake"] * 4, 280, folder)
    models = {path.name: load_tokenizer(str(path)) for path in (GOLDEN / "tokenizer").iterdir() if "llama" in path.name}
    return {"bytes": ByteTokenizer(), "bpe": bpe, **models}


def test_tokens_joined_are_the_text_with_every_tokenizer(tmp_path):
    text = "the pier\n\n and  the läke 漢字 🙂 \ufffd end"
    for name, tokenizer in _tokenizers(tmp_path).items():
        ids = tokenizer.encode(text)[0].tolist()
        found = token_texts(ids, tokenizer)
        assert "".join(piece or "" for piece in found) == tokenizer.decode(ids), name
        assert any(piece == "" for piece in found), f"{name}: no character of several tokens"
        broken = ids[found.index("")]  # the first token of a character whose others do not come
        assert token_texts([broken, tokenizer.eos_id], tokenizer) == [tokenizer.decode([broken]), None], name


def test_measuring_without_decoding_agrees_with_the_batch():
    config = small_config()
    examples = [example(0, SQUARE), example(1, WIDE, set="photos"), example(2, turns=(Message("human", "Hi"), TURNS[1]))]
    for index, one in enumerate(examples):
        measured, found = survey.measure_sample(one, Encoder(config.data_spec)), model_input(Listed(examples), index, config)
        assert isinstance(found, ModelInput)
        assert measured.size == lengths.measure(one, Encoder(config.data_spec))
        assert measured.size.tokens == len(found.tokens)
        assert measured.size.visual == (found.image_of >= 0).sum()
        assert measured.supervised == found.supervised.sum() > 0
    assert survey.measure_sample(examples[1], Encoder(config.data_spec)).grids == ((1, 3),)
    assert survey.by_origin([survey.measure_sample(one, Encoder(config.data_spec)) for one in examples])[1][:2] == ("photos", 1)


def test_efficiencies_by_hand():
    config = small_config(data__max_length=40, data__buckets=(20,))
    sizes = np.array([[10, 0, 0], [20, 0, 0], [30, 0, 0], [20, 0, 0]], np.int32)
    # Batches of two: [10, 20] in the bucket of 20, [30, 20] in rows of 40.
    assert survey.padded_efficiency(sizes, config) == pytest.approx(80 / (2 * 20 + 2 * 40))
    share, per_row = survey.packed_efficiency(sizes, config)  # 10 + 30 and 20 + 20
    assert (share, per_row) == (1.0, 2.0)
    nothing = np.zeros((0, 3), np.int32)
    assert survey.padded_efficiency(nothing, config) == survey.packed_efficiency(nothing, config)[0] == 0


def test_rows_are_the_first_of_the_training_order_or_drawn_by_seed():
    config = small_config()
    source = Listed([example(index, SQUARE) for index in range(12)])
    stream = TrainingStream(source, config.data_spec)
    order = [row for step in range(3) for row in stream.examples(step)]
    assert survey.choose_rows(source, config, 6, None) == order
    drawn = survey.choose_rows(source, config, 6, 1)
    assert drawn == survey.choose_rows(source, config, 6, 1) != survey.choose_rows(source, config, 6, 2)
    assert sorted(survey.choose_rows(source, config, 100, 1)) == list(range(12))


class Page(HTMLParser):
    """Tags with their attributes, and the text inside some of them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.marked: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.stack.append(tag)
        if tag == "mark":
            self.marked.append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.text += data
        if "mark" in self.stack:
            self.marked[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def mixed() -> tuple[str, Config]:
    """The page of a usable, a text-only and three unusable samples."""
    config = small_config()
    two = (Message("human", "<image>\n<image>\nWhat?"), TURNS[1])
    examples = [
        example(0, SQUARE, WIDE, turns=two, data_source="photos"),
        example(1, turns=(Message("human", "Say <image>."), Message("gpt", "Hello"))),
        ExampleError("row 2 is damaged", "lost<one>"),
        example(3, SQUARE, turns=TURNS[:1]),
        Example(4, "torn", (b"\xff\xd8 no picture",), TURNS),
    ]
    source = Listed(examples)
    found = survey.survey(source, config, range(5), Console(file=StringIO()))
    cards = [
        make_card(number, model_input(source, row, config), config, ByteTokenizer()) for number, row in enumerate(range(5), 1)
    ]
    return render_page(config, found, cards, draw_charts(found, config), len(source)), config


def test_page_shows_every_sample_and_needs_nothing_outside_it(mixed):
    html, _ = mixed
    page = Page(html)
    articles = {article["id"]: article["class"] for article in page.all("article")}
    bad = {f"sample-{number}" for number in (3, 4, 5)}
    assert articles == {f"sample-{n}": "panel bad" if f"sample-{n}" in bad else "panel" for n in range(1, 6)}
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href", "action", "data"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:image/", "#")), f"<{tag} {name}={value[:80]}>"
    assert not re.search(r"url\(|@import|<script|<link", html)
    anchors = {str(link["href"]).removeprefix("#") for link in page.all("a")}
    assert anchors == set(articles)
    assert all(image["alt"] for image in page.all("img"))


def test_page_names_bad_samples_with_their_reasons(mixed):
    html, _ = mixed
    text = Page(html).text
    assert "Quarantined: 3" in text
    for name, reason in (
        ("lost<one>", "row 2 is damaged"),
        ("example3", "expected its last turn to be 'gpt'"),
        ("torn", "image"),
    ):
        assert text.count(name) >= 2, "in the list and as a card"
        assert reason in text
    assert "<one>" not in html


def test_what_a_browser_would_obey_comes_out_as_text():
    nasty = "\u202e\x1b]0;x\x07\x9b<script>alert(1)</script>\u2066'\"><img src=x>"
    config = small_config()
    turns = (Message("human", f"<image>\n{nasty}"), Message("gpt", f"a\n{nasty}"))
    source = Listed([example(0, SQUARE, turns=turns, data_source=nasty), ExampleError(f"row 1: {nasty}", f"{nasty}\n2")])
    found = survey.survey(source, config, range(2), Console(file=StringIO()))
    cards = [
        make_card(number, model_input(source, row, config), config, ByteTokenizer()) for number, row in enumerate(range(2), 1)
    ]
    config = replace(config, name=nasty, data=replace(config.data, train=nasty))
    html = render_page(config, found, cards, draw_charts(found, config), 2)
    assert not set(html) & set("\u202e\x1b\x07\x9b\u2066")
    assert "<script" not in html
    assert "<img src=x" not in html
    assert html.count("\\u202e\\u001b]0;x\\u0007\\u009b&lt;script") >= 6
    assert html.count('<span class="newline">') >= 2, "line ends of a prompt are still shown as such"


def test_page_marks_what_is_supervised_and_nothing_else(mixed):
    html, _ = mixed
    page = Page(html)
    legend, *marked = page.marked
    assert legend == "marked text"
    assert marked == [f" {TURNS[1].text}", " Hello"]  # with the space that the template puts before an answer
    assert "image 2: 16 visual tokens" in page.text
    assert "Say <image>." in page.text  # a word where there is no image
    assert "Text only: no image." in page.text
    # An end of turn that is learnt must look it: the label of a special token would hide the mark after it.
    assert re.search(r"\nmark \.label \{ background: none;", html)


def test_page_of_data_that_is_all_bad():
    config = small_config()
    source = Listed([ExampleError(f"row {row} is damaged", f"lost{row}") for row in range(3)])
    found = survey.survey(source, config, range(3), Console(file=StringIO()))
    cards = [make_card(1, model_input(source, 0, config), config, ByteTokenizer())]
    assert quarantined(found, cards) == [BadExample(row, f"lost{row}", f"row {row} is damaged") for row in range(3)]
    text = Page(render_page(config, found, cards, draw_charts(found, config), 3)).text
    assert "none of the 3 looked at can be used" in text


def test_an_example_that_would_stop_the_run_is_a_bad_sample_here():
    config = small_config(data__overlong="error", data__max_length=40)
    source = Listed([example(0, SQUARE, turns=(TURNS[0], Message("gpt", "x" * 60)))])
    found = model_input(source, 0, config)
    assert isinstance(found, BadExample)
    assert re.search(r"a row holds 40; .*max_length.*the run would stop here", found.reason)
    assert survey.survey(source, config, [0], Console(file=StringIO())).bad == (found,)


def test_views_that_do_not_make_up_the_picture_are_refused():
    config = small_config()
    image = seen(config, SQUARE).images[0]
    torn = type(image)(image.size_wh, (1, 3), image.pixels, image.tokens, image.stack)
    with pytest.raises(ValueError, match="5 views do not make up"):
        pictures.make_sheets(torn, injecting_layers(config), config.layout, PATCH)
