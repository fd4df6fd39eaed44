"""Folders from strangers: what their files may say, what is warned of, and when the hub is asked."""

import dataclasses
import json
import os
import warnings

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import deepstack_jax as dsx
from deepstack_jax.api import LMM, Options
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.errors import ConfigError, WeightsError
from deepstack_jax.train.checkpoint.init_weights import open_start
from deepstack_jax.weights.checkpoint_files import processor_of, read_model_json
from deepstack_jax.weights.load import is_finite, load_params, stored_leaves
from deepstack_jax.weights.open_checkpoint import end_tokens, find_folder, open_checkpoint
from deepstack_jax.weights.save import save_checkpoint
from tests.parity.goldens import load_case, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder("l_2d", tmp_path)


def say(folder, file, /, **values):
    (folder / file).write_text(json.dumps(values))


@pytest.mark.parametrize(
    "said",
    [
        {"data.tokenizer": "words:@/etc/passwd"},
        {"data.tokenizer": "/home/somebody/tokenizer"},
        {"data.tokenizer": ["bytes"]},
        {"data.root": "/"},
        {"data.train": "secret.json"},
        {"train.weights": "org/other"},
        {"train": {"weights": "org/other"}},
        {"optimizer.table": []},
        {"mesh.data": 8},
        {"decoder.scan": False},
        {"name": "x"},
        {"image": {"mode": "pad"}},
    ],
)
def test_only_what_an_export_says_is_taken_from_beside_the_official_files(said, folder):
    """A tokenizer of `words:@FILE` once printed the first word of any file of the user that a stranger named."""
    say(folder, "deepstack_jax.json", **said)
    with pytest.raises(WeightsError, match=r"deepstack_jax\.json has .*, which no export writes there") as caught:
        open_checkpoint(folder)
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"image.global_filter": 3}, "cannot be casted to type <class 'str'>"),
        ({"image.global_filter": "sinc"}, "config.image.global_filter got 'sinc'"),
        ({"decoder.layers": 10**7}, "decoder.layers"),
        ({"decoder.width": 64}, "config.decoder.width is 64, the weights have 48"),
        ({"decoder.rope.theta": -1.0}, "rope"),
        ({"image.no_such": 1}, "does not fit the rest of the folder"),
        ({"image.mode.deeper": 1}, "does not fit the rest of the folder"),
        ({"image.mean": {"a": 1}}, "does not fit the rest of the folder"),
    ],
)
def test_what_stands_there_is_checked_like_a_configuration(said, message, folder):
    say(folder, "deepstack_jax.json", **said)
    with pytest.raises(WeightsError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_kind_of_model_that_is_no_word_and_a_tokenizer_of_a_million_words_are_one_short_line(folder):
    say(folder, "deepstack_jax.json", **{"data.tokenizer": "words:" + " ".join(f"w{n}" for n in range(10_000))})
    with pytest.raises(ConfigError, match=r"the tokenizer in words:w0 w1 .* has 100") as caught:
        dsx.load(folder)
    assert len(str(caught.value)) < 400
    say(folder, "config.json", model_type=["llava"])
    with pytest.raises(WeightsError, match=r"model_type is \['llava'\], expected a string"):
        dsx.load(folder)


@pytest.mark.parametrize(
    "text", ['{"a":' * 10**5, "[" * 10**5, '{"image.mean": [NaN, 0, 0]}', "1" * 5000, '"\\ud800', "\xff\xfe"]
)
@pytest.mark.parametrize("name", ["deepstack_jax.json", "config.json", "generation_config.json"])
def test_json_that_is_none_is_one_line(name, text, folder):
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"is not JSON \(|holds a int|holds a list") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 500


def test_what_never_ends_is_not_read(folder):
    (folder / "generation_config.json").symlink_to("/dev/zero")
    with pytest.raises(WeightsError, match=r"generation_config\.json is not JSON \(no file of at most") as caught:
        read_model_json(folder / "generation_config.json")
    os.mkfifo(folder / "processor_config.json")
    with pytest.raises(WeightsError, match="no file of at most"):
        processor_of(folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_words_that_a_file_held_stand_in_the_export_themselves(folder, tmp_path):
    found = open_checkpoint(folder)
    (tmp_path / "words.txt").write_text("red green\nblue")
    data = dataclasses.replace(found.config.data, tokenizer=f"words:@{tmp_path / 'words.txt'}")
    config = dataclasses.replace(found.config, data=data)
    save_checkpoint(stored_leaves(found.tensors, config), config, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "deepstack_jax.json").read_text()) == {"data.tokenizer": "words:red green blue"}
    assert open_checkpoint(tmp_path / "out").config.data.tokenizer == "words:red green blue"


