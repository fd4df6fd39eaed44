"""config.json into our Config and back: ablations, baselines, rotary scalings, other projects' files, and what is refused."""

import dataclasses
import json
import re

import pytest

from deepstack_jax.config import Config, DecoderConfig, RopeConfig, VisionConfig
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.base import decoder_from, tower_from
from deepstack_jax.families.forms import from_hf, to_hf
from deepstack_jax.families.llava_hf import to_llava_hf
from deepstack_jax.families.official import KNOWN, tower_to_hf
from tests.parity.goldens import GOLDEN

pytestmark = pytest.mark.quick
TOWER = json.loads((GOLDEN / "clip" / "config.json").read_text())
VICUNA_HF = {  # what llava-hf/llava-1.5-7b-hf says; transformers' defaults are the rest
    "model_type": "llava",
    "image_token_index": 32000,
    "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "hidden_size": 1024},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def golden(case: str = "l_2d", **changes) -> dict:
    values = json.loads((GOLDEN / case / "hf" / "config.json").read_text()) | changes
    return {key: value for key, value in values.items() if value is not ...}


ABLATIONS = [
    ("", {}),
    ("dummy_local", {"deepstack.stack": "dummy"}),
    ("only_global_features", {"deepstack.sequence": "zero", "deepstack.stack": "global"}),
    ("global_and_local", {"deepstack.sequence": "zero", "deepstack.stack": "global_crops"}),
    ("string_withglobal", {"deepstack.sequence": "global_crops", "deepstack.stack": "none"}),
    ("string_woglobal", {"deepstack.sequence": "crops", "deepstack.stack": "none"}),
    ("2xsample", {"image.grid": "square"}),
    ("anyres_unpad", {"image.fit": "letterbox"}),
    ("2xsample+hires_local", {"image.grid": "square", "deepstack.high_res": "view"}),
    ("anyres_unpad+dummy_local", {"image.fit": "letterbox", "deepstack.stack": "dummy"}),
    (
        "2xsample+deepstack_vit+lsvit_start_layer_3",
        {"image.grid": "square", "deepstack.into": "vision", "deepstack.vision_start": 3},
    ),
    (
        "2xsample+deepstack_vit+lsvit_start_layer_5",
        {"image.grid": "square", "deepstack.into": "vision", "deepstack.vision_start": 5, "vision.post_layers": 5},
    ),
]


@pytest.mark.parametrize(("text", "wanted"), ABLATIONS)
def test_ablations_both_ways(text, wanted):
    config, plain = from_hf(golden(deepstack_args_for_ablation=text), TOWER), from_hf(golden(), TOWER)
    for section in ("image", "deepstack", "vision"):
        changes = {key.split(".")[1]: value for key, value in wanted.items() if key.startswith(section)}
        assert getattr(config, section) == dataclasses.replace(getattr(plain, section), **changes)
    assert to_hf(config) == golden(deepstack_args_for_ablation=text)


def test_official_synonyms_and_values_that_upstream_does_not_look_at():
    assert from_hf(golden(deepstack_args_for_ablation="inconsistent"), TOWER).image.fit == "letterbox"
    assert from_hf(golden(deepstack_args_for_ablation="lsvit_start_layer_3"), TOWER) == from_hf(golden(), TOWER)
    assert from_hf(golden("hd", deepstack_sampling="grid"), TOWER) == from_hf(golden("hd"), TOWER)
    assert from_hf(golden("v", deepstack_sampling="1d"), TOWER) == from_hf(golden("v"), TOWER)
    half = from_hf(golden("v", deepstack_args_for_ablation="2xsample+deepstack_vit"), TOWER)
    assert half.deepstack.vision_start == -1
    assert to_hf(half)["deepstack_args_for_ablation"].endswith("lsvit_start_layer_2")
    pooled = from_hf(golden(deepstack_sampling="2d_scaledown"), TOWER)
    assert (pooled.deepstack.sampling, pooled.deepstack.pool) == ("2d", 2)
    assert to_hf(pooled) == golden(deepstack_sampling="2d_scaledown")
    newline = from_hf(golden(mm_patch_merge_type="spatial_unpad"), TOWER)
    assert newline.image.newline
    assert to_hf(newline)["mm_patch_merge_type"] == "spatial_unpad"
    with pytest.warns(UserWarning, match="deepstack_start_id is 6, after the last of 6 layers: nothing is injected"):
        nothing = from_hf(golden(deepstack_start_id=6), TOWER)
    assert nothing.deepstack.stack == "none"
    assert to_hf(nothing)["deepstack_start_id"] == 6


WORDINGS = [
    ("l_2d", {"deepstack_args_for_ablation": "inconsistent+dummy_local+2xsample"}),
    ("v", {"deepstack_args_for_ablation": "lsvit_start_layer_1+deepstack_vit+anyres_unpad+2xsample"}),
    ("hd", {"deepstack_sampling": "grid"}),
    ("v", {"deepstack_sampling": "1d", "deepstack_start_id": 9}),
    ("l_2d", {"deepstack_start_id": 9}),
    ("l_2d", {"deepstack_start_id": 6, "deepstack_args_for_ablation": "dummy_local"}),
    ("l_2d", {"deepstack_start_id": 7, "deepstack_args_for_ablation": "global_and_local"}),
    ("l_only_global", {"deepstack_start_id": 6}),
    ("l_string_withglobal", {"deepstack_start_id": 6}),
    ("llava_next", {"image_grid_pinpoints": "[(28, 56), (84, 28)]"}),
]


@pytest.mark.filterwarnings("ignore:.*nothing is injected", "ignore:.*never used")
@pytest.mark.parametrize(("case", "changes"), WORDINGS)
def test_an_export_keeps_the_words_of_the_folder(case, changes):
    values = golden(case, **changes)
    config = from_hf(values, TOWER)
    assert to_hf(config, values) == values
    assert from_hf(to_hf(config), TOWER) == config, "its own words, without the folder's, say the same"


def test_a_model_that_was_changed_since_has_its_own_words():
    values = golden(deepstack_args_for_ablation="inconsistent+dummy_local")
    config = from_hf(values, TOWER)
    config = dataclasses.replace(config, deepstack=dataclasses.replace(config.deepstack, stack="crops", start=2))
    assert to_hf(config, values) == golden(deepstack_args_for_ablation="anyres_unpad", deepstack_start_id=2)


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("mlp2x_gelu", 2), ("mlp4x_gelu", 4)])
def test_projectors_both_ways(kind, layers):
    config = from_hf(golden(mm_projector_type=kind), TOWER)
    assert config.projector.layers == layers
    assert to_hf(config) == golden(mm_projector_type=kind)
    assert from_hf(golden(mm_projector_type=...), TOWER).projector.layers == 1, "unsaid, it is linear upstream"


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_single_views_may_be_averaged(aspect):
    text = {"image_aspect_ratio": aspect, "deepstack_args_for_ablation": "scaledown_clip"}
    config = from_hf(golden(**text), TOWER)
    assert (config.deepstack.pool, config.deepstack.stack, config.layout.max_tokens) == (2, "none", 4)
    assert to_hf(config) == golden(**text)
    plain = from_hf(golden(image_aspect_ratio=aspect, deepstack_args_for_ablation="dummy_local"), TOWER)
    assert (plain.deepstack.pool, plain.deepstack.stack) == (1, "none"), "upstream looks at no other name here"


