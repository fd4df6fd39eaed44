"""Image files from strangers: raster formats alone, no program started, a limit on pixels, EXIF as asked, more than 8 bits."""

import dataclasses
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from deepstack_jax.config import Config, ConfigError, DataConfig, build_config, to_dict
from deepstack_jax.data.formats.image_files import (
    DEEP,
    FORMATS,
    MAX_BYTES,
    TURNED,
    ImageError,
    image_size,
    open_image,
    read_header,
    read_image,
)

# Pillow warns of what is broken or large before it is refused.
pytestmark = pytest.mark.filterwarnings("ignore")
APPLY, IGNORE = DataConfig(exif="apply"), DataConfig()


def noise(mode="RGB", width=24, height=16, seed=0):
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array(source):
    return np.asarray(open_image(source).convert("RGB"))


# Formats


@pytest.fixture
def ghost(tmp_path, monkeypatch):
    """A folder first in the PATH whose `gs` leaves a trace when it is started."""
    trace = tmp_path / "started"
    for name in ("gs", "gswin64c", "iconutil"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho started > {trace}\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return trace


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
IPTC = b"\x1c\x03\x0a\x00\x01\x01\x1c\x03\x14\x00\x01\x10"
REFUSED = {
    "eps": EPS,
    "eps_in_dos_wrapper": struct.pack("<4sII", b"\xc5\xd0\xd3\xc6", 30, len(EPS)) + bytes(18) + EPS,
    "ico": encoded(noise(), "ICO", sizes=[(16, 16)]),
    "icns": encoded(noise("RGBA", 32, 32), "ICNS"),
    "wmf": struct.pack("<IHhhhhHIH", 0x9AC6CDD7, 0, 0, 0, 100, 100, 96, 0, 0) + b"\x01\x00\x09\x00" + bytes(30),
    "emf": b"\x01\x00\x00\x00" + bytes(36) + b" EMF" + bytes(80),
    "psd": b"8BPS\x00\x01" + bytes(60),
    "pdf": b"%PDF-1.4\n%%EOF\n",
    "iptc": IPTC + bytes(40),
    "tga": encoded(noise(), "TGA"),
    "fits": b"SIMPLE  =                    T" + b" " * 2850,
}


@pytest.mark.parametrize("name", REFUSED)
def test_only_raster_formats_are_opened_and_no_program_starts(name, tmp_path, ghost):
    path = tmp_path / f"{name}.jpg"
    path.write_bytes(REFUSED[name])
    for source in (path, str(path), REFUSED[name]):
        for read in (
            open_image,
            image_size,
            lambda source: read_header(source, APPLY),
            lambda source: read_image(source, IGNORE),
        ):
            with pytest.raises(ImageError, match=r"not in any image format that is read: PNG, JPEG, .*; convert it") as caught:
                read(source)
            assert "\n" not in str(caught.value)
    assert not ghost.exists()


def test_an_image_that_pillow_opened_with_another_reader_is_not_decoded(ghost):
    opened = Image.open(io.BytesIO(EPS))
    with pytest.raises(ImageError, match="format EPS, expected one of PNG"):
        open_image(opened)
    assert not ghost.exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_the_list_works_whatever_its_name_says(kind, tmp_path):
    try:
        content = encoded(noise(), kind)
    except OSError as error:
        pytest.skip(f"this Pillow writes no {kind}: {error}")
    path = tmp_path / "picture.dat"
    path.write_bytes(content)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    for source in (path, content, Image.open(path)):
        np.testing.assert_array_equal(array(source), expected)
    assert image_size(path) == image_size(content) == (24, 16)


def test_a_camera_s_several_pictures_in_one_jpeg_are_read_as_the_first():
    content = encoded(noise(), "MPO", save_all=True, append_images=[noise(seed=1)])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    np.testing.assert_array_equal(array(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    np.testing.assert_array_equal(array(Image.open(io.BytesIO(content))), array(content))


# Limits


def png(width, height, *chunks):
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    framed = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def gif_frame(left, top, width, height):
    return b"\x2c" + struct.pack("<HHHHB", left, top, width, height, 0) + b"\x02\x02\x44\x01\x00"


HUGE = {
    "scan_of_169_megapixels": png(13_000, 13_000, (b"IDAT", b"")),
    "beyond_what_pillow_decodes": png(60_000, 60_000, (b"IDAT", b"")),
    "gif_canvas": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6) + gif_frame(0, 0, 1, 1) + b";",
    "gif_frame": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + gif_frame(0, 0, 60_000, 60_000) + b";",
    "tiff": encoded(noise("L", 1, 1), "TIFF").replace(
        struct.pack("<HHII", 256, 4, 1, 1), struct.pack("<HHII", 256, 4, 1, 2**31 - 1)
    ),
    "bmp": b"BM"
    + struct.pack("<IHHI", 54, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm": b"P6 30000 30000 255\n",
    "webp": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16_000).to_bytes(3, "little") * 2 + bytes(8),
}


@pytest.mark.parametrize("name", HUGE)
def test_what_is_too_large_is_refused_by_its_header_and_the_key_named(name):
    for read in (open_image, image_size, lambda source: read_header(source, IGNORE)):
        with pytest.raises(ImageError, match=r"max_pixels=120000000 \(config\.data\.max_pixels\)") as caught:
            read(HUGE[name])
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)


def test_photos_and_scans_of_the_real_world_pass_the_default():
    for width, height in ((12_000, 9_000), (9_933, 7_016), (11_648, 8_736)):  # a phone's 108 megapixels, A3 at 600 dpi, a back
        assert image_size(png(width, height, (b"IDAT", b""))) == (width, height)


def test_the_limit_is_a_key():
    content = encoded(noise(), "PNG")
    small = DataConfig(max_pixels=24 * 16 - 1)
    for read in (read_image, image_size, read_header):
        with pytest.raises(ImageError, match=r"24x16 is more than max_pixels=383 \(config\.data\.max_pixels\)"):
            read(content, small)
    assert read_image(content, dataclasses.replace(small, max_pixels=384))[0].size == (24, 16)
    for wrong in (0, 178_956_971):
        with pytest.raises(ConfigError, match=r"config\.data\.max_pixels got .*, expected 1 to 178956970 pixels"):
            build_config(to_dict(Config(data=DataConfig(max_pixels=wrong))))


def test_a_file_that_is_larger_than_any_image_is_not_read(tmp_path):
    path = tmp_path / "picture.png"
    with path.open("wb") as file:
        file.write(encoded(noise(), "PNG"))
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ImageError, match=r"it has 536,870,913 bytes, more than the 536,870,912 allowed"):
        open_image(path)


