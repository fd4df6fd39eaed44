"""A tower and a decoder that are defined here alone train, are saved, exported, planned and asked; nobody else knows a family.

The tower has no class token; the decoder has biases and its embeddings are its head; a hidden state of the tower is tapped
beside the crops.
"""

import ast
import dataclasses
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import deepstack_jax as dsx
from deepstack_jax.config import Config, ConfigError, DecoderConfig, VisionConfig, build_config, default_config, to_dict
from deepstack_jax.config.schema import SECTIONS
from deepstack_jax.evaluate.in_training import TrainingEvaluation
from deepstack_jax.families import base
from deepstack_jax.families.base import TOWER, Names, Row, register
from deepstack_jax.families.build import build_model
from deepstack_jax.families.clip import Clip
from deepstack_jax.families.llama import Llama
from deepstack_jax.families.values import flag
from deepstack_jax.generate.decoding import empty_cache
from deepstack_jax.model.decoder import Attention, Decoder, InjectedBlock, SwiGLU
from deepstack_jax.model.layers import RMSNorm
from deepstack_jax.model.vision import EncoderLayer, VisionTower
from deepstack_jax.plan.planner import Wanted, make_plan
from deepstack_jax.plan.topology import Machine
from deepstack_jax.printing import Console
from deepstack_jax.train.checkpoint.restore_params import restore_params
from deepstack_jax.train.flops import step_flops
from deepstack_jax.train.run.train import train
from deepstack_jax.weights.names import NameTable
from tests.unit.test_planning import CHIP
from tests.unit.tiny import TINY, decoder_schedule, example, make_batch

PACKAGE = Path(__file__).parents[2] / "deepstack_jax"
STEPS = 30


@dataclass(frozen=True)
class BareVision(VisionConfig):
    architecture: str = "bare_vit"
    class_token: bool = False  # whether there is one before the patches


class BareTower(Clip):
    """A ViT without CLS, whose tensors are called otherwise."""

    architecture, section, model_types = "bare_vit", BareVision, ("bare_vit_model",)

    def build(self, config, **settings):
        remat, token = config.decoder.remat != "none", config.vision.class_token
        return VisionTower(config.vision, config.image.size, remat=remat, class_token=token, **settings)

    def prefix_tokens(self, vision):
        return int(vision.class_token)

    def names(self, config):
        names = super().names(config)
        rows = tuple(row for row in names.rows if row.ours != "vision_tower/cls")
        layers = tuple(f"{TOWER}blocks.{layer}." for layer in range(config.vision.layers))
        return Names(rows, names.sizes, layers)

    def official_name(self, name):
        return TOWER + name

    def from_hf(self, values):
        vision, size = super().from_hf(values | {"model_type": "clip_vision_model"})
        own = {"architecture": "bare_vit", "class_token": flag(values, "class_token", False)}
        return BareVision(**dataclasses.asdict(vision) | own), size

    def to_hf(self, config):
        return super().to_hf(config) | {"model_type": "bare_vit_model", "class_token": config.vision.class_token}


@dataclass(frozen=True)
class TiedDecoder(DecoderConfig):
    architecture: str = "tied_llm"
    tied_head: bool = True


class BiasedBlock(InjectedBlock):
    def layer(self, x, call):
        normed = RMSNorm(self.config.norm_eps, name="attention_norm")(x)
        attention = Attention(self.config, self.attend, self.dtype, bias=True, out_bias=True, name="attention")
        attended, cache = attention(normed, call)
        x = x + attended
        return x + SwiGLU(self.config, self.dtype, bias=True, name="mlp")(RMSNorm(1e-5, name="mlp_norm")(x)), cache


