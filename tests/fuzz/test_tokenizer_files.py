"""Tokenizer folders with anything in their files: a tokenizer whose ids stay in its vocabulary, or one line of why not."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from benchmarks.small_tokenizer import train_bpe
from deepstack_jax.data.encode.labels import encode_with_images
from deepstack_jax.data.encode.tokenizer import HFTokenizer, SentencePieceTokenizer
from tests.fuzz.watch import is_one_line

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
TEXT = "USER: the dog</s> é <|end|> <|user|>\n漢字 <unk>"
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
ANYTHING = st.recursive(
    LEAVES, lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3)
)
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["▁", -1.0], ["d", -2.0], ["o", -2.0]]}
WORDS = {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1, "dog": 2}, "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A byte-level BPE as its JSON says it."""
    return json.loads(train_bpe([TEXT], 290, tmp_path_factory.mktemp("bpe")).file.read_text())


def check(kind, folder):
    """Read, and use in every way, or refuse in one line."""
    try:
        tokenizer = kind(folder)
        for words in ([], [(0, len(TEXT))], [(3, 20)]):
            ids, offsets = encode_with_images(TEXT, tokenizer, words=words)
            assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
            assert offsets.shape == (len(ids), 2)
            assert ((offsets >= 0) & (offsets <= len(TEXT))).all()
            assert isinstance(tokenizer.decode(ids), str)
        assert isinstance(tokenizer.decode(range(min(tokenizer.vocab_size, 600))), str)
        roles = np.array([tokenizer.eos_id, tokenizer.pad_id, *([] if tokenizer.bos_id is None else [tokenizer.bos_id])])
        assert ((roles >= 0) & (roles < tokenizer.vocab_size)).all()
    except ValueError as error:
        is_one_line(error)
        if str(folder) not in str(error):
            pytest.fail(f"no file is named: {error}")


def put(folder, **files):
    """Exactly these files; their suffixes are known."""
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        path = folder / f"{name}{'.model' if isinstance(content, bytes) and name == 'tokenizer' else '.json'}"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def places(value, at=()):
    """Every place in a JSON value, as a path of keys."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, item) in enumerate(inside):
        if number < 8:  # of a vocabulary, some
            yield from places(item, (*at, key))


def replaced(data, place, value):
    data = {"": copy.deepcopy(data)}
    inside = data
    path = ("", *place)
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return data[""]


@given(st.data())
def test_any_value_in_a_tokenizer_json(folder, base, draw):
    other = draw.draw(st.sampled_from([None, UNIGRAM, WORDS]))
    data = dict(base) | ({"model": other, "added_tokens": []} if other else {})
    for _ in range(draw.draw(st.integers(1, 2))):
        place = draw.draw(st.sampled_from(list(places(data))))
        data = replaced(data, place, draw.draw(ANYTHING))
    put(folder, tokenizer=data)
    check(HFTokenizer, folder)


@given(st.integers(0, 6000), st.integers(0, 40), st.binary(max_size=8))
def test_a_tokenizer_json_that_was_cut_and_patched(folder, base, start, size, patch):
    content = json.dumps(base).encode()
    put(folder)
    (folder / "tokenizer.json").write_bytes(content[:start] + patch + content[start + size :])
    check(HFTokenizer, folder)


KEYS = ["bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens", "added_tokens_decoder"]
KEYS += ["tokenizer_class", "legacy", "add_prefix_space", "add_bos_token", "add_eos_token", "model_max_length"]


@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=3), st.dictionaries(st.text(max_size=5), ANYTHING, max_size=3))
def test_any_value_in_the_settings(folder, base, config, added):
    put(folder, tokenizer=base, tokenizer_config=config)
    check(HFTokenizer, folder)
    source = GOLDEN / "phi3_rstrip"
    kept = json.loads((source / "tokenizer_config.json").read_text())
    kept.pop("added_tokens_decoder")
    model = (source / "tokenizer.model").read_bytes()
    put(folder, tokenizer=model, tokenizer_config=kept | config, added_tokens=added)
    check(SentencePieceTokenizer, folder)


CHANGES = {
    "piece": lambda piece, model, text, number: setattr(piece, "piece", text),
    "score": lambda piece, model, text, number: setattr(piece, "score", float("nan") if number % 3 else 1e38),
    "kind": lambda piece, model, text, number: setattr(piece, "type", 1 + number % 6),
    "cut": lambda piece, model, text, number: model.pieces.__delitem__(slice(number % 600, None)),
    "model": lambda piece, model, text, number: setattr(model.trainer_spec, "model_type", 1 + number % 4),
    "charsmap": lambda piece, model, text, number: setattr(model.normalizer_spec, "precompiled_charsmap", text.encode() * 5),
    "bytes": lambda piece, model, text, number: setattr(model.trainer_spec, "byte_fallback", bool(number % 2)),
    "unknown": lambda piece, model, text, number: setattr(model.trainer_spec, "unk_id", number - 2),
    "suffix": lambda piece, model, text, number: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True),
    "spaces": lambda piece, model, text, number: setattr(model.normalizer_spec, "escape_whitespaces", bool(number % 2)),
}
TEXTS = st.sampled_from(["", "a", "▁", "</s>", "<unk>", "<0x00>", "<|end|>", "\0", "é" * 50]) | st.text(max_size=4)


@given(
    st.sampled_from(["llama_legacy_false", "phi3_rstrip"]),
    st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 700), TEXTS), min_size=1, max_size=3),
)
def test_any_sentencepiece_model(folder, name, changes):
    model = sentencepiece_model_pb2.ModelProto.FromString((GOLDEN / name / "tokenizer.model").read_bytes())
    for change, number, text in changes:
        piece = model.pieces[number % len(model.pieces)] if len(model.pieces) else model.pieces.add()
        CHANGES[change](piece, model, text, number)
    put(folder, tokenizer=model.SerializeToString(), tokenizer_config=(GOLDEN / name / "tokenizer_config.json").read_bytes())
    check(SentencePieceTokenizer, folder)


@given(st.binary(max_size=60), st.integers(0, 9000))
def test_any_bytes_in_a_sentencepiece_model(folder, patch, start):
    content = (GOLDEN / "llama_legacy_true" / "tokenizer.model").read_bytes()
    put(folder, tokenizer=content[:start] + patch + content[start + len(patch) :])
    check(SentencePieceTokenizer, folder)
