"""Files of weights: pickles of any opcodes, and safetensors with any header."""

import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepstack_jax.errors import WeightsError
from deepstack_jax.weights.stored_tensor import open_safetensors
from deepstack_jax.weights.torch_pickle import open_bin
from tests.fuzz.watch import is_one_line, reads_only
from tests.unit.bins import write_archive, write_bin

STORED = {"0": np.arange(12, dtype=np.float32).tobytes(), "1": bytes(8)}


def check(open_file, file) -> None:
    """Either tensors whose every element can be read, or one line."""
    open_file(file.parent / "warm")  # what is imported at the first use
    with reads_only(file.parent):
        try:
            tensors = open_file(file)
        except WeightsError as error:
            is_one_line(error, 700 + len(str(file)))
            return
        for name, tensor in tensors.items():
            assert isinstance(name, str)
            array = tensor.read()
            assert array.shape == tensor.shape
            assert array.nbytes <= file.stat().st_size
            array.tobytes()


numbers = st.one_of(st.integers(-3, 14), st.sampled_from([2**31, 2**63 - 1, 2**64, -(2**63), 10**30]))


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode("utf-8", "surrogatepass"))) + value.encode("utf-8", "surrogatepass")


_GLOBALS = [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nFloatStorage\n"]
_GLOBALS += [b"ccollections\nOrderedDict\n", b"cos\nsystem\n", b"cbuiltins\ngetattr\n", b"ctorch\nByteStorage\n"]
_words = st.sampled_from(
    ["file", "offset", "dtype", "size", "__dict__", "__class__", "__setstate__", "storage", "0", "1", "../0"]
)
_opcodes = st.sampled_from(
    [bytes([code]) for code in b"()]}tldasueRbQo\x81\x82\x85\x86\x87\x88\x89\x93\x94N0123.\x8f\x90\x91\x92\x97"]
)
_memo = st.builds(lambda code, at: code + bytes([at]), st.sampled_from([b"q", b"h"]), st.integers(0, 5))
snippets = st.one_of(
    _opcodes,
    _memo,
    numbers.map(_integer),
    _words.map(_text),
    st.text(max_size=4).map(_text),
    st.sampled_from(_GLOBALS),
    st.builds(lambda word: b"(" + _text("storage") + _GLOBALS[2] + _text(word) + _text("cpu") + b"K\x0ctQ", _words),
)
shapes = st.lists(numbers, max_size=3).map(lambda ns: b"(" + b"".join(map(_integer, ns)) + b"t")


@st.composite
def described(draw):
    """A pickle that is nearly right: named tensors over a storage, any numbers, any opcodes in between."""
    between = st.lists(snippets, max_size=2).map(b"".join)
    storage = b"(" + _text("storage") + draw(st.sampled_from(_GLOBALS)) + _text(draw(_words)) + _text("cpu")
    storage += _integer(draw(numbers)) + b"tQ" + draw(between)
    arguments = b"(" + storage + _integer(draw(numbers)) + draw(shapes) + draw(shapes) + b"\x89" + _GLOBALS[3] + b")Rt"
    return b"\x80\x02}" + _text("a") + _GLOBALS[0] + arguments + b"R" + draw(between) + b"s" + draw(between) + b"."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def _bins(folder, pickled: bytes) -> None:
    write_bin(folder / "warm", {"a": np.zeros(2, np.float32)})
    write_archive(folder / "a.bin", pickled, STORED)
    check(open_bin, folder / "a.bin")


@given(st.lists(snippets, max_size=25).map(lambda parts: b"\x80\x02" + b"".join(parts) + b"."))
def test_pickles_of_any_opcodes(folder, pickled):
    _bins(folder, pickled)


@given(described())
def test_pickles_that_describe_tensors_wrongly(folder, pickled):
    _bins(folder, pickled)


values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3)), st.lists, max_leaves=4)


@given(values, st.integers(0, 5))
def test_pickles_of_anything_else(folder, value, protocol):
    _bins(folder, pickle.dumps({"a": value}, protocol))


@given(st.data())
def test_archives_with_damaged_bytes(folder, data):
    write_bin(folder / "warm", {"a": np.arange(6, dtype=np.float32)})
    content = bytearray((folder / "warm").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "a.bin").write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    check(open_bin, folder / "a.bin")


sizes = st.one_of(numbers, st.floats(), st.booleans(), st.none(), st.just("4"))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "I64", "U8", "F8_E4M3", "f32", "", 4, None, ["F32"]]),
        "shape": st.one_of(st.lists(sizes, max_size=4), sizes),
        "data_offsets": st.one_of(st.lists(sizes, max_size=3), st.just([0, 16]), st.just([16, 32])),
    }
)
fitting = st.integers(0, 4).map(lambda n: {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]})
headers = st.dictionaries(
    st.one_of(st.text(max_size=3), st.just("__metadata__")), st.one_of(entries, fitting, values), max_size=3
)


@given(headers, st.integers(0, 40), st.one_of(st.just(0), st.integers(-9, 9)))
def test_safetensors_with_any_header(folder, header, behind, longer):
    text = json.dumps(header).encode()
    (folder / "warm").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "a.safetensors").write_bytes(max(0, len(text) + longer).to_bytes(8, "little") + text + bytes(behind))
    check(open_safetensors, folder / "a.safetensors")


def test_a_member_that_unpacks_to_gigabytes_is_not_unpacked(folder):
    """A compressed member of 2 MB once took 3.8 GB; torch.save compresses none."""
    for name in ("archive/byteorder", "archive/data.pkl"):
        with zipfile.ZipFile(folder / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, bytes(2**24))
            if name != "archive/data.pkl":
                archive.writestr("archive/data.pkl", pickle.dumps({}))
        with pytest.raises(WeightsError, match="is compressed or cut off"):
            open_bin(folder / "bomb.bin")
    write_archive(folder / "bomb.bin", b"\x80\x02" + b"]" * 2**23 + b".", {})
    with pytest.raises(WeightsError, match="has 8388611 bytes, expected at most"):
        open_bin(folder / "bomb.bin")
