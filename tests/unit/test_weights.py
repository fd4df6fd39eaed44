"""Checkpoints in and out: every official golden folder, other namings, several folders put together, and what fits nothing."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import deepstack_jax as dsx
from deepstack_jax.api import load_in_verb
from deepstack_jax.batch import empty_batch
from deepstack_jax.config import Config, DecoderConfig, VisionConfig
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.base import TOWER
from deepstack_jax.families.build import build_model
from deepstack_jax.families.llava_hf import llava_hf_name
from deepstack_jax.weights.checkpoint_files import read_model_json
from deepstack_jax.weights.load import absent_leaves, load_params, stored_leaves
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from deepstack_jax.weights.save import save_checkpoint
from tests.parity.goldens import GOLDEN, load_case, official_tensors, write_folder
from tests.unit.bins import write_bin

# (image mode, sequence, stack, sampling, start, interval, into) of the folders.
READ_AS = {
    "l_2d": ("deepstack", "global", "crops", "2d", 1, 1, "decoder"),
    "l_2d_start3_int2": ("deepstack", "global", "crops", "2d", 3, 2, "decoder"),
    "l_1d": ("deepstack", "global", "crops", "1d", 1, 1, "decoder"),
    "l_grid": ("deepstack", "global", "crops", "grid", 1, 1, "decoder"),
    "l_string_withglobal": ("deepstack", "global_crops", "none", "2d", 1, 1, "decoder"),
    "l_only_global": ("deepstack", "zero", "global", "2d", 1, 1, "decoder"),
    "v": ("deepstack", "global", "crops", "2d", 1, 1, "vision"),
    "hd": ("hd", "global", "crops", "2d", 1, 1, "decoder"),
    "generate_hd": ("hd", "global", "crops", "2d", 1, 1, "decoder"),
    "llava15": ("pad", "global", "none", "2d", 1, 1, "decoder"),
    "llava_next": ("anyres", "global", "none", "2d", 1, 1, "decoder"),
}
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/case.json"))


@pytest.fixture
def folder(tmp_path):
    """A DeepStack-L checkpoint as users have it."""
    return write_folder("l_2d", tmp_path)


def change(folder, *, drop=(), **tensors) -> None:
    """Rewrite the folder's tensors; `drop` are beginnings of names."""
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(tuple(drop))}
    save_file(kept | tensors, file)


def change_config(folder, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | values).items() if v is not ...}))


def read(checkpoint, **more) -> dict:
    """All parameters by path."""
    return traverse_util.flatten_dict(load_params(checkpoint.tensors, checkpoint.config, **more), sep="/")


def same(ours, theirs) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        assert np.asarray(ours[name]).tobytes() == np.asarray(theirs[name]).tobytes(), name
        assert ours[name].shape == theirs[name].shape, name


def other_sizes(name: str) -> Config:
    """The golden's model with grouped heads, and for DeepStack-V with layers after the tower."""
    config = open_config(name)
    decoder = dataclasses.replace(config.decoder, kv_heads=2, mlp=40)
    if config.deepstack.into == "vision":
        start, post = config.vision.layers + 1, 5
        return dataclasses.replace(
            config,
            decoder=decoder,
            vision=dataclasses.replace(config.vision, post_layers=post),
            deepstack=dataclasses.replace(config.deepstack, vision_start=start),
        )
    return dataclasses.replace(config, decoder=decoder)


def open_config(name: str) -> Config:
    return load_case(name).config


