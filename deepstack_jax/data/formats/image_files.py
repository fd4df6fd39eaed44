"""From files of raster images to decoded RGB or gray: a list of formats, a limit on pixels, EXIF, and more than 8 bits."""

import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from typing import IO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin

from deepstack_jax.config import DataConfig
from deepstack_jax.data.formats import files
from deepstack_jax.errors import UserError

# Pillow's other readers start programs (EPS), open whatever a file contains with any reader (IPTC, ICNS), decode before the
# size can be looked at (ICO), or know their files by no mark (TGA).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI")
MAX_BYTES = 512 << 20  # of a file that may be an image
_BLOCK = 2**22  # pixels of more than 8 bits that are scaled at once
DEFAULTS = DataConfig()

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # at half of what Pillow decodes: we have a limit

TURNS = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_PLACES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow looks for the orientation
_DEEP = re.compile(r"(LA|RGB[AX]?|CMYK);16")  # what Pillow itself cuts to 8 bits: the upper half of each sample

# What is done to an image that not everybody expects: counted, and said once.
DEEP = "images of 16 or 32 bits or float, scaled to 8 bits by the full range of their type (float: 0 to 1)"
TURNED = "images that EXIF says to turn, seen as they are stored, as upstream does; exif=apply turns them upright"


class ImageError(UserError):
    """An image that cannot be read; the message is one line with its path and the reason."""


class ImageHeader(NamedTuple):
    """What a header says of an image."""

    size_wh: tuple[int, int]  # as `open_image` gives it
    turn: Image.Transpose | None  # how it is turned upright; None where it is upright, or is left as it is
    remarks: tuple[str, ...]  # DEEP and TURNED, if they hold


ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray


def open_image(source: ImageLike, *, max_pixels: int = DEFAULTS.max_pixels, exif: str = DEFAULTS.exif) -> Image.Image:
    """Read an image by its content, whatever its name says; of several frames the first.

    Args:
      source: a path, an encoded file of one of FORMATS, a PIL image, or u8[y, x], u8[y, x, 1], u8[y, x, 3] or u8[y, x, 4].
      max_pixels: largest width * height that is decoded.
      exif: "apply" turns the image upright where EXIF says how; "ignore" takes it as stored, as upstream does. A TIFF is
          always turned: Pillow does that itself.

    Returns:
      A decoded image of mode RGB, or L where the source is gray: a third of the work for `make_views`, the same pixels.
      `.convert("RGB")` of it equals PIL's own conversion of the source, but for gray of more than 8 bits, which PIL clips:
      that is scaled by the full range of its type, floating point by 0 to 1.

    Raises:
      ImageError: missing, empty, truncated, too large, or no image at all; black pixels in its place would train on noise.
    """
    return read_image(source, replace(DEFAULTS, max_pixels=max_pixels, exif=exif))[0]


def read_image(source: ImageLike, data: DataConfig) -> tuple[Image.Image, tuple[str, ...]]:
    """As `open_image` under a configuration, with the remarks (DEEP, TURNED) that a run counts."""
    with _errors_of(source, data.max_pixels):
        with _opened(source, data.max_pixels, whole=True) as (image, file):
            look = _look(image, file, data.max_pixels, data.exif)
            image.load()
        if image.mode not in ("RGB", "L"):
            deep = image.mode.startswith(("I", "F"))
            image = _gray(image) if deep else image.convert("L" if image.mode in ("1", "LA") else "RGB")
        if look.turn is not None:
            image = image.transpose(look.turn)
            for place in _EXIF_PLACES:  # or it would be turned once more by whoever reads it again
                image.info.pop(place, None)
        return image, look.remarks


def image_size(source: ImageLike, data: DataConfig = DEFAULTS) -> tuple[int, int]:
    """(width, height) of what `read_image` would give, by the header alone; ImageError where there is none."""
    with _errors_of(source, data.max_pixels), _opened(source, data.max_pixels) as (image, file):
        return _look(image, file if data.exif == "apply" else None, data.max_pixels, data.exif).size_wh


def read_header(source: ImageLike, data: DataConfig) -> ImageHeader:
    """As `image_size`, with the remarks; of a PNG the whole file is passed through, for EXIF at its end."""
    with _errors_of(source, data.max_pixels), _opened(source, data.max_pixels) as (image, file):
        return _look(image, file, data.max_pixels, data.exif)


def _describe(source: object) -> str:
    match source:
        case str() | os.PathLike():
            path = os.fsdecode(source)
            return path if len(path) <= 200 else f"{path[:100]}...{path[-97:]}"
        case bytes():
            return f"<{len(source)} bytes>"
        case np.ndarray():
            return f"<array {source.dtype}{list(source.shape)}>"
        case _:
            return f"<{type(source).__name__}>"


