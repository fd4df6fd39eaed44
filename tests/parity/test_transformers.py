"""Live comparisons with transformers and torch, which the package itself does not need: run where torch is installed."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

import deepstack_jax as dsx
from deepstack_jax.data.encode.image import make_views
from deepstack_jax.errors import WeightsError
from deepstack_jax.weights.checkpoint_files import weight_files
from deepstack_jax.weights.load import load_params, stored_leaves
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from deepstack_jax.weights.save import save_checkpoint
from deepstack_jax.weights.torch_pickle import open_bin
from tests.parity.goldens import build_batch, load_case, official_tensors, open_images, write_folder

torch = pytest.importorskip("torch", reason="torch is not installed: the package does not need it, only this comparison does")
transformers = pytest.importorskip("transformers")

LOGITS = 5e-4


def exported(name: str, folder) -> dict:
    """The golden case in `folder`/out as transformers wants it; returns its config.json."""
    checkpoint = open_checkpoint(write_folder(name, folder))
    leaves = stored_leaves(checkpoint.tensors, checkpoint.config)
    save_checkpoint(leaves, checkpoint.config, folder / "out", form="llava-hf", max_shard="300KB")
    return json.loads((folder / "out" / "config.json").read_text())


def normalised(case, pixels: np.ndarray) -> Any:
    """u8[..., y, x, 3] as transformers' towers want it."""
    image = case.config.image
    values = (pixels.astype(np.float32) * (1 / 255) - np.float32(image.mean)) / np.float32(image.std)
    return torch.tensor(np.moveaxis(values, -1, -3))


@pytest.mark.parametrize("name", ["llava15", "llava_next"])
def test_our_llava_hf_export_gives_the_official_logits(name, tmp_path):
    case = load_case(name)
    image_token = exported(name, tmp_path)["image_token_index"]
    kind = "LlavaForConditionalGeneration" if name == "llava15" else "LlavaNextForConditionalGeneration"
    model, report = getattr(transformers, kind).from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model.eval()
    batch = build_batch(case)
    for row, picture in enumerate(open_images()):
        real = int((batch.segment_ids[row] > 0).sum())
        ids = np.where(batch.visual_index[row] >= 0, image_token, batch.tokens[row])[:real]
        views = int(np.any(batch.pixels[row], axis=(1, 2, 3)).sum())
        pixels = normalised(case, batch.pixels[row, :views])
        more = {"image_sizes": torch.tensor([picture.size[::-1]])} if name == "llava_next" else {}
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor(ids[None].astype(np.int64)),
                pixel_values=pixels[None] if name == "llava_next" else pixels,
                **more,
            )
        logits = output.logits[0, :, : case.config.decoder.vocab_size].numpy()
        at = case.arrays["logit_positions"]
        wanted = case.arrays["logits"][row][at < real]
        np.testing.assert_allclose(logits[at[at < real]], wanted, atol=LOGITS)


@pytest.mark.parametrize("name", ["llava15", "llava_next"])
def test_what_transformers_saves_is_read(name, tmp_path):
    exported(name, tmp_path)
    kind = "LlavaForConditionalGeneration" if name == "llava15" else "LlavaNextForConditionalGeneration"
    getattr(transformers, kind).from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    stored = open_checkpoint(tmp_path / "theirs")
    ours = open_checkpoint(tmp_path / "out")
    for section in ("vision", "decoder", "deepstack"):
        assert getattr(stored.config, section) == getattr(ours.config, section)
    leaves = stored_leaves(stored.tensors, stored.config)
    official = open_checkpoint(tmp_path / "hf")
    for path, leaf in stored_leaves(official.tensors, official.config).items():
        whole = tuple(slice(0, n) for n in leaf.shape)
        np.testing.assert_array_equal(leaves[path][whole], leaf[whole], err_msg=path)


