"""The JSON files of a folder of weights: any value under any key of a good one, and any bytes at all."""

import json
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepstack_jax.config import Config
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.forms import from_hf
from deepstack_jax.families.official import KNOWN
from deepstack_jax.families.processor import preprocessor_to_hf
from deepstack_jax.weights.checkpoint_files import read_model_json, weight_files
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from tests.fuzz.watch import is_one_line, reads_only
from tests.parity.goldens import GOLDEN, write_folder

FOLDERS = {
    name: json.loads((GOLDEN / name / "hf" / "config.json").read_text())
    for name in ("l_2d", "v", "hd", "phi", "llava15", "llava_next")
}
TOWER = json.loads((GOLDEN / "clip" / "config.json").read_text())
PIXELS = preprocessor_to_hf(Config()) | {"crop_size": 28, "size": 28}
LLAVA_HF = {
    "model_type": "llava_next",
    "text_config": {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "num_attention_heads": 2},
    "vision_config": TOWER | {"image_size": 28},
    "image_grid_pinpoints": [[28, 56], [56, 28]],
}
ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "original_max_position_embeddings": 8}
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([2**10, 2**20, 10**7, 10**9, 2**31, 2**63, 10**400, -(10**9)]),
    st.floats(),
    st.sampled_from([0.0, 1.0, 2.5, 1e-5, 1e300]),
    st.text(max_size=4),
    st.sampled_from(["llama", "phi3", "clip", "anyres", "pad", "deepstack", "9" * 5000, "\x1b[2J", "a\nb", "\ud800", "²"]),
    st.sampled_from(
        ["2xsample+deepstack_vit+lsvit_start_layer_²", "lsvit_start_layer_99999", "[" * 9000, "[(28,56)]", "dummy_local"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=5,
)
ropes = st.one_of(
    values, st.dictionaries(st.sampled_from([*ROPE, "type", "factor", "rope_theta"]), values, max_size=4).map(ROPE.__or__)
)
MORE = [
    "rope_scaling",
    "rope_parameters",
    "head_dim",
    "sliding_window",
    "s2",
    "quantization_config",
    "text_config",
    "vision_config",
]


def changed(base: dict, more=()):
    """The object with some keys of any value, and some left out."""
    keys = st.sampled_from(sorted({*base, *more}))
    changes = st.dictionaries(keys, values, max_size=3)
    return st.builds(
        lambda new, gone: {k: v for k, v in (base | new).items() if k not in gone}, changes, st.sets(keys, max_size=1)
    )


def check(config, tower, pixels) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = from_hf(config, tower, pixels)
            assert len(NameTable(read).tensors) < 10**6
        except WeightsError as error:
            is_one_line(error, 2001)


@pytest.mark.parametrize("name", FOLDERS)
def test_any_value_under_a_key_of_an_official_folder(name):
    @given(changed(FOLDERS[name], (*KNOWN, *MORE)), ropes)
    @example(FOLDERS[name] | {"num_hidden_layers": 10**7}, None)
    @example(FOLDERS[name] | {"num_crops": 10**9}, None)
    @example(FOLDERS[name] | {"image_grid_pinpoints": [[28, 28]] * 10**5}, None)
    @example(FOLDERS[name] | {"image_grid_pinpoints": [[2**19, 2**19]], "image_aspect_ratio": "anyres"}, None)
    @example(FOLDERS[name] | {"tokenizer_model_max_length": "long"}, None)
    def run(config, rope):
        check(config | ({} if rope is None else {"rope_scaling": rope}), TOWER, PIXELS)

    run()


@given(
    changed(TOWER),
    changed(PIXELS, ("do_pad", "feature_extractor_type", "image_grid_pinpoints")),
    st.sampled_from(list(FOLDERS)),
)
def test_any_tower_and_any_processor(tower, pixels, name):
    check(FOLDERS[name], tower, pixels)


@given(
    changed(LLAVA_HF),
    changed(LLAVA_HF["text_config"], ("rope_scaling", "rope_parameters")),
    changed(LLAVA_HF["vision_config"]),
    changed(PIXELS | {"image_processor_type": "LlavaNextImageProcessor"}, ("image_grid_pinpoints",)),
    st.sampled_from(["llava", "llava_next"]),
    st.booleans(),
)
def test_any_folder_of_llava_hf(config, text, vision, pixels, kind, inner):
    check(config | ({"text_config": text, "vision_config": vision, "model_type": kind} if inner else {}), None, pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder("l_2d", tmp_path_factory.mktemp("strangers"))


texts = st.one_of(
    st.binary(max_size=30),
    values.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.text(max_size=8), values, max_size=3).map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"{" * 10**5, b'{"a":' * 10**5, b"[" * 10**6, b"\xef\xbb\xbf{}", b'{"a": 1' + b"0" * 5000 + b"}"]),
)
beyond = st.dictionaries(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ["data.tokenizer", "data.template", "image.mode", "image.mean", "image", "decoder.layers", "deepstack.schedule"]
        ),
        st.sampled_from(["decoder.rope.theta", "vision.feature_layer", "image.num_crops", "train.weights", "image.pinpoints"]),
    ),
    st.one_of(values, st.just("words:@/etc/passwd"), st.just("words:red green")),
    max_size=3,
).map(lambda value: json.dumps(value).encode())
FILES = ["config.json", "deepstack_jax.json", "generation_config.json", "model.safetensors.index.json"]


@example("config.json", json.dumps(FOLDERS["l_2d"] | {"mm_vision_tower": "9" * 5000}).encode())
@example("config.json", json.dumps(FOLDERS["l_2d"] | {"mm_vision_tower": "a\0b"}).encode())
@example("config.json", json.dumps(FOLDERS["l_2d"] | {"transformers_weights": "9" * 5000 + ".safetensors"}).encode())
@given(st.sampled_from(FILES), st.one_of(texts, beyond))
def test_any_bytes_in_a_json_file(folder, name, text):
    """A folder with such a file is one that can be opened, or one line; no file outside is looked into."""
    kept = (folder / name).read_bytes() if (folder / name).exists() else None
    (folder / name).write_bytes(text)
    try:
        with warnings.catch_warnings(), reads_only(folder.parent):
            warnings.simplefilter("ignore")
            NameTable(open_checkpoint(folder).config)
    except WeightsError as error:
        is_one_line(error, 2001)
    finally:
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(kept)


@example(json.dumps({"weight_map": {"a": "9" * 5000}}).encode())
@given(st.one_of(texts, st.dictionaries(st.just("weight_map"), values).map(lambda value: json.dumps(value).encode())))
def test_any_index(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_bytes(text)
    try:
        assert all(file.parent == folder for file in weight_files(folder))
    except WeightsError as error:
        is_one_line(error)


@given(texts)
def test_read_json_gives_an_object_or_one_line(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(text)
    try:
        assert None not in read_model_json(file).values()
    except WeightsError as error:
        is_one_line(error)
