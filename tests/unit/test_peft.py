"""PEFT's files: what is written is read again, by the names of both forms, fused tensors among them; what is refused."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import deepstack_jax as dsx
from deepstack_jax.convert import ConvertSource, MergeCheck
from deepstack_jax.errors import WeightsError
from deepstack_jax.train.checkpoint.adapter import open_adapter
from deepstack_jax.weights.adapters import adapter_paths, adapter_shapes, is_adapter, merged
from deepstack_jax.weights.load import stored_leaves
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from deepstack_jax.weights.peft import Adapter, read_peft, write_peft
from deepstack_jax.weights.save import save_checkpoint
from tests.parity.goldens import write_folder

RANK = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: write_folder(name, root / name) for name in ("l_2d", "llava15", "phi")}


def draw_adapter(config, kernels=("/kernel",), whole=("projector/",), base=None) -> Adapter:
    """Noise for adapters of the kernels whose path ends so, but those of what is whole, and for that."""
    rng, leaves = np.random.default_rng(0), {}
    for path, leaf in NameTable(config).leaves.items():
        if path.startswith(whole):
            leaves[path] = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        elif path.endswith(kernels) and path.endswith("/kernel"):
            shapes = adapter_shapes(leaf, RANK)
            parts = [rng.normal(0, 0.3, shape).astype(np.float32) for shape in shapes[:2]]
            leaves |= dict(zip(adapter_paths(path), [*parts, np.full(shapes[2], 1.5, np.float32)], strict=True))
    return Adapter(leaves, base, "noise")


@pytest.mark.parametrize(("name", "form"), [("l_2d", "peft"), ("llava15", "peft"), ("llava15", "peft-llava-hf")])
def test_what_is_written_is_read_again(name, form, folders, tmp_path):
    config = open_checkpoint(folders[name]).config
    adapter = draw_adapter(config, base=0x1234ABCD)
    assert any(path.startswith("vision_tower/patch_embed/lora") for path in adapter.leaves)
    assert "head/lora_a" in adapter.leaves
    write_peft(tmp_path, adapter, config, form)
    found = read_peft(tmp_path, config)
    assert found.base == adapter.base
    assert found.leaves.keys() == adapter.leaves.keys()
    for path, leaf in adapter.leaves.items():
        np.testing.assert_array_equal(found.leaves[path], leaf, err_msg=path)


def test_fused_tensors_get_a_block_of_rank_for_each_kernel(folders, tmp_path):
    """Phi-3's qkv_proj and gate_up_proj; of `up` alone the rows of `gate` are zero."""
    config = open_checkpoint(folders["phi"]).config
    for kernels in (
        ("attention/q/kernel", "attention/k/kernel", "attention/v/kernel", "mlp/up/kernel"),
        ("attention/v/kernel",),
    ):
        adapter = draw_adapter(config, kernels, whole=("nothing",))
        write_peft(tmp_path, adapter, config, "peft")
        found = read_peft(tmp_path, config)
        base = {path: np.zeros(leaf.shape, np.float32) for path, leaf in NameTable(config).leaves.items()}
        ours, theirs = (merged({**base, **one.leaves}, config) for one in (adapter, found))
        for path in base:
            if "layers/layers/block" in path and path.endswith("kernel"):
                for layer in range(config.decoder.layers):
                    np.testing.assert_allclose(theirs[path][layer], ours[path][layer], atol=1e-6, err_msg=path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored["base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"].shape == (RANK, 48)


def rewrite(folder, config_changes=None, tensors=None) -> None:
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | (config_changes or {})))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")


def test_alpha_is_read_as_peft_does(folders, tmp_path):
    config = open_checkpoint(folders["l_2d"]).config
    write_peft(tmp_path, draw_adapter(config, ("mlp/up/kernel", "mlp/down/kernel"), ()), config, "peft")

    def scales(**changes):
        rewrite(tmp_path, {"alpha_pattern": {}, "use_rslora": False} | changes)
        leaves = read_peft(tmp_path, config).leaves
        return [leaves[f"layers/layers/block/mlp/{name}/lora_scale"].tolist() for name in ("up", "down")]

    assert scales(lora_alpha=6) == [[2.0] * 6, [2.0] * 6]
    assert scales(lora_alpha=6, use_rslora=True) == [[pytest.approx(6 / 3**0.5)] * 6] * 2
    assert scales(lora_alpha=6, alpha_pattern={"layers.2.mlp.up_proj": 3}) == [[2.0, 2.0, 1.0, 2.0, 2.0, 2.0], [2.0] * 6]