@pytest.mark.parametrize("kind", ["llava", "llava_mistral", "llava_llama"])
def test_baselines(kind):
    config = from_hf(golden("llava15", model_type=kind, deepstack_args_for_ablation=...), TOWER)
    assert (config.image.mode, config.deepstack.stack, config.layout.groups) == ("pad", "none", 0)
    assert from_hf(golden("llava15", image_aspect_ratio=..., model_type=kind), TOWER).image.mode == "square"
    listed = from_hf(golden("llava_next", model_type=kind), TOWER)
    text = str([tuple(pair) for pair in golden("llava_next")["image_grid_pinpoints"]])
    assert from_hf(golden("llava_next", image_grid_pinpoints=text, model_type=kind), TOWER) == listed
    assert listed.image.pinpoints[0] == (28, 56)
    assert (listed.image.merge, listed.image.newline) == ("spatial_unpad", True)
    assert config.decoder.sliding_window == (4096 if kind == "llava_mistral" else 0)


def test_llava_hf_takes_what_is_unsaid_from_transformers():
    config = from_hf(VICUNA_HF)
    wanted = DecoderConfig(vocab_size=32064)
    assert config.decoder == wanted
    assert config.vision == VisionConfig()
    assert (config.image.mode, config.image.size) == ("square", 336)
    assert from_hf(VICUNA_HF | {"text_config": None}).decoder == decoder_from({}, "llama")
    assert from_hf(VICUNA_HF, None, {"do_pad": True, "image_mean": [0.1, 0.2, 0.3]}).image.mean == (0.1, 0.2, 0.3)
    tall_and_wide = [[336, 672], [1008, 336]]  # there (height, width)
    points = from_hf(VICUNA_HF | {"model_type": "llava_next", "image_grid_pinpoints": tall_and_wide}).image.pinpoints
    assert points == ((672, 336), (336, 1008))
    again = to_llava_hf(from_hf(VICUNA_HF | {"model_type": "llava_next"}), 32064)
    assert again["image_grid_pinpoints"] == [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def test_a_whole_clip_and_its_tower_alone_are_one():
    assert tower_from({"model_type": "clip", "vision_config": TOWER}) == tower_from(TOWER)
    vision, size = tower_from({"model_type": "clip_vision_model"})
    assert (vision.width, vision.layers, vision.patch_size, size) == (768, 12, 32, 224)
    assert tower_from(tower_to_hf(Config())) == (VisionConfig(), 336)


LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}