def test_bare_clip_and_bare_llama_of_transformers(tmp_path):
    """Towers and language models as transformers writes them today give the outputs of the model that they came from."""
    case = load_case("llava15")
    tower = transformers.CLIPVisionModel.from_pretrained(write_folder("llava15", tmp_path).parent / "clip").eval()
    tower.save_pretrained(tmp_path / "tower")
    text = transformers.LlamaConfig(
        vocab_size=560, hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
        rms_norm_eps=1e-5, max_position_embeddings=2048,
    )  # fmt: skip
    language = transformers.LlamaForCausalLM(text).eval()
    language.save_pretrained(tmp_path / "language")
    official = official_tensors(case.info["hf_weights"])
    projector = {name: torch.tensor(tensor) for name, tensor in official.items() if "mm_projector" in name}
    torch.save(projector, tmp_path / "mm_projector.bin")
    opened = open_checkpoint(
        tmp_path / "language", tower=str(tmp_path / "tower"), projector=str(tmp_path / "mm_projector.bin"), run=case.config
    )
    model = case.model()
    batch = build_batch(case, [0])
    params = {"params": load_params(opened.tensors, opened.config)}
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    with torch.no_grad():
        states = tower(normalised(case, batch.pixels[0]), output_hidden_states=True).hidden_states
        text_only = np.array([[1, 17, 99, 254, 33]])
        wanted = language(torch.tensor(text_only)).logits.numpy()
    encoded = np.asarray(model.apply(params, batch.pixels, method="encode")[0])
    np.testing.assert_allclose(encoded[0], states[-2][0, 1:].numpy(), atol=1e-4)
    text_batch = batch._replace(
        tokens=text_only.astype(np.int32),
        positions=np.arange(5, dtype=np.int32)[None],
        segment_ids=np.ones((1, 5), np.int32),
        visual_index=np.full((1, 5), -1, np.int32),
    )
    logits = model.apply(params, model.apply(params, text_batch).hidden, method="logits")
    np.testing.assert_allclose(np.asarray(logits), wanted, atol=LOGITS)


FACTORS = [1.0, 1.2, 1.5, 2.0, 2.5, 3.0]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": FACTORS, "long_factor": [3 * factor for factor in FACTORS],
    "original_max_position_embeddings": 16,
}  # fmt: skip
RANDOM = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 4},
    "phi3, fewer keys than queries": {"model_type": "phi3", "num_key_value_heads": 2},
    "phi3, sliding window": {"model_type": "phi3", "sliding_window": 7},
    "phi3, short factors": {"model_type": "phi3", "rope_parameters": LONGROPE | {"original_max_position_embeddings": 64}},
    "phi3, long factors": {"model_type": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_llavas_of_transformers_over_llama_and_phi3(name, tmp_path):
    """Saved in shards, read here, and compared at every position of a row with a picture."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    words = {"vocab_size": 300, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    more = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1} | RANDOM[name]
    tower = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7, "hidden_size": 32, "intermediate_size": 64}
    config = transformers.LlavaConfig(
        vision_config=tower | {"num_hidden_layers": 4, "num_attention_heads": 4},
        text_config=sizes | words | more,
        image_token_index=299,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.15)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 28, "width": 28}}))
    lmm, picture = dsx.load(tmp_path), open_images()[0]
    ids = [1, 7, -200, *range(40, 52)]
    pixels = make_views(picture.convert("RGB"), lmm.config.image).pixels
    values = (pixels.astype(np.float32) / 255 - np.float32(lmm.config.image.mean)) / np.float32(lmm.config.image.std)
    with torch.no_grad():
        expanded = [token for id in ids for token in ([299] * 16 if id == -200 else [id])]
        wanted = model(input_ids=torch.tensor([expanded]), pixel_values=torch.tensor(np.moveaxis(values, -1, -3))).logits
    np.testing.assert_allclose(lmm.logits([ids], [[picture]]), wanted.numpy(), atol=LOGITS)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bin_files_of_torch(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator).to(getattr(torch, dtype))
    tensors = {"whole": base, "turned": base.T, "part": base[2:5, 1:7:2], "scalar": base[0, 0], "empty": base[:0]}
    torch.save(tensors, tmp_path / "new.bin")
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, tmp_path / "parameters.bin")
    for file in ("new.bin", "parameters.bin"):
        opened = open_bin(tmp_path / file)
        assert set(opened) == set(tensors)
        for name, tensor in tensors.items():
            read = opened[name].read()
            assert read.shape == tuple(tensor.shape)
            np.testing.assert_array_equal(read.astype(np.float32), tensor.float().numpy(), err_msg=f"{file} {name}")
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"before version 1\.6.*torch\.save"):
        open_bin(tmp_path / "old.bin")


_CHOICES = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("there", [list(some) for n in (1, 2, 3, 4) for some in itertools.combinations(_CHOICES, n)])
def test_files_are_chosen_as_transformers_chooses_them(there, tmp_path):
    """Its own function is the reference, whichever of the four kinds stand together; where two do, it is said."""
    for name in there:
        kind = "bin" if ".bin" in name else "safetensors"
        shard = f"{name.split('.')[0]}-00001-of-00001.{kind}"
        (tmp_path / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
        (tmp_path / shard).write_bytes(b"")
    theirs = transformers.modeling_utils._get_resolved_checkpoint_files(
        pretrained_model_name_or_path=str(tmp_path), variant=None, gguf_file=None, use_safetensors=None, user_agent=None,
        is_remote_code=False,
    )[0]  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [str(file) for file in weight_files(tmp_path)] == theirs
    assert [there[0] in str(one.message) and there[1] in str(one.message) for one in said] == [True] * (len(there) > 1)
