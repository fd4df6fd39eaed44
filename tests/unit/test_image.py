"""Images: official pixels to the bit, every file format as PIL converts it, and one-line errors for files that are none."""

import hashlib
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

import deepstack_jax.data.encode.image as image_module
from deepstack_jax.config import ImageConfig
from deepstack_jax.data.encode.image import FILTERS, ImageError, Views, image_grid, make_views, open_image

REPO = Path(__file__).parents[2]
GOLDEN = REPO / "tests" / "golden" / "preprocess"
REAL = REPO.parent / "shared" / "data"
META = json.loads((GOLDEN / "meta.json").read_text())["entries"]
IMAGES = sorted(path.stem for path in (GOLDEN / "images").glob("*.png"))
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
MODES = {
    "ds4": ImageConfig(num_crops=4),
    "ds6": ImageConfig(num_crops=6),
    "ds16": ImageConfig(num_crops=16),
    "2x4": ImageConfig(num_crops=4, grid="square"),
    "2x6": ImageConfig(num_crops=6, grid="square"),
    "unpad4": ImageConfig(num_crops=4, fit="letterbox"),
    "anyres": ImageConfig(mode="anyres"),
    "hd4": ImageConfig(mode="hd", num_crops=4),
    "pad": ImageConfig(mode="pad"),
    "square": ImageConfig(mode="square"),
}


def spec_of(mode, size):
    return replace(MODES[mode], size=size, pinpoints=tuple((w * size, h * size) for w, h in PINPOINTS))


def noise(mode, width, height, seed=0):
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode)


def plain_views(image, spec):
    """The official procedure, picture by picture, for the modes `deepstack`, `pad` and `square`."""
    image, size = image.convert("RGB"), spec.size
    crop_filter, global_filter = FILTERS[spec.crop_filter], FILTERS[spec.global_filter]
    if spec.mode == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in spec.mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return np.asarray(square.resize((size, size), global_filter))[None]
    if spec.mode == "square":
        short = min(image.size)
        width, height = (int(size * side / short) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = image.resize((width, height), global_filter)
        return np.asarray(resized.crop((left, top, left + size, top + size)))[None]
    rows, cols = image_grid(image.size, spec) or (0, 0)
    crops = image.resize((cols * size, rows * size), crop_filter)
    boxes = [(c * size, r * size, (c + 1) * size, (r + 1) * size) for r in range(rows) for c in range(cols)]
    return np.stack([np.asarray(view) for view in [image.resize((size, size), global_filter), *map(crops.crop, boxes)]])


def test_every_golden_entry_is_covered():
    assert set(META) == {f"p{size}/{image}/{mode}" for size in (28, 336) for image in IMAGES for mode in MODES}


@pytest.mark.parametrize("size", [28, 336])
@pytest.mark.parametrize("mode", MODES)
def test_official_pixels(mode, size):
    arrays = np.load(GOLDEN / "pixels.npz")
    for name in IMAGES:
        golden = META[f"p{size}/{name}/{mode}"]
        image = open_image(GOLDEN / "images" / f"{name}.png")
        views = make_views(image, spec_of(mode, size))
        pixels = np.ascontiguousarray(views.pixels.transpose(0, 3, 1, 2))
        assert list(pixels.shape) == golden["shape"], name
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == golden["sha256_uint8"], name
        assert views.grid == (tuple(golden["bestgrid_wh"][::-1]) if golden["bestgrid_wh"] else None)
        assert views.size_wh == image.size
        stride = golden.get("stride", 1)
        np.testing.assert_array_equal(pixels[:, :, ::stride, ::stride], arrays[f"p{size}__{name}__{mode}"])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(MODES)),
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([14, 28]),
    st.sampled_from(sorted(FILTERS)),
)
def test_gray_equals_rgb(mode, width, height, size, name):
    gray = noise("L", width, height, seed=width * 97 + height)
    spec = replace(spec_of(mode, size), crop_filter=name, global_filter=name)
    views, rgb = make_views(gray, spec), make_views(gray.convert("RGB"), spec)
    assert views.pixels.flags.c_contiguous
    assert views.pixels.dtype == np.uint8
    np.testing.assert_array_equal(views.pixels, rgb.pixels)
    assert (views.grid, views.size_wh) == (rgb.grid, (width, height))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["deepstack", "pad", "square"]),
    st.integers(1, 120),
    st.integers(4, 120),
    st.sampled_from(sorted(FILTERS)),
    st.sampled_from(["L", "RGB"]),
    st.sampled_from([2**25, 1000, 1]),
)
def test_equals_picture_by_picture_and_strips_change_nothing(mode, width, height, name, colours, scratch_pixels):
    image = noise(colours, width, height, seed=width * 131 + height)
    spec = ImageConfig(mode=mode, size=28, crop_filter=name, global_filter=name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_module, "SCRATCH_PIXELS", scratch_pixels if mode == "pad" else 2**25)
        views = make_views(image, spec)
    np.testing.assert_array_equal(views.pixels, plain_views(image, spec))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(4, 400), st.booleans(), st.sampled_from(["bicubic", "bilinear", "lanczos"]))