@pytest.mark.parametrize(
    ("case", "scaling", "wanted"),
    [
        ("l_2d", {"type": "linear", "factor": 4.0}, RopeConfig(scaling="linear", factor=4.0)),
        (
            "l_2d",
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
            | {"original_max_position_embeddings": 512},
            RopeConfig(scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=512),
        ),
        ("phi", {"type": "su"} | LONG, RopeConfig(scaling="longrope", original_positions=2048)),
        ("phi", {"type": "longrope"} | LONG, RopeConfig(scaling="longrope", original_positions=2048)),
        ("phi", {"type": "yarn"} | LONG, RopeConfig(scaling="yarn", original_positions=2048)),
    ],
)
def test_rotary_scalings_both_ways(case, scaling, wanted):
    config = from_hf(golden(case, rope_scaling=scaling), TOWER)
    if "short_factor" in scaling:
        wanted = dataclasses.replace(wanted, **{key: tuple(value) for key, value in LONG.items()})
    assert config.decoder.rope == wanted
    exported = to_hf(config)
    assert from_hf(exported, TOWER).decoder.rope == wanted
    if scaling.get("type") in ("su", "longrope"):
        assert exported["rope_scaling"]["type"] == "su"


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("llama", {"rope_parameters": SCALED}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 3e4}),
        ("llama", {"rope_parameters": SCALED, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("llama", {"rope_parameters": SCALED, "rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e4}}),
        ("llama", {"rope_parameters": SCALED, "rope_scaling": {"rope_type": "default"}, "rope_theta": 7e4}),
        ("llama", {"rope_parameters": SCALED, "rope_scaling": None}),
        ("llama", {"rope_parameters": SCALED, "rope_scaling": {}}),
        ("llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_scaling": LLAMA3}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}),
        ("llama", {"rope_scaling": LLAMA3, "max_position_embeddings": 9000}),
        ("llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 77}}),
        ("mistral", {"rope_parameters": SCALED, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("phi3", {"rope_scaling": {"type": "longrope"} | dict.fromkeys(("short_factor", "long_factor"), [1.0] * 48)}),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope"} | dict.fromkeys(("short_factor", "long_factor"), [2.0] * 48)}
            | {"original_max_position_embeddings": 50, "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
        ),
    ],
)
def test_rotary_positions_are_read_as_transformers_reads_them(kind, values):
    """Its own configuration classes, which need no torch, are the reference."""
    import transformers

    theirs = getattr(transformers, {"llama": "Llama", "mistral": "Mistral", "phi3": "Phi3"}[kind] + "Config")(
        **json.loads(json.dumps(values))
    ).rope_parameters
    ours = decoder_from(values, kind).rope
    assert ours.theta == theirs["rope_theta"]
    assert ours.scaling == {"default": "none"}.get(theirs["rope_type"], theirs["rope_type"])
    for key in ("factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"):
        if key in theirs and ours.scaling != "none":
            assert getattr(ours, key) == (tuple(theirs[key]) if isinstance(theirs[key], list) else theirs[key])
    if ours.scaling in ("llama3", "longrope"):
        assert ours.original_positions == theirs["original_max_position_embeddings"]


@pytest.mark.parametrize("case", ["l_2d", "phi", "v", "hd", "llava15", "llava_next"])
def test_a_key_that_is_null_is_absent(case):
    """Every key, null one by one; only a null sliding window says something: there is none, where unsaid Mistral has one."""
    values = golden(case)
    needed = []
    for key in [*values, *KNOWN, "rope_parameters", "quantization_config", "text_config", "vision_config", "head_dim", "s2"]:
        try:
            absent = from_hf({name: value for name, value in values.items() if name != key}, TOWER)
        except WeightsError as error:
            with pytest.raises(WeightsError, match=re.escape(str(error).split(";")[0].split(" is ")[0])):
                from_hf(values | {key: None}, TOWER)
            needed.append(key)
        else:
            assert from_hf(values | {key: None}, TOWER) == absent, key
    unsaid = {"num_crops", "hidden_size", "num_attention_heads", "image_aspect_ratio", "image_grid_pinpoints"}
    assert {"model_type"} <= set(needed) <= {"model_type", *unsaid}
    for key in TOWER:
        less = {name: value for name, value in TOWER.items() if name != key}
        if key not in ("model_type", "hidden_size", "image_size", "patch_size", "num_attention_heads", "intermediate_size"):
            assert tower_from(TOWER | {key: None}) == tower_from(less), key
    assert decoder_from({"sliding_window": None}, "mistral").sliding_window == 0
    assert decoder_from({}, "mistral").sliding_window == 4096


def test_transformers_5_writes_rotary_positions_as_one_entry():
    values = golden(rope_theta=..., rope_scaling=..., rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert from_hf(values, TOWER).decoder.rope == RopeConfig(theta=5e5)
    assert decoder_from({"head_dim": 64}, "llama").head_dim == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepstack_args_for_ablation": "dumy_local"}, r"'dumy_local' is unknown; nearest valid name: 'dummy_local'"),
        ({"deepstack_args_for_ablation": "scaledown_clip"}, r"'scaledown_clip' shrinks .* 'pad', here use 2d_scaledown"),
        (
            {"image_aspect_ratio": "pad", "deepstack_args_for_ablation": "scaledown_clop"},
            "nearest valid name: 'scaledown_clip'",
        ),
        ({"image_aspect_ratio": "pad", "deepstack_args_for_ablation": "deepstack_vit"}, "needs image_aspect_ratio 'deepstack'"),
        ({"deepstack_args_for_ablation": "string_withglobal+dummy_local"}, "of which only one can hold"),
        (
            {"deepstack_args_for_ablation": "deepstack_vit"},
            r"cannot run: config\.deepstack\.into='vision' needs a fixed square",
        ),
        ({"deepstack_sampling": "3d"}, r"deepstack_sampling is '3d', expected 2d, 1d, grid or 2d_scaledown; nearest"),
        ({"twoviews_unshare": True}, r"twoviews_unshare is True, expected False; choose"),
        ({"s2": True}, "s2 is True"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"deepstack_start_idx": 3}, r"deepstack_start_idx is 3, a key .* nearest valid name: 'deepstack_start_id'"),
        ({"is_anyres_deepstak": True}, r"is_anyres_deepstak is True, a key .* nearest valid name: 'is_anyres_deepstack'"),
        ({"num_crop": 9}, r"num_crop is 9, a key .* nearest valid name: 'num_crops'"),
        ({"image_aspekt_ratio": "pad"}, r"image_aspekt_ratio is 'pad', a key .* nearest valid name: 'image_aspect_ratio'"),
        ({"deepstack_args_for_ablation": ["2xsample"]}, r"ablation is \['2xsample'\], expected names joined by '\+'"),
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28000, 28000]], "deepstack_args_for_ablation": ...},
            r"config\.image\.pinpoints give an image 1,000,001 crops, expected at most 1,025",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected one object of numbers with a type"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "expected one object of numbers with a type"),
        ({"mm_resampler": "perceiver"}, "mm_resampler is 'perceiver', a key that the official code does not have"),
        ({"num_crops": 1}, "num_crops is 1, expected a whole number above 1"),
        ({"mm_projector_type": "identity"}, r"mm_projector_type is 'identity', expected linear or mlpNx_gelu"),
        ({"mm_projector_type": "mlp1x_gelu"}, "one layer: call it 'linear'"),
        ({"mm_vision_select_feature": "cls_patch"}, r"mm_vision_select_feature is 'cls_patch', expected 'patch'"),
        ({"mm_hidden_size": 64}, r"mm_hidden_size is 64, expected 32"),
        (
            {"mm_patch_merge_type": "maxpool2x2"},
            r"mm_patch_merge_type is 'maxpool2x2', expected flat, spatial or spatial_unpad",
        ),
        ({"image_aspect_ratio": "padded"}, r"image_aspect_ratio is 'padded', expected .*nearest valid name: 'pad'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, r"rope_scaling has type 'dynamic', expected linear"),
        ({"rope_scaling": {"type": "yarn"} | LONG}, r"type 'yarn', expected .*yarn for Phi-3 only"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, r"type 'linear' has beta, expected factor"),
        ({"rope_scaling": {"type": "linear"}}, r"type 'linear' lacks factor"),
        ({"quantization_config": {}}, "quantised weights are not read"),
        ({"model_type": "deepstack_lama"}, r"model_type is 'deepstack_lama'.*nearest valid name: 'deepstack_llama'"),
        ({"num_hidden_layers": "6"}, r"num_hidden_layers is '6', expected a whole number above 0"),
        ({"num_crops": ...}, "num_crops is missing"),
        ({"num_crops": "4"}, r"num_crops is '4', expected a whole number above 1"),
        ({"rms_norm_eps": "1e-5"}, r"rms_norm_eps is '1e-5', expected a number"),
        ({"mm_vision_select_layer": [-2]}, r"mm_vision_select_layer is \[-2\], expected a whole number;"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "two"}, r"image_grid_pinpoints is 'two', expected pairs"),
    ],
)
def test_what_is_not_computed_is_refused_in_one_line(changes, message):
    with pytest.raises(WeightsError, match=message) as caught:
        from_hf(golden(**changes), TOWER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\], expected one layer"),
        (
            {"text_config": {"model_type": "qwen2_moe"}},
            "text_config has model_type 'qwen2_moe', expected llama, mistral, granite, phi3, qwen2, qwen3",
        ),
        (
            {"vision_config": {"model_type": "siglip2_vision_model"}},
            r"model_type 'siglip2_vision_model', SigLIP 2's NaFlex, .* \(those of fixed resolution say siglip\), expected clip",
        ),
        ({"vision_config": {"model_type": "dinov2"}}, "model_type 'dinov2', expected clip or"),
        (
            {"text_config": {"model_type": "qwen2", "use_sliding_window": True}},
            "use_sliding_window is True, expected False; choose a checkpoint without it",
        ),
        (
            {"text_config": {"model_type": "qwen3", "layer_types": ["sliding_attention", "full_attention"]}},
            r"layer_types is \['full_attention', 'sliding_attention'\], expected .*; choose a checkpoint without it",
        ),
        (
            {"text_config": {"model_type": "qwen3", "rope_scaling": {"type": "yarn", "factor": 4.0}}},
            "rope_scaling has type 'yarn', expected linear, llama3",
        ),
    ],
)
def test_what_llava_hf_can_ask_for_beyond_this(changes, message):
    with pytest.raises(WeightsError, match=message) as caught:
        from_hf(VICUNA_HF | changes)
    assert "\n" not in str(caught.value)