def test_adapters_of_some_layers_are_zero_in_the_others(folders, tmp_path):
    config = open_checkpoint(folders["l_2d"]).config
    write_peft(tmp_path, draw_adapter(config, ("mlp/up/kernel",), ()), config, "peft")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rewrite(tmp_path, tensors={name: tensor for name, tensor in tensors.items() if ".layers.4." in name})
    leaves = read_peft(tmp_path, config).leaves
    assert leaves.keys() == set(adapter_paths("layers/layers/block/mlp/up/kernel"))
    assert [bool(layer.any()) for layer in leaves["layers/layers/block/mlp/up/lora_b"]] == [False] * 4 + [True, False]


def halved(tensors):
    return {name: tensor for name, tensor in tensors.items() if "lora_B" not in name}


def elsewhere(tensors):
    return tensors | {"base_model.model.x.lora_A.weight": np.zeros((3, 4), np.float32)}


def narrower(tensors):
    return {name: np.ascontiguousarray(t[:, :-1]) if "lora_A" in name else t for name, t in tensors.items()}


REFUSED = {
    "a kind of its own": ({"use_dora": True}, None, "has use_dora=True, expected plain LoRA"),
    "another method": ({"peft_type": "IA3"}, None, "has peft_type='IA3', expected plain LoRA"),
    "half of a pair": ({}, halved, "up_proj.weight without its other half"),
    "no such module": ({}, elsewhere, "holds base_model.model.x"),
    "another size": ({}, narrower, "of another model"),
    "an alpha that is none": ({"lora_alpha": "large"}, None, "the alpha of .* is 'large', expected a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, folders, tmp_path):
    changes, edit, message = REFUSED[case]
    config = open_checkpoint(folders["l_2d"]).config
    write_peft(tmp_path, draw_adapter(config, ("mlp/up/kernel",), ()), config, "peft")
    rewrite(tmp_path, changes, None if edit is None else edit(load_file(tmp_path / "adapter_model.safetensors")))
    with pytest.raises(WeightsError, match=message) as raised:
        read_peft(tmp_path, config)
    assert "\n" not in str(raised.value)


def test_an_adapter_is_loaded_over_its_base_and_no_other(folders, tmp_path):
    base = folders["l_2d"]
    config = open_checkpoint(base).config
    write_peft(tmp_path, draw_adapter(config, ("mlp/up/kernel", "block/fc1/kernel")), config, "peft")
    ids = np.array([[1, 5, 7, 9, 11, 4]])
    lmm = dsx.load(base, adapter=tmp_path)
    plain, adapted = dsx.load(base).logits(ids), lmm.logits(ids)
    assert np.abs(plain - adapted).max() > 0.01
    assert not any(np.isnan(leaf).any() for leaf in lmm.params["layers"]["layers"]["block"]["mlp"]["up"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lmm.save_hf(tmp_path / "out")
    np.testing.assert_allclose(dsx.load(tmp_path / "out").logits(ids), adapted, atol=1e-5 * np.abs(adapted).max())
    write_peft(tmp_path, draw_adapter(config, base=1), config, "peft")
    with pytest.raises(WeightsError, match=r"trained over a base with checksum 00000001, and \S+ gives [0-9a-f]{8}"):
        dsx.load(base, adapter=tmp_path)


def test_a_merge_that_went_wrong_is_not_written(folders, tmp_path):
    stored = open_checkpoint(folders["l_2d"])
    leaves = dict(stored_leaves(stored.tensors, stored.config)) | draw_adapter(stored.config, ("mlp/up/kernel",), ()).leaves
    check = MergeCheck(ConvertSource(stored.config, leaves, "float32", "", {}, ""), "float32")
    save_checkpoint(merged(leaves, stored.config), stored.config, tmp_path / "out", check=check)
    assert check.difference < 1e-5
    assert not any(map(is_adapter, NameTable(open_checkpoint(tmp_path / "out").config).leaves))
    plain = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    with pytest.raises(WeightsError, match=r"merged adapters give other logits, by .* of their size, expected 0.0001"):
        save_checkpoint(plain, stored.config, tmp_path / "wrong", check=check)
    assert not (tmp_path / "wrong").exists()


def test_a_folder_of_adapters_alone_asks_for_its_base(folders, tmp_path):
    config = open_checkpoint(folders["l_2d"]).config
    write_peft(tmp_path, draw_adapter(config), config, "peft")
    with pytest.raises(WeightsError, match="expected whole weights; give its base model, and this folder with adapter"):
        dsx.load(tmp_path)
    with pytest.raises(WeightsError, match="holds no adapters, expected the workdir of a run"):
        open_adapter(folders["l_2d"], config)


def test_a_newline_that_was_trained_has_no_place_in_peft(folders, tmp_path):
    config = open_checkpoint(folders["l_2d"]).config
    config = dataclasses.replace(config, image=dataclasses.replace(config.image, mode="hd", merge="spatial_unpad"))
    with pytest.raises(WeightsError, match="image_newline was trained beside the adapters"):
        write_peft(tmp_path, draw_adapter(config, whole=("image_newline",)), config, "peft")
    assert not any(map(is_adapter, NameTable(config).leaves))
