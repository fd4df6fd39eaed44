"""Image settings of a folder: the pixels that transformers' own processor makes of it, or one line that names the setting."""

import json

import numpy as np
import pytest
from PIL import Image

from deepstack_jax.data.encode.image import make_views
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.forms import from_hf
from deepstack_jax.weights.checkpoint_files import processor_of

AutoImageProcessor = pytest.importorskip("transformers", reason="transformers is the reference here").AutoImageProcessor
SIDE = 28
CONFIG = {
    "model_type": "llava",
    "image_token_index": 3,
    "text_config": {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "num_attention_heads": 2},
    "vision_config": {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 14, "num_attention_heads": 2},
}
PLAIN = {
    "crop_size": {"height": SIDE, "width": SIDE},
    "image_processor_type": "LlavaImageProcessor",
    "size": {"shortest_edge": SIDE},
}
NEXT = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))


def write(folder, settings, **more):
    """A folder as transformers 5 saves it, the settings inside processor_config.json."""
    kind = "llava_next" if (settings or {}).get("image_processor_type", "").startswith("LlavaNext") else "llava"
    config = CONFIG | {"model_type": kind} | ({"image_grid_pinpoints": NEXT["image_grid_pinpoints"]} if kind != "llava" else {})
    (folder / "config.json").write_text(json.dumps(config))
    files = {"processor_config.json": {"image_processor": settings, "processor_class": "LlavaProcessor"}} | more
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return config


def ours(folder, config):
    image = from_hf(config, None, processor_of(folder)).image
    pixels = make_views(PICTURE, image).pixels.astype(np.float32) / 255
    return np.moveaxis((pixels - np.array(image.mean, np.float32)) / np.array(image.std, np.float32), -1, 1)


def theirs(folder):
    values = AutoImageProcessor.from_pretrained(folder, backend="pil")(PICTURE, return_tensors="np")["pixel_values"]
    return values.reshape(-1, *values.shape[-3:])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_pad": True},
        {"do_pad": True, "image_processor_type": "CLIPImageProcessor"},
        {"do_pad": True, "image_processor_type": "LlavaImageProcessorFast", "size": {"height": SIDE, "width": SIDE}},
        {"do_pad": True, "do_center_crop": False, "crop_size": 20},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.4, 0.3]},
        {"image_mean": [0.2, 0.6, 0.9], "do_pad": True},
        {"image_mean": 0.5, "image_std": 0.25},
        {"resample": 2},
        {"resample": 1, "do_pad": True},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
        {"size": SIDE, "crop_size": SIDE},
        {"do_convert_rgb": False},
        NEXT,
        NEXT | {"resample": 2, "size": {"height": SIDE, "width": SIDE}},
        NEXT | {"image_mean": [0.1, 0.2, 0.3], "do_pad": False, "do_center_crop": False},
    ],
)
def test_the_pixels_are_those_of_transformers(settings, tmp_path):
    settings = PLAIN | {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.28]} | settings
    config = write(tmp_path, settings)
    wanted = theirs(tmp_path)
    np.testing.assert_allclose(ours(tmp_path, config), wanted, atol=2e-5 * np.abs(wanted).max())


def test_the_newer_file_goes_before_the_older_and_the_older_counts_alone(tmp_path):
    old = PLAIN | {"do_pad": True, "image_mean": [0.1, 0.1, 0.1], "image_std": [0.5, 0.5, 0.5]}
    for first, expected_pad in ((PLAIN | {"image_std": [0.9, 0.9, 0.9]}, False), (None, True)):
        config = write(tmp_path, first, **{"preprocessor_config.json": old})
        np.testing.assert_allclose(ours(tmp_path, config), theirs(tmp_path), atol=1e-5)
        assert (from_hf(config, None, processor_of(tmp_path)).image.mode == "pad") is expected_pad