def test_what_the_official_code_cannot_say_is_refused():
    config = from_hf(golden(), TOWER)

    def changed(section: str, **values) -> Config:
        return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})

    for wrong, message in (
        (changed("deepstack", schedule=(-1, 0, 1, 2, 3, -1)), "knows start and interval only"),
        (changed("deepstack", pool=4), "expected pool 2 with '2d'"),
        (changed("deepstack", sequence="zero"), "has no official form; expected one of global/dummy"),
        (changed("decoder", head_dim=8), r"heads of width / heads = 12"),
        (changed("decoder", sliding_window=128), "has no official DeepStack form"),
    ):
        with pytest.raises(WeightsError, match=message):
            to_hf(wrong)
    with pytest.raises(WeightsError, match=r"no llava-hf form, expected LLaVA-1\.5.*--format=official"):
        to_llava_hf(config, 560)


def test_a_preprocessor_of_another_size_is_refused():
    with pytest.raises(WeightsError, match=r"crop_size is \{'height': 224, 'width': 224\}, expected the tower's 28"):
        from_hf(golden(), TOWER, {"crop_size": {"height": 224, "width": 224}})
    with pytest.raises(WeightsError, match=r"resample is 2, expected 3 \(bicubic\)"):
        from_hf(golden(), TOWER, {"resample": 2})
    for mean in ("0.5", [0.5, 0.5], [0.5, None, 0.5]):
        with pytest.raises(WeightsError, match=r"image_mean is .*, expected three numbers"):
            from_hf(golden(), TOWER, {"image_mean": mean})