def test_no_file_outside_a_folder_gets_into_an_export(folder, tmp_path):
    """A link named tokenizer_config.json may lead to a private file; the links of the hub's cache lead to its blobs."""
    with_tokenizer(folder, "</s>")
    found = open_checkpoint(folder)
    leaves = stored_leaves(found.tensors, found.config)
    (tmp_path / "private.json").write_text("secret")
    (folder / "added_tokens.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(WeightsError, match=r"added_tokens\.json is a link out of its folder"):
        save_checkpoint(leaves, found.config, tmp_path / "out", tokenizer_folder=found.tokenizer)
    assert not (tmp_path / "out").exists()
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    (folder / "tokenizer.json").rename(snapshot.parent.parent / "blobs" / "123")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    save_checkpoint(leaves, found.config, tmp_path / "out", tokenizer_folder=str(snapshot))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()


def test_what_an_export_carries_is_numbers(folder):
    values = json.loads((folder / "config.json").read_text())
    for wrong in ({"a": 1}, "2", [[2]], ["2"]):
        say(folder, "config.json", **values | {"pad_token_id": wrong})
        with pytest.raises(WeightsError, match=r"pad_token_id is .*, expected a number"):
            open_checkpoint(folder)
    say(folder, "config.json", **values | {"pad_token_id": None, "eos_token_id": [2, 3]})
    assert open_checkpoint(folder).passthrough["pad_token_id"] is None
    assert open_checkpoint(folder).passthrough["eos_token_id"] == [2, 3]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_one_number_that_is_none_among_many(dtype):
    array = np.zeros(2**18 + 7, dtype)
    array[5], array[-2] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).smallest_subnormal
    assert is_finite(array)
    assert is_finite(array[:0])
    for wrong in (np.nan, -np.nan, np.inf, -np.inf):
        array[-1] = wrong
        assert not is_finite(array)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_warned_of_once(wrong, folder):
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.3.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight", "model.norm.weight"):
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[-1] = wrong
    save_file(tensors, folder / "model.safetensors")
    found = open_checkpoint(folder)
    with pytest.warns(UserWarning, match=r"weights hold NaN or infinite numbers, first seen in model\.") as said:
        load_params(found.tensors, found.config)
    assert len(said) == 1
    with pytest.warns(UserWarning, match="NaN or infinite"):
        save_checkpoint(stored_leaves(found.tensors, found.config), found.config, folder.parent / "out")


def with_tokenizer(folder, end: str):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, end: 2, "hello": 3}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<unk>", "<s>", end])
    made.save(str(folder / "tokenizer.json"))
    say(
        folder,
        "tokenizer_config.json",
        bos_token="<s>",
        eos_token=end,
        unk_token="<unk>",
        tokenizer_class="PreTrainedTokenizerFast",
    )


@pytest.mark.parametrize(
    ("end", "fitting"),
    [
        ("<|eot_id|>", "llama_3"),
        ("<|im_end|>", "chatml, chatml_direct, mistral_direct, mpt"),
        ("<|end|>", "phi3_instruct"),
        ("<end>", "no template here"),
        ("</s>", None),
    ],
)
def test_a_template_whose_end_the_tokenizer_lacks_is_warned_of(end, fitting, folder):
    with_tokenizer(folder, end)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert dsx.load(folder).template == "v1"
    said = [str(one.message) for one in said if "template" in str(one.message)]
    if fitting is None:
        assert said == []
    else:
        assert len(said) == 1
        assert "taken to be 'v1', but its end of turn, </s>, is not a token of the tokenizer" in said[0]
        assert f"has those of: {fitting}; choose with template=NAME" in said[0]


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (None, {}, (2,)),
        (None, {"eos_token_id": [7, 9]}, (7, 9)),
        (None, {"eos_token_id": None}, ()),
        ({"eos_token_id": [128001, 128009]}, {}, (128001, 128009)),
        ({"eos_token_id": 5}, {}, (5,)),
        ({"eos_token_id": None}, {}, ()),
        ({}, {}, ()),
    ],
)
def test_end_tokens_are_those_of_generation_config(generation, config, ends, folder):
    values = json.loads((folder / "config.json").read_text())
    say(folder, "config.json", **values | config)
    if generation is not None:
        say(folder, "generation_config.json", **generation)
    assert open_checkpoint(folder).ends == ends
    for wrong in ("2", [-1], [True], [2.0], {"a": 1}):
        say(folder, "generation_config.json", eos_token_id=wrong)
        with pytest.raises(WeightsError, match=r"eos_token_id is .*, expected ids"):
            open_checkpoint(folder)


