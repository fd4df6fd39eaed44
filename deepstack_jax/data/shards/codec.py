"""One example as the bytes of a record, and back.

A record is msgpack of [name, [[role, text], ...], [encoded image, ...], info]; inside info, extension 1 is a tuple
(msgpack of its list) and extension 2 an array (msgpack of [dtype, shape, bytes in C order]).
"""

import json
from datetime import date, time, timedelta
from decimal import Decimal
from io import BytesIO
from typing import Any

import msgpack
import numpy as np
from PIL import Image

from deepstack_jax.data.example import ConversationError, Example, ExampleError, Message
from deepstack_jax.data.formats import files
from deepstack_jax.data.formats.image_files import MAX_BYTES, open_image
from deepstack_jax.data.formats.styles import RecordError, check_messages

_TUPLE, _ARRAY = 1, 2  # msgpack extensions


def encode_example(example: Example) -> bytes:
    """One record: msgpack of name, messages, images (files as they are, pixels as PNG) and info; without the record number."""
    try:
        check_messages(example.messages, len(example.images))
        images = [_image_bytes(image) for image in example.images]
        messages = [[message.role, message.text] for message in example.messages]
        return _pack([example.name, messages, images, {key: _carried(value) for key, value in example.info.items()}])
    except (RecordError, ConversationError) as error:
        raise ExampleError(f"{example.name}: {error}", example.name) from error
    except OSError as error:
        reason = f"cannot read image {error.filename}: {error.strerror or error}; put it there or remove the record"
        raise ExampleError(f"{example.name}: {reason}", example.name) from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
        message = f"{example.name}: {reason}; expected text, numbers, bytes, arrays, lists and dicts in info"
        raise ExampleError(message, example.name) from error


def decode_example(record: bytes, index: int) -> Example:
    """The example of a stored record, as record `index` of the source.

    Nothing but the record is read: an image is the encoded bytes in it, never the name of a file. RecordError or
    ConversationError where it is no usable conversation, as a record of a file; ValueError, TypeError, ... where it is none.
    """
    name, messages, images, info = _unpack(record)
    if not isinstance(name, str) or not isinstance(messages, list) or not isinstance(images, list):
        raise ValueError("expected name, messages, images and info")
    if not isinstance(info, dict) or not all(isinstance(key, str) for key in info):
        raise ValueError("its info is not a dict with texts as keys")
    for image in images:
        if not isinstance(image, bytes):
            raise RecordError(
                f"an image is a {type(image).__name__}, {str(image)!a:.80}, expected its encoded bytes; prepare it again"
            )
    turns = tuple(Message(role, text) for role, text in messages)
    check_messages(turns, len(images))
    return Example(index, name, tuple(images), turns, info)


def _image_bytes(image: str | bytes | np.ndarray | Image.Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str):
        return files.read_bytes(image, MAX_BYTES)
    buffer = BytesIO()
    opened = open_image(image)
    opened.save(buffer, "PNG", exif=opened.info.get("exif", b""))  # RGB or gray, as training would see it
    return buffer.getvalue()


def _pack(value: object) -> bytes:
    # Half a surrogate, which UTF-8 has no bytes for, is carried as its escape.
    packed = msgpack.packb(value, strict_types=True, default=_extend, unicode_errors="backslashreplace")
    assert packed is not None  # msgpack's annotation allows for a packer that was given a stream
    return packed


def _carried(value: object) -> object:
    """A value of info as a record can hold it: what is nested too deep for msgpack is carried as its JSON."""
    try:
        _pack(value)
    except ValueError:
        return json.dumps(value)
    return value


def _extend(value: object) -> msgpack.ExtType | str:
    if isinstance(value, int | date | time | timedelta | Decimal):  # an int beyond 64 bits
        return str(value)
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, _pack(list(value)))
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return msgpack.ExtType(_ARRAY, _pack([value.dtype.str, list(value.shape), value.tobytes()]))
    raise TypeError(f"got a {type(value).__name__}: {value!r:.80}")


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, ext_hook=_restore, strict_map_key=False)


def _restore(code: int, data: bytes) -> tuple[Any, ...] | np.ndarray:
    if code == _TUPLE:
        return tuple(_unpack(data))
    if code == _ARRAY:
        dtype, shape, content = _unpack(data)
        return np.frombuffer(content, dtype).reshape(shape)
    raise ValueError(f"unknown msgpack extension {code}")