def test_long_thin_pictures_are_enlarged_in_part(short, long, upright, name):
    image = noise("RGB", *((short, long) if upright else (long, max(short, 4))), seed=short * 401 + long)
    spec = ImageConfig(mode="square", size=28, global_filter=name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_module, "SCRATCH_PIXELS", 1)
        views = make_views(image, spec)
    np.testing.assert_allclose(views.pixels.astype(int), plain_views(image, spec), atol=1)


def test_filters_of_crops_and_global_view_are_independent():
    image = noise("RGB", 90, 70)
    views = make_views(image, ImageConfig(size=28, crop_filter="nearest", global_filter="box"))
    box = np.asarray(image.resize((28, 28), Image.Resampling.BOX))
    nearest = np.asarray(image.resize((56, 56), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(views.pixels[0], box)
    np.testing.assert_array_equal(views.pixels[2], nearest[:28, 28:])


def test_hd_orders_the_upsampled_crops_of_each_cell_together():
    image = noise("RGB", 61, 170)
    views = make_views(image, ImageConfig(mode="hd", size=14, num_crops=9))
    rows, cols = views.grid or (0, 0)
    assert (rows, cols) == (4, 2)
    assert len(views.pixels) == (1 + rows * cols) * (1 + 9)
    upsampled = np.asarray(image.resize((14 * cols * 3, 14 * rows * 3)))
    for cell in range(rows * cols):
        first = 1 + rows * cols + 9 + cell * 9
        for crop in range(9):
            y, x = 14 * (cell // cols * 3 + crop // 3), 14 * (cell % cols * 3 + crop % 3)
            np.testing.assert_array_equal(views.pixels[first + crop], upsampled[y : y + 14, x : x + 14])


def test_letterbox_leaves_the_global_view_stretched_and_hd_crops_too():
    image = noise("RGB", 100, 40)
    stretched = make_views(image, ImageConfig(mode="hd", size=28)).pixels
    boxed = make_views(image, ImageConfig(mode="hd", size=28, fit="letterbox")).pixels
    differing = {index for index in range(len(boxed)) if not np.array_equal(boxed[index], stretched[index])}
    assert differing == {1, 2, 3}
    assert not boxed[1][:, :7].any()


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_three_rows_are_read_as_channels_like_the_official_processor(mode):
    image = noise("RGB", 3, 3)
    expected = Image.fromarray(np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0))).resize(
        (28, 28), Image.Resampling.BICUBIC
    )
    np.testing.assert_array_equal(make_views(image, ImageConfig(mode=mode, size=28)).pixels[0], np.asarray(expected))


@pytest.mark.parametrize("size_wh", [(1, 20_000), (20_000, 1), (20_000, 37), (1, 1)])
@pytest.mark.parametrize("mode", ["ds4", "anyres", "unpad4", "hd4", "pad", "square"])
def test_extreme_shapes(mode, size_wh):
    colour = np.array([200, 30, 90])
    views = make_views(Image.new("RGB", size_wh, tuple(colour)), spec_of(mode, 28))
    assert isinstance(views, Views)
    assert views.pixels.shape[1:] == (28, 28, 3)
    if mode in ("ds4", "hd4", "square") or (mode == "pad" and size_wh == (1, 1)):
        assert (views.pixels == colour).all()
    elif mode == "pad":
        assert (views.pixels[0, 0, 0] == [122, 116, 104]).all()
        assert (views.pixels != [122, 116, 104]).any() == (min(size_wh) > 1)  # one row in 20,000 rounds away
    else:
        assert (views.pixels[0] == colour).all()
        assert (views.pixels[1:] == colour).all(axis=-1).any()


def save_gif_as_jpg(path):
    frames = [noise("L", 40, 30, seed).convert("P") for seed in range(2)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


def save_rotated_by_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise("RGB", 40, 30).save(path, exif=exif)


FILES = {
    "rgb.png": lambda path: noise("RGB", 40, 30).save(path),
    "rgb.jpg": lambda path: noise("RGB", 40, 30).save(path),
    "rgb.webp": lambda path: noise("RGB", 40, 30).save(path),
    "rgb.bmp": lambda path: noise("RGB", 40, 30).save(path),
    "gray.jpg": lambda path: noise("L", 40, 30).save(path),
    "gray.png": lambda path: noise("L", 40, 30).save(path),
    "gray_transparent.png": lambda path: noise("L", 40, 30).save(path, transparency=7),
    "gray_alpha.png": lambda path: noise("RGBA", 40, 30).convert("LA").save(path),
    "bilevel.png": lambda path: noise("L", 40, 30).convert("1").save(path),
    "bilevel.tif": lambda path: noise("L", 40, 30).convert("1").save(path),
    "palette.png": lambda path: noise("RGB", 40, 30).quantize(17).save(path),
    "palette_transparent.png": lambda path: noise("RGB", 40, 30).quantize(17).save(path, transparency=3),
    "alpha.png": lambda path: noise("RGBA", 40, 30).save(path),
    "cmyk.jpg": lambda path: noise("RGB", 40, 30).convert("CMYK").save(path),
    "cmyk.tif": lambda path: noise("RGB", 40, 30).convert("CMYK").save(path),
    "ycbcr.tif": lambda path: noise("RGB", 40, 30).convert("YCbCr").save(path),
    "lab.tif": lambda path: Image.frombytes("LAB", (40, 30), noise("RGB", 40, 30).tobytes()).save(path),
    "gif.jpg": save_gif_as_jpg,
    "exif.jpg": save_rotated_by_exif,
    "no_suffix": lambda path: noise("RGB", 40, 30).save(path, format="PNG"),
}


@pytest.mark.parametrize("name", FILES)
def test_formats_convert_as_pil_does(name, tmp_path):
    path = tmp_path / name
    FILES[name](path)
    with Image.open(path) as image:
        try:
            expected = image.convert("RGB")
        except ValueError:  # PIL knows no way from this mode to RGB
            with pytest.raises(ImageError, match=name):
                open_image(path)
            return
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        image = open_image(source)
        assert image.mode in ("RGB", "L")
        assert image.size == (40, 30)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(expected))
    for mode in ("ds4", "pad"):
        ours, official = make_views(open_image(path), spec_of(mode, 28)), make_views(expected, spec_of(mode, 28))
        np.testing.assert_array_equal(ours.pixels, official.pixels)


def test_gray_files_stay_gray(tmp_path):
    for name in ("gray.jpg", "gray_alpha.png", "bilevel.png"):
        FILES[name](tmp_path / name)
        assert open_image(tmp_path / name).mode == "L"


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 1), (30, 40, 3), (30, 40, 4)])
def test_arrays(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image = open_image(array)
    assert image.size == (40, 30)
    expected = np.broadcast_to(array.reshape(30, 40, -1)[..., :3], (30, 40, 3))
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), expected)
    np.testing.assert_array_equal(np.asarray(open_image(array[::-1]).convert("RGB")), expected[::-1])


