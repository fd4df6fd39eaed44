"""Tokens into text while they come: whole characters, stop strings, and templates' ends of turn."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepstack_jax.data.encode.templates import TEMPLATES
from deepstack_jax.data.encode.tokenizer import ByteTokenizer, load_tokenizer
from deepstack_jax.generate.__main__ import read_prompts
from deepstack_jax.generate.options import RequestError
from deepstack_jax.generate.prompts import SMALLEST, bucket, check_context, find_template, place_images
from deepstack_jax.generate.text import AnswerText, end_of_turn
from deepstack_jax.printing import plural
from tests.unit.tiny import tiny_config

pytestmark = pytest.mark.quick
TOKENIZERS = Path(__file__).parents[1] / "golden" / "tokenizer"
BYTES = ByteTokenizer()
LLAMA = load_tokenizer(str(TOKENIZERS / "llama_legacy_false"))
words = st.text(st.sampled_from("ab #é€😀\n"), max_size=24)


def streamed(tokenizer, ids, cuts, stops=()):
    """(pieces, AnswerText) with the ids fed in parts that end at `cuts`."""
    text, pieces, start = AnswerText(tokenizer, stops), [], 0
    for end in [*sorted(cuts), len(ids)]:
        pieces.append(text.feed(ids[start:end]))
        start = max(start, end)
    return [*pieces, text.close()], text


@given(words, st.lists(st.integers(0, 60), max_size=6), st.sampled_from(["bytes", "llama"]))
def test_pieces_join_to_the_whole_text(said, cuts, kind):
    tokenizer = BYTES if kind == "bytes" else LLAMA
    ids = tokenizer.encode(said)[0].tolist()
    pieces, text = streamed(tokenizer, ids, cuts)
    assert "".join(pieces) == text.text == tokenizer.decode(ids).strip()
    assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"
    assert text.tokens == len(ids)


@given(words, st.lists(st.integers(0, 60), max_size=6), st.lists(st.sampled_from(["##", "a b", "é", "€\n"]), min_size=1))
def test_text_ends_before_the_first_stop_string(said, cuts, stops):
    ids = BYTES.encode(said)[0].tolist()
    pieces, text = streamed(BYTES, ids, cuts, stops)
    found = [at for at in (said.find(stop) for stop in stops) if at >= 0]
    assert "".join(pieces) == text.text == said[: min(found, default=len(said))].strip()
    assert text.stopped == bool(found)
    if found:
        shortest = next(n for n in range(len(ids) + 1) if any(s in BYTES.decode(ids[:n]) for s in stops))
        assert text.tokens == shortest


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    ids = (np.frombuffer("ok€".encode(), np.uint8)[:-1] + 3).tolist()
    pieces, text = streamed(BYTES, ids, [3])
    assert pieces == ["ok", "", "\ufffd"]
    assert text.text == "ok\ufffd"


def test_ids_beyond_the_vocabulary_are_left_out():
    pieces, text = streamed(LLAMA, [*LLAMA.encode("a")[0].tolist(), LLAMA.vocab_size + 5], [])
    assert text.text == "a"
    assert text.tokens == len(LLAMA.encode("a")[0]) + 1
    assert "".join(pieces) == "a"


def test_every_template_has_an_end():
    """`</s>` and `<|end|>` are one token and known by it; "###" and "\\n" show in the text."""
    phi = load_tokenizer(str(TOKENIZERS / "phi3_rstrip"))
    ends = {name: end_of_turn(find_template(name), LLAMA) for name in TEMPLATES}
    assert ends["v1"] == ([LLAMA.eos_id], ())
    assert ends["llama_2"] == ([LLAMA.eos_id], ())
    assert ends["v0"][1] == ("###",)
    assert ends["plain"][1] == ("\n",)
    assert ends["direct"] == ([LLAMA.eos_id], ())
    ids, _ = end_of_turn(find_template("phi3_instruct"), phi)
    assert phi.encode("<|end|>")[0].tolist()[0] in ids
    assert phi.eos_id in ids
    closed = load_tokenizer("words:yes no")
    assert end_of_turn(find_template("chatml"), closed) == ([closed.eos_id], ("<|im_end|>",))


@given(st.integers(1, 200_000))
def test_buckets_hold_and_are_few(size):
    chosen = bucket(size)
    assert chosen >= size
    assert chosen == SMALLEST or chosen < 1.5 * size + 1
    assert bucket(chosen) == chosen


def test_hd_prompts_have_a_tight_bucket():
    """2904 to 2976 visual tokens and a question."""
    assert bucket(2976 + 60) == 3072


def test_images_stand_where_the_prompt_says_or_in_front():
    v1, tagged = find_template("v1"), find_template("v1_mmtag")
    assert place_images("What?", 0, v1) == "What?"
    assert place_images("What?", 1, v1) == "<image>\nWhat?"
    assert place_images("What?", 2, v1) == "<image>\n<image>\nWhat?"
    assert place_images("Is <image> like <image>?", 2, v1) == "Is <image> like <image>?"
    assert place_images("What?", 1, tagged) == "<Image><image></Image>\nWhat?"
    assert place_images("", 1, v1) == "<image>"


@pytest.mark.parametrize(("prompt", "images"), [("<image> and <image>?", 1), ("<image>?", 0), ("<image>?", 3)])
def test_placeholders_and_images_must_agree(prompt, images):
    with pytest.raises(RequestError) as caught:
        place_images(prompt, images, find_template("v1"))
    count = prompt.count("<image>")
    assert f"{plural(count, '<image> placeholder')} for {plural(images, 'image')}; write one per image" in str(caught.value)
    assert prompt in str(caught.value)


def test_context_is_checked_with_the_next_move():
    config = tiny_config({"decoder.max_positions": 100})
    check_context(60, 40, config)
    message = r"takes 61 tokens .* up to 40, the context of this model is 100; lower max_new_tokens to 39"
    with pytest.raises(RequestError, match=message):
        check_context(61, 40, config)
    with pytest.raises(RequestError, match=r"takes 100 tokens .* shorten the prompt or give fewer images"):
        check_context(100, 1, config)


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(RequestError, match="unknown template 'vicuna'; nearest valid: 'vicuna_v1'"):
        find_template("vicuna")


def test_a_file_of_prompts_has_one_a_line_whatever_marks_are_in_it(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffWhat is\u2028this?\r\n\r\n And\x0cthat?\n".encode())
    assert read_prompts(["first"], str(file)) == ["first", "What is\u2028this?", "And\x0cthat?"]
