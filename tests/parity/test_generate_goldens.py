"""The Python API against the official code: logits of its own inputs, and greedy answers from the prompt's words."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import deepstack_jax as dsx
from tests.parity.goldens import GOLDEN, load_case, open_images, write_folder

pytestmark = pytest.mark.quick
LOGITS = 5e-4
MARGIN = 1e-3
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/case.npz"))
WITH_LOGITS = [name for name in CASES if not name.startswith("generate")]


def load(name: str, folder: Path, *, tokenizer: str = "") -> dsx.LMM:
    """The case's checkpoint as a user finds it."""
    hf = write_folder(name, folder)
    if tokenizer:
        shutil.copytree(GOLDEN / "tokenizer" / tokenizer, hf, dirs_exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # l_2d_start3_int2 says that groups fall past the last layer
        return dsx.load(hf)


def test_all_cases_are_here():
    assert {"l_2d", "v", "hd", "phi", "llava15", "llava_next", "generate", "generate_hd"} <= set(CASES)


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_logits_from_ids_and_pictures(name, tmp_path):
    case = load_arrays(name)
    lmm = load(name, tmp_path)
    assert lmm.tokenizer is None
    images = [[image] for image in open_images()]
    real, at = case["attention_mask_expanded"].astype(bool), case["logit_positions"]
    ours = lmm.logits(case["input_ids"], images)
    assert ours.shape[:2] == real.shape
    assert np.abs(ours[:, at] - case["logits"])[real[:, at]].max() < LOGITS
    masked = lmm.logits(case["input_ids"], images, case["attention_mask"])
    np.testing.assert_array_equal(masked, ours)


def load_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "case.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("name", ["generate", "generate_hd"])
def test_greedy_answers(name, tmp_path):
    """12 tokens from words and a picture, alone, in a batch and streamed; the official prompt's ids on the way."""
    info, arrays = load_case(name).info, load_arrays(name)
    lmm = load(name, tmp_path, tokenizer=Path(info["tokenizer"]).name)
    assert lmm.tokenizer is not None
    picture = open_images()[0]
    words = info["prompt"].split("<image>\n")[1].removesuffix(" ASSISTANT:")
    options = {"template": info["conv_template"], "max_new_tokens": info["max_new_tokens"]}

    ordered = np.sort(arrays["greedy_logits"], axis=-1)
    assert (ordered[:, -1] - ordered[:, -2]).min() > MARGIN, "a nearer tie would make the comparison a matter of rounding"
    ids = np.concatenate([arrays["input_ids"], arrays["generated"]], axis=1)
    ours = lmm.logits(ids, [[picture]])[0, -13:-1]
    np.testing.assert_allclose(ours, arrays["greedy_logits"], atol=LOGITS)

    expected = lmm.tokenizer.decode(arrays["generated"][0]).strip()
    assert info["decoded"][0].strip() == expected
    assert lmm.generate([picture], words, **options) == expected
    assert lmm.generate([picture], f"<image>\n{words}", **options) == expected
    others = [None, [picture], [picture, open_images()[1], picture]]
    assert lmm.generate(others, ["What?", words, "And these?"], **options)[1] == expected
    assert "".join(lmm.stream([picture], words, **options)) == expected


def test_saved_and_loaded_it_is_the_same(tmp_path):
    lmm = load("generate", tmp_path / "first", tokenizer="llama_legacy_false")
    dsx.save_hf(lmm, tmp_path / "second")
    again = dsx.load(tmp_path / "second")
    ids, picture = load_arrays("generate")["input_ids"], open_images()[:1]
    np.testing.assert_array_equal(again.logits(ids, [picture]), lmm.logits(ids, [picture]))
    assert again.generate(picture, "What?", max_new_tokens=3) == lmm.generate(picture, "What?", max_new_tokens=3)
    with pytest.raises(ValueError, match="is not empty"):
        dsx.save_hf(lmm, tmp_path / "second")
