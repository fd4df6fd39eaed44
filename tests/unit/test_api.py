"""The Python API on a tiny model with random weights: what goes in, what comes out, and what is said to a mistake."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import deepstack_jax as dsx
from deepstack_jax import api
from deepstack_jax.api import LMM, Options
from deepstack_jax.data.encode.image import ImageError
from deepstack_jax.data.encode.labels import IMAGE_TOKEN
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.families.build import build_model
from deepstack_jax.generate.logits import padded_left, real_tokens
from deepstack_jax.generate.options import RequestError
from deepstack_jax.model.attention import dot_product
from deepstack_jax.parallel.kernels import Kernels, SplashAttention
from tests.unit.tiny import make_batch, model_params, tiny_config

CONFIG = tiny_config({"decoder.vocab_size": 259, "data.template": "v0", "decoder.max_positions": 256})
PROMPTS = ["hi", "Where <image> is?", "same as <image> or <image> or <image>?", ""]
QUICK = {"max_new_tokens": 6, "template": "direct"}


def picture(seed, width=20, height=12):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [[], [picture(0)], [picture(1), picture(2, 8, 24), picture(3)], [picture(4)]]


@pytest.fixture(scope="module")
def lmm():
    params = model_params(build_model(CONFIG), make_batch(CONFIG, [[]]), seed=3)
    params["head"]["kernel"] = params["head"]["kernel"].at[:, [*range(36), *range(130, 259)]].set(0)  # readable bytes only
    return LMM(CONFIG, params, load_tokenizer("bytes"), "v0")


@pytest.fixture(scope="module")
def together(lmm):
    return lmm.generate(IMAGES, PROMPTS, **QUICK)


def test_a_string_in_gives_a_string_and_a_list_a_list(lmm, together):
    assert isinstance(together, list)
    assert len(set(together)) == 4
    for images, prompt, answer in zip(IMAGES, PROMPTS, together, strict=True):
        assert lmm.generate(images, prompt, **QUICK) == answer
    assert lmm.generate(None, PROMPTS[:1], **QUICK) == together[:1]
    assert lmm.generate(IMAGES, PROMPTS, batch_size=3, **QUICK) == together


def test_a_stream_joins_to_the_answer(lmm, together):
    for images, prompt, answer in zip(IMAGES, PROMPTS, together, strict=True):
        assert "".join(lmm.stream(images, prompt, **QUICK)) == answer


def test_images_in_every_form_are_the_same(lmm, together, tmp_path):
    image = IMAGES[1][0]
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), data, np.asarray(image)):
        assert lmm.generate([form], PROMPTS[1], **QUICK) == together[1]


def test_a_single_image_is_taken_for_a_list_of_one(lmm, together, tmp_path):
    image, prompt = IMAGES[1][0], PROMPTS[1]
    image.save(tmp_path / "a.png")
    for form in (image, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), np.asarray(image)):
        assert lmm.answers([(form, prompt)], Options(**QUICK))[0].text == together[1]
    assert lmm.generate(image, prompt, **QUICK) == together[1]
    assert lmm.generate([image, image], [prompt, prompt], **QUICK) == [together[1]] * 2
    assert "".join(lmm.stream(image, prompt, **QUICK)) == lmm.chat(**QUICK).ask(prompt, image) == together[1]
    ids = [[1, 7, IMAGE_TOKEN, 8]]
    np.testing.assert_array_equal(lmm.logits(ids, [image]), lmm.logits(ids, [[image]]))


def test_a_model_shows_itself_in_ten_lines(lmm):
    for shown in (lmm, lmm.config):
        assert repr(shown).count("\n") < 10
        assert "clip, " in repr(shown)
        assert "vocabulary 259" in repr(shown)
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(lmm.params)):,} in " in repr(lmm)


def test_errors_that_a_user_can_cause_are_there_by_name():
    kinds = [dsx.CheckpointError, dsx.ConfigError, dsx.ImageError, dsx.RequestError, dsx.WeightsError]
    assert all(issubclass(kind, dsx.UserError) for kind in kinds)
    assert dsx.UserError is not Exception


def test_a_stop_string_ends_the_answer_before_it(lmm):
    free = lmm.answers([(IMAGES[1], PROMPTS[1])], Options(max_new_tokens=24, template="direct"))[0]
    stop = next(pair for pair in (free.text[at : at + 2] for at in range(3, 20)) if free.text.index(pair) > 2)
    options = {"max_new_tokens": 24, "template": "direct", "stop": stop}
    cut = lmm.answers([(IMAGES[1], PROMPTS[1])], Options(**options))[0]
    assert cut.text == free.text[: free.text.index(stop)].strip()
    assert cut.tokens < free.tokens == 24
    assert "".join(lmm.stream(IMAGES[1], PROMPTS[1], **options)) == cut.text


def test_a_sampled_answer_depends_on_its_seed_alone(lmm):
    drawn = QUICK | {"temperature": 1.5}
    answers = lmm.generate(IMAGES, PROMPTS, seed=[4, 5, 6, 7], **drawn)
    for images, prompt, seed, answer in zip(IMAGES, PROMPTS, [4, 5, 6, 7], answers, strict=True):
        assert lmm.generate(images, prompt, seed=seed, **drawn) == answer
    assert lmm.generate(IMAGES, PROMPTS, seed=[14, 15, 16, 17], **drawn) != answers


def test_a_chat_reads_all_turns_before(lmm):
    chat = lmm.chat(**QUICK)
    first = chat.ask("see <image>", [IMAGES[1][0]])
    second = chat.ask("and?")
    turns = [(turn.role, turn.words) for turn in chat.turns]
    assert turns == [("human", "see <image>"), ("gpt", first), ("human", "and?"), ("gpt", second)]
    text = f"see <image> {first} and?"  # how the template "direct" writes it
    assert second == lmm.generate([IMAGES[1][0]], text, **QUICK)
    chat.clear()
    assert chat.ask("see <image>", [IMAGES[1][0]]) == first


def test_a_chat_keeps_what_was_heard_and_forgets_what_failed(lmm):
    chat = lmm.chat(max_new_tokens=20, template="direct")
    pieces = chat.stream("go on", [])
    heard = next(pieces)
    pieces.close()
    assert chat.turns[-1].words == heard
    before = chat.turns
    with pytest.raises(RequestError, match="1 <image> placeholder for 0 images"):
        chat.ask("what of <image>?")
    with pytest.raises(ImageError, match="cannot read image"):
        chat.ask("what?", [b"no picture"])
    assert chat.turns == before


def test_logits_of_ragged_rows_padded_left_and_right(lmm):
    """0, 1 and 3 images; alone a row has no neighbour and no padding. A pad id inside a row is a token."""
    rows = [[1, 9, 0, 0, 12], [1, 7, IMAGE_TOKEN, 8], [1, IMAGE_TOKEN, 5, IMAGE_TOKEN, 6, 0, IMAGE_TOKEN, 4]]
    alone = [lmm.logits([row], [images])[0] for row, images in zip(rows, IMAGES, strict=False)]
    assert [len(scores) for scores in alone] == [5, 4 - 1 + 4, 8 - 3 + 12]
    longest = max(map(len, rows))
    right = np.array([row + [0] * (longest - len(row)) for row in rows])
    left = np.array([[0] * (longest - len(row)) + row for row in rows])
    for ids, on_left in ((right, False), (left, True)):
        out = lmm.logits(ids, IMAGES[:3])
        assert out.dtype == np.float32
        assert out.shape == (3, 17, 259)
        for scores, one in zip(out, alone, strict=True):
            mine = scores[17 - len(one) :] if on_left else scores[: len(one)]
            np.testing.assert_allclose(mine, one, atol=1e-4)
            rest = scores[: 17 - len(one)] if on_left else scores[len(one) :]
            assert not rest.any()
    masked = lmm.logits(right, IMAGES[:3], attention_mask=right != -1)
    assert masked.shape[1] == 17
    np.testing.assert_allclose(masked[2], alone[2], atol=1e-4)
    assert np.abs(masked[0, 5:8]).max() > 0, "with a mask the pad id is what the mask says"


def test_padding_is_the_runs_at_both_ends():
    ids = np.array([[0, 0, 5, 0, 6, 0], [1, 2, 3, 4, 5, 6]])
    assert real_tokens(ids, 0).tolist() == [[False, False, True, True, True, False], [True] * 6]
    assert not padded_left(real_tokens(ids, 0))
    assert padded_left(real_tokens(np.array([[0, 5, 6], [4, 5, 6]]), 0))


def test_text_without_images_needs_none_and_no_tokenizer(lmm):
    bare = LMM(lmm.config, lmm.params, None, "v0")
    ids = np.array([[1, 5, 6, 7]])
    np.testing.assert_array_equal(bare.logits(ids), lmm.logits(ids, [[]]))
    with pytest.raises(RequestError, match=r"no tokenizer.*put tokenizer.model or tokenizer.json into its folder"):
        bare.generate(None, "hi")


WRONG = {
    "no rows": ({"input_ids": np.zeros((0, 3), int)}, ["input_ids got int64[0, 3]", "expected integers [rows, tokens]"]),
    "floats": ({"input_ids": np.ones((1, 3))}, ["float64[1, 3]"]),
    "beyond the vocabulary": ({"input_ids": [[1, 400]]}, ["input_ids holds 400", "0..258", "-200"]),
    "images": (
        {"input_ids": [[1, IMAGE_TOKEN]], "images": [[]]},
        ["row 0 has 1 image token (-200) and 0 images", "one for each"],
    ),
    "lists": ({"input_ids": [[1, 2]], "images": [[], []]}, ["images got 2 lists for 1 row of", "one per row"]),
    "flat": ({"input_ids": [[1, IMAGE_TOKEN]], "images": [3]}, ["images[0] is a int", "expected a list of images"]),
    "mask": ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, ["attention_mask got shape [1, 1]", "[1, 2]"]),
    "mask of scores": (
        {"input_ids": [[1, 2]], "attention_mask": [[0.0, -1e9]]},
        ["attention_mask holds -1000000000.0, expected", "1 at tokens"],
    ),
    "padding": ({"input_ids": [[1, 2], [0, 0]]}, ["row 1 of input_ids holds nothing but padding", "leave it out"]),
    "context": (
        {"input_ids": np.ones((1, 300), int)},
        ["row 0 takes 300 tokens with its images, the context of this model is 256"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_of_logits(lmm, case):
    inputs, expected = WRONG[case]
    with pytest.raises(RequestError) as caught:
        lmm.logits(**inputs)
    assert [part for part in expected if part not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_requests_say_what_to_do_before_anything_compiles(lmm):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    wrong = [
        (
            {"images": None, "prompt": "hi", "max_tokens": 3},
            "unknown option 'max_tokens'; nearest valid name: 'max_new_tokens'",
        ),
        ({"images": [[]], "prompt": ["a", "b"]}, "images got 1 lists for 2 prompts"),
        ({"images": 3, "prompt": "hi"}, "a prompt is a list of images and a string, got int and str"),
        ({"images": None, "prompt": "hi", "template": "v9"}, "unknown template 'v9'; nearest valid"),
        ({"images": None, "prompt": "hi" * 200}, "shorten the prompt"),
        ({"images": None, "prompt": ["hi"], "batch_size": 0}, "batch_size got 0, expected 1 or more"),
    ]
    for inputs, message in wrong:
        with pytest.raises(RequestError) as caught:
            lmm.generate(**inputs)
        assert message in str(caught.value)
    with pytest.raises(RequestError, match="top_p got 2"):
        lmm.stream(None, "hi", top_p=2.0)
    assert compiled == []


def test_importing_the_package_stays_light():
    code = "import sys, deepstack_jax as d; a = dir(d); sys.exit('jax' in sys.modules or 'load' not in a)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert dsx.LMM is LMM
    with pytest.raises(AttributeError, match="no attribute 'lod'; it has LMM, Answer, Chat"):
        _ = dsx.lod


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda lmm: lmm.generate(None, None), "prompt is a NoneType, expected a string or a list"),
        (lambda lmm: lmm.generate(None, "x", max_new_tokens="5"), "max_new_tokens got '5', expected a whole number"),
        (lambda lmm: lmm.generate(None, "x", temperature=None), "temperature got None, expected 0"),
        (lambda lmm: lmm.generate(None, "x", stop=3), "stop got 3, expected a string"),
        (lambda lmm: lmm.generate(None, "x", seed="x"), "seed got 'x', expected a whole number"),
        (lambda lmm: lmm.chat().ask("x", max_tokens=3), "unknown option 'max_tokens'; nearest valid name: 'max_new_tokens'"),
        (lambda lmm: lmm.chat().ask("x", 3), "images is a int, expected an image or a list of them"),
        (lambda lmm: lmm.logits([[1, -200, 3], [1]], [[IMAGES[1][0]], []]), "input_ids has rows of several lengths"),
        (lambda lmm: lmm.logits([[1, -200, 3]], IMAGES[1][0]), "expected one list of images per row"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_line(lmm, ask, message):
    with pytest.raises(RequestError, match=message):
        ask(lmm)


def test_float32_takes_the_portable_kernel_on_a_tpu_too(monkeypatch):
    monkeypatch.setattr(api, "kernels_for", lambda platform, config: Kernels("splash", "splash"))
    assert api._kernels(CONFIG, {}) == (dot_product, dot_product)
    rounded = tiny_config({"train.compute_dtype": "bfloat16"})
    assert all(isinstance(one, SplashAttention) for one in api._kernels(rounded, {}))