def test_a_setting_that_is_null_is_absent(tmp_path):
    nulls = dict.fromkeys(("image_mean", "image_std", "resample", "do_pad", "do_rescale", "do_resize", "crop_size", "size"))
    config = write(tmp_path, PLAIN)
    plain = from_hf(config, None, processor_of(tmp_path))
    assert from_hf(write(tmp_path, PLAIN | nulls), None, processor_of(tmp_path)) == plain
    assert from_hf(config, None, PLAIN | nulls) == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": SIDE, "width": SIDE}}, "size is .*, expected {'shortest_edge': 28}"),
        ({"size": {"shortest_edge": 56}}, "size is .*'shortest_edge': 56"),
        ({"size": {"shortest_edge": SIDE, "longest_edge": 60}}, "size is .*longest_edge"),
        ({"size": {"max_height": SIDE, "max_width": SIDE}}, "size is .*max_height"),
        ({"size": "28"}, "size is '28'"),
        ({"crop_size": {"height": 20, "width": 28}}, "crop_size is .*'height': 20"),
        ({"crop_size": 20}, "crop_size is 20, expected the tower's 28"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"do_pad": "yes"}, "do_pad is 'yes', expected true or false"),
        ({"resample": 5}, r"resample is 5, expected 0 \(nearest\)"),
        ({"resample": 2.0}, "resample is 2.0"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"do_rescale": False, "do_pad": True}, "do_rescale, rescale_factor or do_normalize is changed"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\], expected three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std is .*expected three numbers above 0"),
        ({"image_mean": [2.0, 0.5, 0.5], "do_pad": True}, "image_mean is .*expected shares from 0 to 1"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is 'SiglipImageProcessor', expected CLIP"),
        (NEXT | {"image_grid_pinpoints": [[28, 56]]}, "the crops must be those of the model"),
        ("CLIP", "image_processor is 'CLIP', expected an object"),
    ],
)
def test_what_gives_other_pixels_is_refused_by_name(settings, message, tmp_path):
    config = write(tmp_path, PLAIN)
    if isinstance(settings, dict):
        settings = PLAIN | settings
        config = write(tmp_path, settings)
    else:
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    with pytest.raises(WeightsError, match=message) as caught:
        from_hf(config, None, processor_of(tmp_path))
    assert "\n" not in str(caught.value)


SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 30, "width": 30}}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_processor_type": "SiglipImageProcessorFast", "resample": 2},
        {"image_mean": [0.4, 0.5, 0.6], "do_rescale": True},
        {"do_normalize": False},
    ],
)
def test_siglips_own_processor_stretches(settings, tmp_path):
    """To the last bit; the tower of 30 pixels has 2 x 2 patches of 14, and its features are told to be all of them."""
    tower = {"model_type": "siglip_vision_model", "image_size": 30, "patch_size": 14, "num_attention_heads": 2}
    write(tmp_path, SIGLIP | settings)
    config = CONFIG | {"vision_config": tower | {"hidden_size": 32}, "vision_feature_select_strategy": "full"}
    found = from_hf(config, None, processor_of(tmp_path))
    assert (found.image.mode, found.patch_side, found.image.size) == ("stretch", 2, 30)
    np.testing.assert_array_equal(ours(tmp_path, config), theirs(tmp_path))
    with pytest.raises(WeightsError, match="vision_feature_select_strategy is 'default', expected 'full'"):
        from_hf(config | {"vision_feature_select_strategy": "default"}, None, processor_of(tmp_path))
    write(tmp_path, SIGLIP | {"size": {"shortest_edge": 30}})
    with pytest.raises(WeightsError, match=r"size is .*, expected \{'height': 30, 'width': 30\}"):
        from_hf(config, None, processor_of(tmp_path))


def test_siglip_inside_llava_next(tmp_path):
    """Views of LLaVA-NeXT's processor, to the last bit, for a tower whose features are all of its tokens."""
    tower = {"model_type": "siglip_vision_model", "image_size": 30, "patch_size": 14, "num_attention_heads": 2}
    points = [[30, 60], [60, 30], [60, 60]]
    settings = {"crop_size": {"height": 30, "width": 30}, "size": {"shortest_edge": 30}, "image_mean": [0.5] * 3}
    write(tmp_path, NEXT | settings | {"image_std": [0.5] * 3, "image_grid_pinpoints": points})
    config = CONFIG | {"model_type": "llava_next", "image_grid_pinpoints": points}
    config |= {"vision_config": tower | {"hidden_size": 32}, "vision_feature_select_strategy": "full"}
    found = from_hf(config, None, processor_of(tmp_path))
    assert (found.image.mode, found.patch_side, found.vision.architecture) == ("anyres", 2, "siglip")
    np.testing.assert_array_equal(ours(tmp_path, config), theirs(tmp_path))
    with pytest.raises(WeightsError, match="vision_feature_select_strategy is 'default', expected 'full'"):
        from_hf(config | {"vision_feature_select_strategy": "default"}, None, processor_of(tmp_path))