def test_a_folder_that_says_nothing_has_no_end_tokens(tmp_path):
    assert end_tokens(tmp_path) == ()
    say(tmp_path, "generation_config.json", eos_token_id=[7, 9])
    assert end_tokens(tmp_path) == (7, 9)


def test_an_answer_ends_at_an_end_token_of_the_folder(folder):
    found = open_checkpoint(folder)
    config = dataclasses.replace(found.config, data=dataclasses.replace(found.config.data, template="direct"))
    lmm = LMM(config, load_params(found.tensors, config), load_tokenizer("bytes"), "direct")
    plain = lmm.answers([((), "hello")], Options(max_new_tokens=8))[0]
    first = lmm.logits([[1, *load_tokenizer("bytes").encode("hello")[0].tolist()]])[0, -1]
    again = dataclasses.replace(lmm, ends=(int(first.argmax()),)).generate(None, "hello", max_new_tokens=8)
    assert plain.tokens > 0
    assert again == ""


PATHS = [
    "./checkpoints",
    "../a/b",
    "/a/b",
    "~/a/b",
    "a/b/c",
    "here/model",
    "org/model.safetensors",
    "org/mm_projector.bin",
    ".a/b",
]
PATHS += ["org/model/", "org\\model", "model", "", "org/-model", "here.json/x"]


@pytest.mark.parametrize("path", PATHS)
def test_what_looks_like_a_path_is_not_asked_for_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here.json").write_text("")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    if path:
        with pytest.raises(WeightsError, match="no folder") as caught:
            find_folder(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", ["hf_secret", None])
def test_what_is_fetched_is_said_first(token, tmp_path, monkeypatch):
    asked = []

    def download(name, local_files_only=False, **_):
        asked.append(local_files_only)
        if local_files_only:
            raise OSError("not there")
        (tmp_path / "got").mkdir(exist_ok=True)
        (tmp_path / "got" / "model.safetensors").write_bytes(b"")
        return str(tmp_path / "got")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    said = "with your token" if token else "without a token"
    with pytest.warns(UserWarning, match=rf"no folder org/name: fetching https://\S+/org/name into \S+, {said}$") as caught:
        assert find_folder("org/name") == tmp_path / "got"
    assert len(caught) == 1
    assert "hf_secret" not in str(caught[0].message)
    assert asked == [True, False]


def test_python_messages_name_arguments_and_no_flags(folder, tmp_path):
    (folder.parent / "clip").rename(tmp_path / "elsewhere")
    save_file(
        {n: t for n, t in load_file(folder / "model.safetensors").items() if "vision_tower" not in n},
        folder / "model.safetensors",
    )
    with pytest.raises(WeightsError, match=r"or name it with tower=DIR") as caught:
        dsx.load(folder)
    assert "--" not in str(caught.value).replace("models--", "")
    assert dsx.load(folder, tower=tmp_path / "elsewhere").config.vision == load_case("l_2d").config.vision
    save_file(
        {n: t for n, t in load_file(folder / "model.safetensors").items() if "projector" not in n}, folder / "model.safetensors"
    )
    with pytest.raises(WeightsError, match=r"There is no projector: give it with projector=FILE"):
        dsx.load(folder, tower=tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="dtype got int8"):
        dsx.load(folder, "int8")


def test_a_run_is_told_its_own_flags(folder, tmp_path):
    (folder.parent / "clip").rename(tmp_path / "elsewhere")
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if "vision_tower" not in n}
    save_file(kept, folder / "model.safetensors")
    config = load_case("l_2d").config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, weights=str(folder)))
    with pytest.raises(WeightsError, match=r"or name it with --config\.train\.tower=DIR$"):
        open_start(config)
