"""Image files with anything in them: pixels or one line, nothing opened or started, header and pixels agree."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from deepstack_jax.config import DataConfig
from deepstack_jax.data.formats.image_files import FORMATS, ImageError, image_size, read_header, read_image
from tests.fuzz.watch import is_one_line, reads_only

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of what is broken
Image.init()  # all readers of Pillow, which it imports when one is first asked for
KEPT = DataConfig(max_pixels=1_000_000)
TURNED = DataConfig(max_pixels=1_000_000, exif="apply")


def encoded(kind, mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).convert(mode).save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


WRITABLE = [kind for kind in FORMATS if kind != "AVIF" or features.check("avif")]
SOUND = [encoded(kind) for kind in WRITABLE]
SOUND += [encoded("PNG", mode) for mode in ("L", "P", "1", "LA", "RGBA", "I;16")] + [
    encoded("TIFF", mode) for mode in ("I", "F", "CMYK")
]
SOUND += [encoded("TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")]
OTHERS = [
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"\x00\x00\x01\x00",
    b"8BPS",
    b"icns",
    b"RIFF\0\0\0\0WEBP",
    b"\xd7\xcd\xc6\x9a",
    b"P7\n",
]
NUMBERS = st.sampled_from([0, 1, 2, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32 - 1])
EDITS = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 12), st.binary(max_size=8) | NUMBERS.map(lambda n: struct.pack("<I", n))),
    max_size=4,
)


def check(content, folder):
    """Read in every way, or refused in one line each time."""
    sizes = {}
    for data in (KEPT, TURNED):
        for read in (image_size, read_header, read_image):
            try:
                with reads_only(folder):
                    found = read(content, data)
            except ImageError as error:
                is_one_line(error)
                continue
            if read is read_image:
                image, remarks = found
                assert image.mode in ("RGB", "L")
                assert np.asarray(image).dtype == np.uint8
                assert sizes[data.exif, image_size] == sizes[data.exif, read_header] == image.size
                assert set(remarks) <= {*read_header(content, data).remarks}
            else:
                sizes[data.exif, read] = found if read is image_size else found.size_wh
                assert 0 < np.prod(sizes[data.exif, read], dtype=object) <= data.max_pixels


@given(st.sampled_from(SOUND), EDITS)
def test_sound_files_that_were_damaged(tmp_path_factory, content, edits):
    for start, size, patch in edits:
        start %= len(content) + 1
        content = content[:start] + patch + content[start + size :]
    check(content, tmp_path_factory.getbasetemp())


@given(st.sampled_from([*OTHERS, *(content[:40] for content in SOUND)]), st.binary(max_size=60))
def test_beginnings_with_anything_behind(tmp_path_factory, head, rest):
    check(head + rest, tmp_path_factory.getbasetemp())


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF"]), st.binary(max_size=80), st.booleans())
def test_any_exif_block(tmp_path_factory, kind, block, headed):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), (1, 2, 3)).save(buffer, kind, exif=b"Exif\0\0" * headed + b"II*\0\x08\0\0\0" + block)
    check(buffer.getvalue(), tmp_path_factory.getbasetemp())