@contextmanager
def _errors_of(source: object, max_pixels: int) -> Iterator[None]:
    """Whatever goes wrong inside becomes an ImageError of one line."""
    try:
        yield
    except Exception as error:  # PIL's decoders raise nearly anything on damaged bytes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not in any image format that is read: {', '.join(FORMATS)}; convert it to one of them"
        if isinstance(error, Image.DecompressionBombError):
            reason = f"{reason.partition(',')[0]}, and max_pixels={max_pixels} (config.data.max_pixels); scale it down"
        raise ImageError(
            f"cannot read image {_describe(source)}: {' '.join(reason.split()) or type(error).__name__}"
        ) from error


@contextmanager
def _opened(source: object, max_pixels: int, *, whole: bool = False) -> Iterator[tuple[Image.Image, IO[bytes] | None]]:
    """The image, nothing decoded, and its file; `whole`: read at once, since most of it will be needed."""
    match source:
        case Image.Image():
            if isinstance(source, ImageFile.ImageFile) and source.format not in (*FORMATS, "MPO"):
                raise ImageError(f"an image file of format {source.format}, expected one of {', '.join(FORMATS)}; convert it")
            yield source, None
        case np.ndarray():
            if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (1, 3, 4)):
                raise ImageError("expected uint8[y, x], [y, x, 1], [y, x, 3] or [y, x, 4]")
            yield Image.fromarray(np.ascontiguousarray(source[..., 0] if source.shape[2:] == (1,) else source)), None
        case bytes():
            if not source:
                raise ImageError("the file is empty")
            file = BytesIO(source)
            yield Image.open(file, formats=FORMATS), file
        case str() | os.PathLike():
            path = os.fsdecode(source)
            with BytesIO(files.read_bytes(path, MAX_BYTES)) if whole else files.open_binary(path) as file:
                if not file.read(1):
                    raise ImageError("the file is empty")
                yield Image.open(file, formats=FORMATS), file
        case _:
            raise ImageError("expected a path, encoded bytes, a PIL image or a uint8 array")


def _look(image: Image.Image, file: IO[bytes] | None, max_pixels: int, exif: str) -> ImageHeader:
    width, height = image.size
    if not width * height:
        raise ImageError(f"{width}x{height} has no pixels")
    if width * height > max_pixels:
        limit = f"max_pixels={max_pixels} (config.data.max_pixels)"
        raise ImageError(f"{width}x{height} is more than {limit}; scale it down, or raise the limit")
    args: object = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    cut = _DEEP.match(str(args[0] if isinstance(args, tuple) and args else args))  # how samples are stored, in Pillow's words
    remarks = (DEEP,) if cut or image.mode.startswith(("I", "F")) else ()
    orientation = _orientation(image, file)
    if orientation == 1 or exif != "apply":
        return ImageHeader(image.size, None, remarks if orientation == 1 else (*remarks, TURNED))
    return ImageHeader((height, width) if orientation >= 5 else image.size, TURNS[orientation], remarks)


def _orientation(image: Image.Image, file: IO[bytes] | None) -> int:
    """1 to 8, as EXIF counts; 1 where it says nothing that can be read, and for TIFF, which Pillow turns by itself."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1
    try:
        if file and isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info and (late := _late_exif(file)):
            image.info["exif"] = late
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # not PNG's own, which decodes the image first
    except Exception:  # a broken block: viewers show such an image as it is stored
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def _late_exif(file: IO[bytes]) -> bytes | None:
    """The EXIF block after the pixels of a PNG, where some programs write it."""
    here = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            size, name = struct.unpack(">I4s", head)
            if name == b"eXIf":
                return b"Exif\0\0" + file.read(size)
            file.seek(size + 4, os.SEEK_CUR)
        return None
    finally:
        file.seek(here)


def _gray(image: Image.Image) -> Image.Image:
    """Gray of more than 8 bits as 8 bits, scaled by the full range of its type; below zero is black, as in signed types.

    ImageError where nothing would be left but black or white: such values are of another range.
    """
    values, top = _values(image)
    gray = np.empty(values.shape, np.uint8)
    step = max(1, _BLOCK // image.width)
    for y in range(0, len(values), step):
        part = np.nan_to_num(values[y : y + step].astype(np.float64), nan=0.0) / top
        gray[y : y + step] = np.rint(part.clip(0, 1) * 255)
    low, high = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
    lost = not gray.any() if high > 0 else high > low
    if lost or np.count_nonzero(values > top) > values.size // 2:
        raise ImageError(
            f"its pixels are {low:g} to {high:g}, expected the range 0 to {top:g} of their type: all of it would be "
            f"{'black' if lost else 'white'}; scale them, or save 8 bits"
        )
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        gray = 255 - gray  # zero is white, which Pillow heeds for 8 bits alone
    result = Image.fromarray(gray)
    result.info = image.info
    return result


def _values(image: Image.Image) -> tuple[np.ndarray, float]:
    """The numbers of an image of mode I or F, and the largest that its file can hold."""
    values = np.asarray(image)
    if image.mode == "F":
        return values, 1.0
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0]
        signed = image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2
        return (values if signed or bits < 32 else values.view(np.uint32)), float(2 ** (bits - signed) - 1)
    if image.format == "PPM":  # 16 bits in a wider type
        return values, 65535.0
    return values, float(np.iinfo(values.dtype).max)