def huge_png(tmp_path):
    """A few bytes that promise 60,000 x 60,000 pixels."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(b"0")}
    framed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def encoded(name, tmp_path):
    FILES[name](tmp_path / name)
    return (tmp_path / name).read_bytes()


DAMAGED = {
    "empty": (lambda tmp: b"", "the file is empty"),
    "text": (lambda tmp: b"<html>404 not found</html>", "not in any image format"),
    "truncated_jpeg": (lambda tmp: encoded("rgb.jpg", tmp)[:-300], "truncated"),
    "truncated_png": (lambda tmp: encoded("rgb.png", tmp)[:-300], "truncated"),
    "header_only": (lambda tmp: encoded("rgb.jpg", tmp)[:20], "cannot read image"),
    "corrupt_png": (lambda tmp: encoded("rgb.png", tmp).replace(b"IDAT", b"IDAX"), "cannot read image"),
    "bomb": (huge_png, r"3600000000 pixels\) exceeds limit .* max_pixels=120000000 \(config.data.max_pixels\)"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_one_line_errors(name, tmp_path):
    make, reason = DAMAGED[name]
    path = tmp_path / f"{name}.jpg"
    path.write_bytes(make(tmp_path))
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=f"{path.stat().st_size} bytes"):
        open_image(path.read_bytes())
    assert before == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nowhere/at_all.jpg", "nowhere/at_all.jpg: No such file"),
        ("a\0b.jpg", "null byte"),
        (np.zeros((3, 4, 2), np.uint8), "expected uint8"),
        (np.zeros((3, 4, 3), np.float32), r"<array float32\[3, 4, 3\]>: expected uint8"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8\[0, 4, 3\]"),
        (None, "<NoneType>: expected a path"),
        (Image.new("RGB", (0, 4)), "0x4 has no pixels"),
    ],
)
def test_wrong_sources_are_image_errors(source, reason):
    with pytest.raises(ImageError, match=reason):
        open_image(source)


def test_folder_is_an_image_error(tmp_path):
    with pytest.raises(ImageError, match="directory"):
        open_image(tmp_path)


def test_max_pixels_bounds_what_is_decoded():
    assert open_image(noise("RGB", 10, 10), max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="10x11 is more than max_pixels=100"):
        open_image(noise("RGB", 10, 11), max_pixels=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "deepstak"}, "image mode 'deepstak' is unknown; use one of 'deepstack'"),
        ({"grid": "bset"}, "image grid 'bset'"),
        ({"fit": "crop"}, "image fit 'crop'"),
        ({"crop_filter": "cubic"}, "image filter 'cubic' is unknown; use one of 'bicubic'"),
        ({"num_crops": 1}, "num_crops is 1"),
        ({"mode": "anyres"}, "at least one pinpoint"),
    ],
)
def test_wrong_specs_name_the_valid_values(change, message):
    with pytest.raises(ValueError, match=message):
        make_views(noise("RGB", 10, 10), replace(ImageConfig(size=28), **change))


def test_a_stretched_view_is_the_global_view_beside_crops():
    image = noise("RGB", 50, 31)
    alone, beside = (make_views(image, ImageConfig(mode=mode, size=28)) for mode in ("stretch", "deepstack"))
    assert (alone.grid, alone.pixels.shape) == (None, (1, 28, 28, 3))
    np.testing.assert_array_equal(alone.pixels[0], beside.pixels[0])


@pytest.mark.parametrize("mode", ["deepstack", "pad", "square", "stretch"])
def test_image_without_pixels_is_refused(mode):
    with pytest.raises(ValueError, match="image of 0x4 has no pixels"):
        make_views(Image.new("RGB", (0, 4)), ImageConfig(mode=mode, size=28))


def test_real_files_equal_the_plain_procedure():
    paths = [*sorted((REAL / "photos").glob("*.jpg")), *sorted((REAL / "receipts" / "images").glob("*"))[:4]]
    if not paths:
        pytest.skip(f"no photos or receipts under {os.path.relpath(REAL, REPO)}")
    spec = ImageConfig(num_crops=4)
    for path in paths:
        views = make_views(open_image(path), spec)
        with Image.open(path) as image:
            np.testing.assert_array_equal(views.pixels, plain_views(image, spec))