class TiedFamily(Llama):
    architecture, section, model_types, template = "tied_llm", TiedDecoder, ("tied",), "direct"
    official = {"deepstack_tied": "tied"}  # noqa: RUF012
    defaults = {"tied": {"rms_norm_eps": 1e-5, "rope_theta": 10000.0}}  # noqa: RUF012

    def build(self, config, **settings):
        return Decoder(config.decoder, decoder_schedule(config), block=BiasedBlock, **settings)

    def names(self, config):
        names, biases = super().names(config), []
        for row in names.rows:
            if row.ours.endswith("/kernel"):
                ours, theirs = row.ours.removesuffix("kernel") + "bias", row.theirs.removesuffix("weight") + "bias"
                biases.append(Row(ours, theirs, "flat", row.sizes.partition("| ")[2]))
        return Names((*names.rows, *biases), names.sizes, names.layers)

    def from_hf(self, values, model_type):
        return super().from_hf({key: value for key, value in values.items() if key != "attention_bias"}, model_type)

    def official_type(self, decoder, baseline):
        return "deepstack_tied", "DeepstackTiedForCausalLM"


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Known while these tests run, and to nobody else."""
    register(BareTower())
    register(TiedFamily())
    yield
    del base.TOWERS["bare_vit"], base.DECODERS["tied_llm"]
    del SECTIONS["vision"]["bare_vit"], SECTIONS["decoder"]["tied_llm"]


def config_of(more: dict | None = None) -> Config:
    source = default_config(vision="bare_vit", decoder="tied_llm")
    changes = {
        "image.size": 64,
        "image.global_filter": "box",
        "vision.patch_size": 16,
        "vision.position_std": 0.02,
        "deepstack.stack": "crops_taps",
        "deepstack.taps": ((1, 0),),
        "data.source": "pages",
        "data.template": "direct",
        "data.tokenizer": "bytes",
        "data.synthetic.questions": 2,
        "data.synthetic.length": 512,
        "data.max_length": 64,
        "data.max_images": 1,
        "decoder.vocab_size": 260,
        "decoder.embed_std": 0.02,
        "train.steps": STEPS,
        "train.checkpoint_every": STEPS,
        "train.log_every": 1,
        "evaluation.examples": 2,
        "optimizer.groups": {"default": {"algorithm": "muon", "lr": 2e-3}, "plain": {"lr": 2e-3}},
        "optimizer.schedule.warmup": 0.0,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
    }
    no_matrix = "embed/|/bias$|/scale$|positions|image_newline"
    changes["optimizer.table"] = ((no_matrix, "plain"), (".*", "default"))
    source.update_from_flattened_dict(TINY | changes | (more or {}))
    return build_config(source)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, registered) -> Path:
    """A run of the family, over eight devices."""
    folder, config = tmp_path_factory.mktemp("run"), config_of()
    console = Console(file=io.StringIO())
    assert train(config, folder, console, TrainingEvaluation(config, folder, console)) == 0
    return folder


def test_the_configuration_knows_its_further_keys():
    config = config_of()
    assert (type(config.vision), type(config.decoder)) == (BareVision, TiedDecoder)
    assert build_config(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(ConfigError, match=r"unknown key config\.vision\.clas_token; nearest valid name: 'class_token'"):
        build_config(to_dict(config) | {"vision": {"architecture": "bare_vit", "clas_token": True}})
    for section in ("vision", "decoder"):
        with pytest.raises(ConfigError, match=rf"config\.{section}\.architecture got 'bare_vt'; .*valid name"):
            build_config({section: {"architecture": "bare_vt"}})


def test_its_table_has_the_parameters_of_its_model():
    config = config_of()
    model = build_model(config)
    batch = make_batch(config, [[example(config, 0, [(2, 2)])]], length=64)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    ours = {path: leaf.shape for path, leaf in NameTable(config).leaves.items()}
    assert ours == {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert "head/kernel" not in ours
    assert "vision_tower/cls" not in ours
    assert (ours["deepstack_mergers_0/fc1/kernel"], ours["deepstack_mergers_0/fc2/kernel"]) == ((16, 16), (16, 32))
    assert ours["layers/layers/block/attention/q/bias"] == (5, 4, 8)


def test_a_group_is_made_of_its_own_layer_by_its_own_projector():
    config = config_of()
    model, batch = build_model(config), make_batch(config, [[example(config, 0, [(2, 2)])]], length=64)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch)["params"])
    features = model.apply({"params": params}, batch.pixels, method="encode")
    assert len(features) == 2
    sequence, stack = model.apply({"params": params}, batch, method="visual_tokens")

    def gathered(source, feature, merger):
        return model.apply({"params": params}, features[feature], source, merger, method="gather_project")

    np.testing.assert_allclose(sequence, gathered(batch.token_source, 0, None), atol=1e-6)
    for group, made in enumerate([(0, None), (0, None), (0, None), (0, None), (1, 0)]):
        np.testing.assert_allclose(stack[group], gathered(batch.stack_source[:, group], *made), atol=1e-6)
    assert np.abs(stack[4] - gathered(batch.stack_source[:, 4], 0, None)).max() > 1e-3


def test_it_trains_and_its_checkpoint_is_read(workdir):
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    step, config, leaves = restore_params(workdir)
    assert (step, config) == (STEPS, config_of())
    assert set(leaves) == set(NameTable(config).leaves)


def test_it_is_exported_loaded_and_asked(workdir, tmp_path):
    """By decoding over the cache, whose first answers are those of the full forward pass."""
    lmm = dsx.load(workdir)
    page = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    lmm.save_hf(tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["model_type"], values["tie_word_embeddings"]) == ("deepstack_tied", True)
    again = dsx.load(tmp_path / "out")
    assert (again.config.vision, again.config.decoder.tied_head) == (lmm.config.vision, True)
    for ours, theirs in zip(jax.tree.leaves(lmm.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ids = [[1, -200, *range(60, 70)]]
    scores = lmm.logits(ids, [[page]])[0]
    np.testing.assert_array_equal(again.logits(ids, [[page]])[0], scores)
    answers = [one.generate([page], "What is written here?", max_new_tokens=6) for one in (lmm, again)]
    assert answers[0] == answers[1]


def test_the_cache_gives_the_scores_of_the_full_pass():
    config = config_of()
    model, batch = build_model(config), make_batch(config, [[example(config, 0, [(2, 2)])]], length=64)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch)["params"])
    full = model.apply({"params": params}, batch).hidden
    length = int((batch.segment_ids[0] > 0).sum())
    short = batch._replace(
        **{
            name: np.where(np.arange(64) < length - 1, getattr(batch, name), fill)
            for name, fill in (("tokens", 0), ("positions", 0), ("segment_ids", 0), ("visual_index", -1))
        }
    )
    output = model.apply({"params": params}, short, empty_cache(model, 1, 65), method="prefill")
    last = output.cache._replace(filled=jnp.int32(64))
    position = jnp.asarray(batch.positions[:, length - 1 : length])
    token = jnp.asarray(batch.tokens[:, length - 1 : length])
    step = model.apply({"params": params}, token, position, last, method="decode")
    np.testing.assert_allclose(step.hidden[0, 0], full[0, length - 1], atol=2e-4)


def test_it_is_planned():
    config = config_of()
    plan = make_plan(config, Machine("test", tuple(jax.devices()[:8]), 1, "here", CHIP, 0.0), Wanted(epoch=80), compiled=False)
    assert plan.roofline is not None
    assert plan.roofline.step > 0
    groups = dict.fromkeys(NameTable(config).leaves, "default")
    parts = {part.name: part for part in step_flops(config, groups, 2, 64).parts}
    assert parts["head"].forward == 2 * 2 * 64 * 32 * 260
    assert parts["tower"].forward == pytest.approx(
        2 * 5 * 16 * (2 * 16**2 * 3 * 16 + 2 * (2 * (4 * 16**2 + 2 * 16 * 24) + 4 * 16 * 16))
    )


def test_a_method_of_the_towers_layers_can_be_intercepted():
    """As adapters need it; the layers then run through flax, not past it."""
    config, names = config_of(), set()
    model, batch = build_model(config), make_batch(config, [[example(config, 0, [(2, 2)])]], length=64)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch)["params"])

    def intercept(next_function, arguments, options, context):
        module: Any = context.module
        if isinstance(module, EncoderLayer):
            names.add("/".join(module.path))
        return next_function(*arguments, **options)

    with nn.intercept_methods(intercept):
        model.apply({"params": params}, batch.pixels, method="encode")
    assert names == {"vision_tower/layers/block"}


WORDS = re.compile(r"\b(phi3|phi|llama|mistral|clip|siglip|open_clip|qwen\w*|granite)\b", re.IGNORECASE)
# Where a name stands for something else than an architecture, or is the default that a key has.
ELSEWHERE = {
    "families": "the families themselves",
    "data/encode/templates.py": "names of conversation templates",
    "config/schema.py": "defaults of the two keys",
}


def strings_of(file: Path) -> list[str]:
    """Text that code compares, looks up or hands on; docstrings, what is printed, and arguments called mode are left out."""
    tree = ast.parse(file.read_text())
    left = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    left |= {
        id(word.value) for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords if word.arg == "mode"
    }
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in left]
    return [node.value for node in found if isinstance(node.value, str) and re.fullmatch(r"[\w.\-]+", node.value)]


def test_nobody_but_a_family_knows_an_architecture():
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name in ELSEWHERE or name.split("/")[0] in ELSEWHERE:
            continue
        assert not [text for text in strings_of(file) if WORDS.search(text)], name
        compared = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Compare)]
        assert not [ast.unparse(node) for node in compared if re.search(r"\.architecture (==|!=|is)", ast.unparse(node))], name