@pytest.mark.quick
@pytest.mark.parametrize("name", CASES)
def test_import_then_export_is_the_same_folder(name, tmp_path):
    hf = write_folder(name, tmp_path)
    checkpoint = open_checkpoint(hf)
    params = stored_leaves(checkpoint.tensors, checkpoint.config)
    save_checkpoint(params, checkpoint.config, tmp_path / "out", passthrough=checkpoint.passthrough)
    for part in ("config.json", "clip/config.json", "clip/preprocessor_config.json"):
        theirs = hf / part if part == "config.json" else tmp_path / part
        assert json.loads((tmp_path / "out" / part).read_text()) == json.loads(theirs.read_text()), part
    same(load_file(tmp_path / "out" / "model.safetensors"), load_file(hf / "model.safetensors"))
    same(load_file(tmp_path / "out" / "clip" / "model.safetensors"), load_file(tmp_path / "clip" / "model.safetensors"))
    again = open_checkpoint(tmp_path / "out")
    assert again.config == checkpoint.config
    assert again.passthrough == checkpoint.passthrough
    stack = checkpoint.config.deepstack
    found = (checkpoint.config.image.mode, stack.sequence, stack.stack, stack.sampling, stack.start, stack.interval, stack.into)
    assert found == READ_AS.get(name, READ_AS["l_2d"])
    assert checkpoint.config.vision == VisionConfig(patch_size=7, width=32, layers=4, heads=4, mlp=64)
    assert checkpoint.config.decoder == DecoderConfig(
        architecture="phi3" if name == "phi" else "llama",
        vocab_size=571 if name == "phi" else 560,
        width=48,
        layers=6,
        heads=4,
        kv_heads=4,
        head_dim=12,
        mlp=96,
        max_positions=2048,
    )
    assert checkpoint.template == ("phi3_instruct" if name == "phi" else "v1")


@pytest.mark.parametrize("name", ["l_2d", "phi", "v", "hd"])
def test_the_table_has_the_models_own_parameters_and_every_layout_is_a_bijection(name, tmp_path):
    config = other_sizes(name)
    batch = empty_batch(config.data_spec.batch_shape(1, config.data.max_length))
    shapes = nn.unbox(jax.eval_shape(build_model(config).init, jax.random.key(0), batch))["params"]
    table = NameTable(config)
    ours = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
    assert {path: leaf.shape for path, leaf in table.leaves.items()} == ours
    rng = np.random.default_rng(0)
    drawn = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in ours.items()}
    save_checkpoint(drawn, config, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor: saved[tensor].shape for tensor in saved} == {tensor: f.shape for tensor, f in table.tensors.items()}
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config.decoder == dataclasses.replace(
        config.decoder, max_positions=checkpoint.config.decoder.max_positions
    )
    assert checkpoint.config.vision == config.vision
    same(read(checkpoint), drawn)
    behind = [tensor for tensor in saved if ".post_encoder." in tensor]
    assert len(behind) == 16 * config.vision.post_layers
    assert not any("post_encoder" in tensor for tensor in load_file(tmp_path / "out" / "clip" / "model.safetensors"))