def test_bombs_in_text_chunks_are_one_line():
    content = png(1, 1, (b"zTXt", b"k\0\0" + zlib.compress(bytes(100 << 20), 9)), (b"IDAT", zlib.compress(bytes(4))))
    with pytest.raises(ImageError, match="cannot read image"):
        open_image(content)


def test_of_many_frames_only_the_first_is_decoded(monkeypatch):
    frames = [noise("L", seed=seed).convert("P") for seed in range(20)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        content = encoded(
            frames[0].convert("RGB"), kind, save_all=True, append_images=[one.convert("RGB") for one in frames[1:]]
        )
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        monkeypatch.setattr(ImageFile.ImageFile, "seek", lambda self, frame: pytest.fail(f"frame {frame} was asked for"))
        np.testing.assert_array_equal(array(content), expected)
        monkeypatch.undo()


# More than 8 bits

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def tiff(values, byte_order="<", **tags):
    """An uncompressed gray TIFF of any type; Pillow writes only some of them."""
    values = values.astype(values.dtype.newbyteorder(byte_order))
    height, width = values.shape
    kinds = {"u": 1, "i": 2, "f": 3}
    entries = {
        256: (4, width),
        257: (4, height),
        258: (3, values.itemsize * 8),
        259: (3, 1),
        262: (3, 1),
        273: (4, 8),
        277: (3, 1),
    }
    entries |= {278: (4, height), 279: (4, values.nbytes), 339: (3, kinds[values.dtype.kind])}
    entries |= {int(tag): (3, value) for tag, value in tags.items()}
    body = values.tobytes()
    head = (b"II*\0" if byte_order == "<" else b"MM\0*") + struct.pack(f"{byte_order}I", 8 + len(body))
    packed = [
        struct.pack(f"{byte_order}HHI", tag, kind, 1)
        + struct.pack(f"{byte_order}{'HH' if kind == 3 else 'I'}", *([value, 0] if kind == 3 else [value]))
        for tag, (kind, value) in sorted(entries.items())
    ]
    return head + body + struct.pack(f"{byte_order}H", len(packed)) + b"".join(packed) + bytes(4)


WIDE = RAMP.astype(np.uint64)
DEEP_FILES = {
    "png_16": lambda: encoded(Image.fromarray((WIDE * 257).astype(np.uint16)), "PNG"),
    "tiff_16": lambda: encoded(Image.fromarray((WIDE * 257).astype(np.uint16)), "TIFF"),
    "tiff_16_lzw": lambda: encoded(Image.fromarray((WIDE * 257).astype(np.uint16)), "TIFF", compression="tiff_lzw"),
    "tiff_16_big_endian": lambda: tiff((WIDE * 257).astype(np.uint16), ">"),
    "tiff_16_signed": lambda: tiff((WIDE * 32767 // 255).astype(np.int16)),
    "tiff_16_signed_big_endian": lambda: tiff((WIDE * 32767 // 255).astype(np.int16), ">"),
    "tiff_32_signed": lambda: tiff((WIDE * (2**31 - 1) // 255).astype(np.int32)),
    "tiff_32_signed_big_endian": lambda: tiff((WIDE * (2**31 - 1) // 255).astype(np.int32), ">"),
    "tiff_32_unsigned": lambda: tiff((WIDE * (2**32 - 1) // 255).astype(np.uint32)),
    "tiff_float": lambda: encoded(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
    "tiff_float_big_endian": lambda: tiff((RAMP / 255).astype(np.float32), ">"),
    "pgm_16": lambda: encoded(Image.fromarray((WIDE * 257).astype(np.uint16)), "PPM"),
    "pgm_10": lambda: b"P5 16 16 1023\n" + (WIDE * 1023 // 255).astype(">u2").tobytes(),
    "pgm_16_in_words": lambda: b"P2 16 16 65535\n" + " ".join(map(str, (WIDE * 257).ravel())).encode(),
    "pfm": lambda: b"Pf\n16 16\n-1.0\n" + (RAMP[::-1] / 255).astype("<f4").tobytes(),
    "jpeg2000_16": lambda: encoded(Image.fromarray((WIDE * 257).astype(np.uint16)), "JPEG2000"),
}
for dtype, values in ((np.uint16, WIDE * 257), (np.int32, WIDE * (2**31 - 1) // 255), (np.float32, RAMP / 255)):
    DEEP_FILES[f"in_memory_{np.dtype(dtype)}"] = lambda dtype=dtype, values=values: Image.fromarray(values.astype(dtype))


@pytest.mark.parametrize("name", DEEP_FILES)
def test_more_than_8_bits_are_scaled_by_the_full_range_of_their_type(name):
    source = DEEP_FILES[name]()
    image, remarks = read_image(source, IGNORE)
    assert (image.mode, remarks) == ("L", (DEEP,))
    assert read_header(source, IGNORE).remarks == (DEEP,)
    off_by = 1 if name in ("tiff_16_signed", "tiff_16_signed_big_endian", "pgm_10") else 0  # steps not multiples of ours
    np.testing.assert_allclose(np.asarray(image).astype(int), RAMP, atol=off_by)


def test_scaling_rounds_to_the_nearest():
    values = np.random.default_rng(0).integers(0, 65536, (40, 50), np.uint16)
    np.testing.assert_array_equal(np.asarray(open_image(encoded(Image.fromarray(values), "PNG"))), np.rint(values / 257))


def test_white_is_zero_is_heeded():
    np.testing.assert_array_equal(np.asarray(open_image(tiff((WIDE * 257).astype(np.uint16), **{"262": 0}))), 255 - RAMP)


def test_what_lies_outside_of_a_range_is_clipped_and_no_number_is_black():
    values = np.tile(np.array([0.5, -3, 1.01, np.nan, np.inf, -np.inf, 1, 0], np.float32), (2, 1))
    gray = np.asarray(open_image(Image.fromarray(values)))
    assert gray[0].tolist() == [128, 0, 255, 0, 255, 0, 255, 0]
    assert np.asarray(open_image(Image.fromarray(np.full((2, 2), np.nan, np.float32)))).max() == 0
    signed = np.tile(np.array([-32768, 0, 32767, 16384], np.int16), (2, 1))
    assert np.asarray(open_image(tiff(signed)))[0].tolist() == [0, 0, 255, 128]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (RAMP.astype(np.float32), r"pixels are 0 to 255, expected the range 0 to 1 of their type: all of it would be white"),
        (
            RAMP.astype(np.int32),
            r"pixels are 0 to 255, expected the range 0 to 2\.14748e\+09 .* black; scale them, or save 8 bits",
        ),
        (-1 - RAMP.astype(np.float32), "pixels are -256 to -1, .* black"),
    ],
)
def test_values_of_another_range_are_refused_and_not_trained_on_as_black_or_white(values, said):
    with pytest.raises(ImageError, match=said):
        open_image(Image.fromarray(values))


def test_a_black_picture_of_16_bits_is_black():
    assert np.asarray(open_image(Image.fromarray(np.zeros((4, 5), np.uint16)))).max() == 0


def test_colours_of_16_bits_are_within_one_step_and_counted():
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = (b"IHDR", struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0))
    content = png(5, 6, (b"IDAT", zlib.compress(rows)))
    content = (
        content[:8]
        + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in [head]
        )
        + content[8 + 25 :]
    )
    image, remarks = read_image(content, IGNORE)
    assert remarks == read_header(content, IGNORE).remarks == (DEEP,)
    np.testing.assert_allclose(np.asarray(image).astype(int), values / 257, atol=1)


def test_eight_bits_are_not_remarked():
    for mode in ("RGB", "L", "RGBA"):
        assert read_image(encoded(noise(mode), "PNG"), IGNORE)[1] == ()


# EXIF


def exif_block(orientation, kind=3, byte_order="<"):
    head = b"II*\0" if byte_order == "<" else b"MM\0*"
    value = struct.pack(f"{byte_order}{'HH' if kind == 3 else 'I'}", *([orientation, 0] if kind == 3 else [orientation]))
    return head + struct.pack(f"{byte_order}IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
def test_every_orientation_is_turned_as_pillow_turns_it(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(noise(), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    stored = Image.open(io.BytesIO(content)).convert("RGB")  # what upstream sees; of a TIFF Pillow has turned it by now
    for source in (content, Image.open(io.BytesIO(content))):
        turned, remarks = read_image(source, APPLY)
        np.testing.assert_array_equal(np.asarray(turned.convert("RGB")), np.asarray(upright))
        assert remarks == ()
    seen, remarks = read_image(content, IGNORE)
    np.testing.assert_array_equal(np.asarray(seen.convert("RGB")), np.asarray(stored))
    assert remarks == ((TURNED,) if orientation > 1 and kind != "TIFF" else ())
    assert read_header(content, APPLY).size_wh == image_size(content, APPLY) == upright.size
    assert read_header(content, IGNORE).size_wh == image_size(content, IGNORE) == stored.size
    assert read_header(content, IGNORE).remarks == remarks


def test_an_image_that_was_turned_is_not_turned_again():
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, mode in (("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGBA"), ("WEBP", "RGB")):
        once = open_image(encoded(noise(mode), kind, exif=exif), exif="apply")
        assert once.size == (16, 24)
        np.testing.assert_array_equal(np.asarray(open_image(once, exif="apply")), np.asarray(once))


def test_exif_behind_the_pixels_of_a_png_counts():
    content = encoded(noise(), "PNG")
    block = exif_block(8)
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    late = content[:-12] + chunk + content[-12:]
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(late)))
    np.testing.assert_array_equal(np.asarray(open_image(late, exif="apply")), np.asarray(expected))
    assert image_size(late, APPLY) == expected.size == (16, 24)
    assert read_header(late, IGNORE).remarks == (TURNED,)


def test_text_that_holds_exif_counts():
    text = PngImagePlugin.PngInfo()
    block = b"Exif\0\0" + exif_block(3)
    text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n")
    content = encoded(noise(), "PNG", pnginfo=text)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(np.asarray(open_image(content, exif="apply")), np.asarray(expected))


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"II*\0",
        b"garbage of no kind",
        exif_block(6)[:14],
        exif_block(0),
        exif_block(9),
        exif_block(65535),
        exif_block(6, kind=2),
        exif_block(2**31, kind=9),
        b"II*\0\xff\xff\xff\xff",
        b"II*\0" + struct.pack("<IH", 8, 65535),
        b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 0x0112, 5, 2**31, 0),
    ],
)
def test_a_broken_block_leaves_the_image_as_it_is(block):
    stored = noise()
    content = encoded(stored, "PNG")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    for place in (33, len(content) - 12):  # after the header, before the end
        image, remarks = read_image(content[:place] + chunk + content[place:], APPLY)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(stored))
        assert remarks == ()
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block
    photo = encoded(stored, "JPEG")
    np.testing.assert_array_equal(np.asarray(open_image(photo[:2] + segment + photo[2:], exif="apply")), array(photo))


def test_deep_images_are_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray((WIDE * 257).astype(np.uint16)), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(content, exif="apply")), np.rot90(RAMP, -1))