def test_fused_phi3_kernels_are_query_key_value_and_gate_up(tmp_path):
    config = other_sizes("phi")
    rng = np.random.default_rng(0)
    drawn = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in NameTable(config).leaves.items()}
    save_checkpoint(drawn, config, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    x = rng.standard_normal(48).astype(np.float32)
    block = "layers/layers/block/"
    q, k, v = np.split(saved["model.layers.3.self_attn.qkv_proj.weight"] @ x, [48, 72])
    for fused, leaf in ((q, "q"), (k, "k"), (v, "v")):
        np.testing.assert_allclose(
            fused, np.einsum("d,dnh->nh", x, drawn[f"{block}attention/{leaf}/kernel"][3]).ravel(), atol=1e-4
        )
    gate, up = np.split(saved["model.layers.3.mlp.gate_up_proj.weight"] @ x, 2)
    np.testing.assert_allclose(gate, x @ drawn[block + "mlp/gate/kernel"][3], atol=1e-4)
    np.testing.assert_allclose(up, x @ drawn[block + "mlp/up/kernel"][3], atol=1e-4)


def test_bfloat16_bin_shards_and_devices_give_the_same_parameters(folder, tmp_path):
    plain = read(open_checkpoint(folder))
    devices = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    axes = {3: ("a", None, None), 48: ("b",), 6: (None, "a", "b"), 17: (None, "b")}
    places = {
        path: NamedSharding(devices, PartitionSpec(*axes.get(leaf.shape[0], ())[: leaf.ndim])) for path, leaf in plain.items()
    }
    assert sum(not place.is_fully_replicated for place in places.values()) > 8
    checkpoint = open_checkpoint(folder)
    sharded = read(checkpoint, shardings=traverse_util.unflatten_dict(places, sep="/"))
    assert {path: leaf.sharding for path, leaf in sharded.items()} == places
    same(sharded, plain)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_bin(folder / "pytorch_model.bin", {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})
    rounded = {path: np.asarray(leaf).astype(ml_dtypes.bfloat16) for path, leaf in plain.items()}
    same(read(open_checkpoint(folder), dtype=jnp.bfloat16), rounded)
    same(read(open_checkpoint(folder)), {path: leaf.astype(np.float32) for path, leaf in rounded.items()})


@pytest.mark.parametrize("form", ["disk", "model"])
def test_llava_hf_names(form, tmp_path):
    hf = write_folder("llava_next", tmp_path)
    official = open_checkpoint(hf)
    save_checkpoint(stored_leaves(official.tensors, official.config), official.config, tmp_path / "out", form="llava-hf")
    out = tmp_path / "out"
    tensors = load_file(out / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {
        "language_model",
        "vision_tower",
        "multi_modal_projector",
        "image_newline",
    }
    if form == "model":  # as transformers 5 names them inside
        names = {
            name: "model." + name.replace("vision_model.", "").replace("language_model.model", "language_model")
            for name in tensors
        }
        names |= {"language_model.lm_head.weight": "lm_head.weight"}
        save_file({names[name]: tensor for name, tensor in tensors.items()}, out / "model.safetensors")
    checkpoint = open_checkpoint(out)
    assert checkpoint.config.image == dataclasses.replace(official.config.image)
    ours, theirs = read(checkpoint), read(official)
    vocabulary = official.config.decoder.vocab_size
    assert ours["embed/embedding"].shape[0] == vocabulary + 1
    ours["embed/embedding"], ours["head/kernel"] = ours["embed/embedding"][:vocabulary], ours["head/kernel"][:, :vocabulary]
    same(ours, theirs)


def bare(tmp_path, *, whole_clip: bool) -> tuple:
    """A bare language model, a CLIP beside it and an mm_projector.bin, out of a golden's tensors."""
    case = load_case("l_2d")
    tensors = official_tensors(case.info["hf_weights"])
    for part in ("vicuna", "clip"):
        (tmp_path / part).mkdir()
    write_bin(tmp_path / "mm_projector.bin", {name: t for name, t in tensors.items() if "mm_projector" in name})
    language = {name: t for name, t in tensors.items() if not name.startswith((TOWER, "model.mm_projector"))}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    write_bin(tmp_path / "vicuna" / "pytorch_model.bin", language | buffer)
    values = json.loads((GOLDEN / "l_2d" / "hf" / "config.json").read_text())
    keep = ("vocab_size", "intermediate_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    llama = {key: value for key, value in values.items() if key in keep or key.startswith(("num_", "hidden_"))}
    (tmp_path / "vicuna" / "config.json").write_text(json.dumps(llama | {"model_type": "llama"}))
    tower = {name.removeprefix(TOWER): t for name, t in tensors.items() if name.startswith(TOWER)}
    clip = json.loads((GOLDEN / "clip" / "config.json").read_text())
    if whole_clip:
        tower |= {"text_model.final_layer_norm.weight": np.ones(4, np.float32), "logit_scale": np.ones((), np.float32)}
        tower["vision_model.embeddings.position_ids"] = np.arange(17)[None]
        clip = {"model_type": "clip", "vision_config": clip}
    save_file(tower, tmp_path / "clip" / "model.safetensors")
    (tmp_path / "clip" / "config.json").write_text(json.dumps(clip))
    return case, tensors


@pytest.mark.parametrize("whole_clip", [False, True])
def test_bare_clip_and_llama_start_a_run_with_or_without_a_projector(whole_clip, tmp_path):
    case, _ = bare(tmp_path, whole_clip=whole_clip)
    parts = {"tower": str(tmp_path / "clip"), "run": case.config}
    whole = open_checkpoint(tmp_path / "vicuna", projector=str(tmp_path / "mm_projector.bin"), **parts)
    golden = read(open_checkpoint(write_folder("l_2d", tmp_path / "golden")))
    assert whole.config is case.config
    assert absent_leaves(whole.tensors, whole.config) == ()
    same(read(whole), golden)
    fresh_start = open_checkpoint(tmp_path / "vicuna", **parts)
    absent = absent_leaves(fresh_start.tensors, fresh_start.config)
    assert absent == ("projector/fc1/kernel", "projector/fc1/bias", "projector/fc2/kernel", "projector/fc2/bias")
    drawn = {path: np.full(golden[path].shape, 0.5, np.float32) for path in absent}
    same(read(fresh_start, fresh=drawn), golden | drawn)
    with pytest.raises(WeightsError, match=r"4 missing: model\.mm_projector\..*--projector=FILE"):
        read(fresh_start)
    with pytest.raises(WeightsError, match=r"bare llama.*train on it first"):
        open_checkpoint(tmp_path / "vicuna", tower=str(tmp_path / "clip"))
    with pytest.raises(WeightsError, match=r"vision tower's folder with --tower=DIR"):
        open_checkpoint(tmp_path / "vicuna", run=case.config)


def test_a_projector_alone_is_put_over_its_base(tmp_path):
    bare(tmp_path, whole_clip=False)
    stage1 = tmp_path / "stage1"
    stage1.mkdir()
    shutil.copyfile(GOLDEN / "l_2d" / "hf" / "config.json", stage1 / "config.json")
    shutil.copyfile(tmp_path / "mm_projector.bin", stage1 / "mm_projector.bin")
    same(
        read(open_checkpoint(stage1, base=str(tmp_path / "vicuna"))),
        read(open_checkpoint(write_folder("l_2d", tmp_path / "golden"))),
    )
    with pytest.raises(WeightsError, match=r"holds a projector alone; give its language model with --base=DIR"):
        open_checkpoint(stage1)
    change_config(stage1, num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(WeightsError, match=r"--base=.*config\.decoder\.heads is 8, the weights have 4"):
        open_checkpoint(stage1, base=str(tmp_path / "vicuna"))


def test_what_a_plain_tower_lacks_may_be_drawn_layer_by_layer(folder):
    base = open_config("l_2d")
    run = dataclasses.replace(
        base,
        image=dataclasses.replace(base.image, grid="square"),
        vision=dataclasses.replace(base.vision, post_layers=5),
        deepstack=dataclasses.replace(base.deepstack, into="vision", vision_start=4),
    )
    checkpoint = open_checkpoint(folder, run=run)
    absent = absent_leaves(checkpoint.tensors, run)
    assert len(absent) == 16
    assert all(path.startswith("vision_tower/layers/block/") for path in absent)
    leaves = NameTable(run).leaves
    drawn = {path: np.random.default_rng(0).standard_normal(leaves[path].shape).astype(np.float32) for path in absent}
    params, plain = read(checkpoint, fresh=drawn), read(open_checkpoint(folder))
    for path in absent:
        np.testing.assert_array_equal(params[path][:4], plain[path])
        np.testing.assert_array_equal(params[path][4:], drawn[path][4:])


def test_the_tower_inside_wins_and_one_outside_is_found_beside_or_above(folder, tmp_path):
    inside = read(open_checkpoint(folder))
    save_file(
        {n: t + 1 for n, t in load_file(tmp_path / "clip" / "model.safetensors").items()},
        tmp_path / "clip" / "model.safetensors",
    )
    same(read(open_checkpoint(folder)), inside)
    change(folder, drop=[TOWER])
    outside = read(open_checkpoint(folder))
    np.testing.assert_array_equal(outside["vision_tower/cls"], inside["vision_tower/cls"] + 1)
    shutil.move(tmp_path / "clip", folder / "clip")
    same(read(open_checkpoint(folder)), outside)
    shutil.move(folder / "clip", tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=r"mm_vision_tower is 'clip', which is not a folder here; put .*--tower=DIR"):
        open_checkpoint(folder)
    with pytest.raises(WeightsError, match=r"or name it with tower=DIR"):
        dsx.load(folder)
    with pytest.raises(WeightsError, match=r"or name it with convert's --tower=DIR"):
        load_in_verb(str(folder), "float32")
    same(read(open_checkpoint(folder, tower=str(tmp_path / "elsewhere"))), outside)
    change_config(folder, mm_vision_tower=str(tmp_path / "elsewhere"))
    same(read(open_checkpoint(folder)), outside)


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        (["model.norm", "lm_head"], {}, r"2 missing: lm_head\.weight, model\.norm\.weight"),
        (["lm_head"], {}, r"1 missing: lm_head\.weight.*tied to the embeddings"),
        ([], {"model.extra": np.zeros(2)}, r"1 unknown: model\.extra"),
        ([], {"model.norm.weight": np.zeros(5)}, r"1 misshapen: model\.norm\.weight is \[5\], expected \[48\]"),
        (
            ["model.layers.4", "model.layers.5"],
            {},
            r"18 missing: model\.layers\.\{4-5\}\..*num_hidden_layers|a shard is missing",
        ),
        (["model.mm_projector"], {}, r"4 missing: model\.mm_projector\.\{0,2\}\.weight.*--projector=FILE"),
        ([], {"model.image_newline": np.zeros(48)}, r"1 unknown: model\.image_newline.*spatial_unpad"),
        ([], {"model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros(1)}, r"LoRA weights: give their base model"),
        (
            [],
            {"model.embed_tokens.weight": np.zeros((563, 48))},
            r"563, 48\], expected \[560, 48\].*563 rows, vocab_size .* is 560",
        ),
        (
            ["model.norm"],
            {"model.extra": np.zeros(2), "lm_head.weight": np.zeros(2)},
            "1 missing: .*1 unknown: .*1 misshapen: ",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_all_listed_with_a_guess(drop, add, message, folder):
    change(folder, drop=drop, **{name: tensor.astype(np.float32) for name, tensor in add.items()})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(WeightsError, match=message) as caught:
        load_params(checkpoint.tensors, checkpoint.config)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_no_weights(folder):
    change(folder, **{"model.norm.weight": np.ones(48, np.int64)})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(WeightsError, match=r"weights must be floating point, got model\.norm\.weight is int64"):
        load_params(checkpoint.tensors, checkpoint.config)


def test_a_tower_must_be_named(folder):
    change_config(folder, mm_vision_tower=3)
    with pytest.raises(WeightsError, match="mm_vision_tower is 3, expected the name of a folder"):
        open_checkpoint(folder)


def test_an_hd_run_with_another_sampling_is_another_model_to_the_official_code(tmp_path):
    """Upstream deals HD's crops in one way, whatever its config.json says."""
    found = open_checkpoint(write_folder("hd", tmp_path))
    changed = dataclasses.replace(found.config, deepstack=dataclasses.replace(found.config.deepstack, sampling="grid"))
    with pytest.warns(UserWarning, match=r"config\.deepstack\.sampling='grid': the official code has no such model"):
        save_checkpoint(stored_leaves(found.tensors, changed), changed, tmp_path / "out", passthrough=found.passthrough)
    assert open_checkpoint(tmp_path / "out").config == changed


def test_a_tensor_in_two_files_is_an_error_that_names_both(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"1 tensors are .* twice: lm_head\.weight in model-00001\S* and model-00002"):
        open_checkpoint(folder)


def test_a_run_of_other_sizes_is_refused_with_every_difference(folder):
    run = open_config("l_2d")
    run = dataclasses.replace(run, decoder=dataclasses.replace(run.decoder, width=64, vocab_size=600))
    with pytest.raises(
        WeightsError, match=r"decoder\.vocab_size is 600, the weights have 560; .*decoder\.width is 64, .* have 48"
    ):
        open_checkpoint(folder, run=run)


def test_a_newline_that_the_run_does_not_use_is_left_out_aloud(tmp_path):
    with pytest.warns(UserWarning, match="image_newline.*does not use"):
        checkpoint = open_checkpoint(write_folder("llava_next", tmp_path), run=open_config("l_2d"))
    assert "image_newline" not in load_params(checkpoint.tensors, checkpoint.config)


def test_folders_that_are_no_checkpoints(folder, tmp_path):
    for path, message in ((tmp_path / "none", "no folder"), (tmp_path / "clip", "model_type is 'clip_vision_model', expected")):
        with pytest.raises(WeightsError, match=message):
            open_checkpoint(path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"LoRA adapter.*give its base model, and this folder with --adapter=DIR"):
        open_checkpoint(folder)
    (folder / "adapter_config.json").unlink()
    for content in ("{", "[]"):
        (folder / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=r"config\.json .*download it again"):
            open_checkpoint(folder)


def test_an_export_is_whole_or_not_there(folder, tmp_path):
    checkpoint = open_checkpoint(folder)
    leaves = stored_leaves(checkpoint.tensors, checkpoint.config)
    out = tmp_path / "out"
    save_checkpoint(leaves, checkpoint.config, out)
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    with pytest.raises(WeightsError, match=r"out is not empty; .*--force"):
        save_checkpoint(leaves, checkpoint.config, out)
    with pytest.raises(WeightsError, match=r"1 parameters do not fit.*head/kernel: missing"):
        save_checkpoint({k: v for k, v in leaves.items() if k != "head/kernel"}, checkpoint.config, out, force=True)
    with pytest.raises(WeightsError, match=r"no tokenizer\.model and no tokenizer\.json in"):
        save_checkpoint(leaves, checkpoint.config, out, force=True, tokenizer_folder=str(folder))

    class Full:
        shape = leaves["head/kernel"].shape

        def __getitem__(self, index):
            raise OSError(28, "No space left on device")

    with pytest.raises(WeightsError, match="No space left on device; choose another folder"):
        save_checkpoint({**leaves, "head/kernel": Full()}, checkpoint.config, out, force=True)
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "clip", "out"}
    tokenizer = GOLDEN / "tokenizer" / "llama_legacy_true"
    save_checkpoint(leaves, checkpoint.config, out, force=True, tokenizer_folder=str(tokenizer), dtype="bfloat16")
    assert (out / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()
    assert open_checkpoint(out).tokenizer == str(out)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in open_checkpoint(out).tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_llava_hf_names_are_those_that_the_project_publishes():
    assert llava_hf_name("model.layers.3.mlp.up_proj.weight") == "language_model.model.layers.3.mlp.up_proj.weight"
    assert llava_hf_name("lm_head.weight") == "language_model.lm_head.weight"
    assert llava_hf_name("model.mm_projector.2.bias") == "multi_modal_projector.linear_2.bias"
    assert llava_hf_name("model.image_newline") == "image_newline"
    assert llava_hf_name(TOWER + "vision_model.pre_layrnorm.bias") == "vision_tower.vision_model.pre_layrnorm.bias"


def test_hub_ids_are_found_in_the_cache(tmp_path, monkeypatch):
    hf = write_folder("l_2d", tmp_path / "made")
    for name, made in (("org/model", hf), ("openai/tiny", hf.parent / "clip")):
        stored = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (stored / "refs").mkdir(parents=True)
        (stored / "refs" / "main").write_text("abc")
        shutil.copytree(made, stored / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    change(tmp_path / "hub" / "models--org--model" / "snapshots" / "abc", drop=[TOWER])
    change_config(tmp_path / "hub" / "models--org--model" / "snapshots" / "abc", mm_vision_tower="openai/tiny")
    same(read(open_checkpoint("org/model")), read(open_checkpoint(hf)))
    with pytest.raises(
        WeightsError, match=r"org/absent is not a folder, and cannot be fetched from the hub \(.*\); give a folder"
    ):
        open_checkpoint("org/absent")


def test_what_official_files_cannot_say_stands_beside_them(folder, tmp_path):
    """Filters, template and a tokenizer without files come back; a plain model gets no such file."""
    found = open_checkpoint(folder)
    leaves = stored_leaves(found.tensors, found.config)
    save_checkpoint(leaves, found.config, tmp_path / "plain", passthrough=found.passthrough)
    assert not (tmp_path / "plain" / "deepstack_jax.json").exists()
    image = dataclasses.replace(found.config.image, global_filter="box")
    data = dataclasses.replace(found.config.data, template="plain", tokenizer="words:a b")
    changed = dataclasses.replace(found.config, image=image, data=data)
    with pytest.warns(UserWarning, match=r"config\.image\.global_filter='box': other code resizes with another filter"):
        save_checkpoint(leaves, changed, tmp_path / "box", passthrough=found.passthrough)
    again = open_checkpoint(tmp_path / "box")
    assert again.config == changed
    assert again.template == "plain"
    assert read_model_json(tmp_path / "box" / "config.json") == read_model_json(tmp_path / "plain" / "config.json")
    (tmp_path / "box" / "deepstack_jax.json").write_text('{"image.global_filtre": "box"}')
    with pytest.raises(WeightsError, match=r"deepstack_jax\.json does not fit the rest of the folder"):
        open_checkpoint(tmp_path / "box")


def test_a_file_in_the_way_is_left_alone(folder, tmp_path):
    found = open_checkpoint(folder)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(WeightsError, match="is a file; name a folder that is new or empty"):
        save_checkpoint(stored_leaves(found.tensors, found.config), found.config, tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "mine"
