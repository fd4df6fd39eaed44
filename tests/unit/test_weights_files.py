"""Tensors on disk: safetensors and .bin, whole, sharded, damaged and hostile."""

import itertools
import json
import os
import pickle
import shutil
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from deepstack_jax.errors import WeightsError
from deepstack_jax.weights.checkpoint_files import open_weight_files, weight_files
from deepstack_jax.weights.save import DTYPES, Out, shard_size, write_safetensors, write_shards
from deepstack_jax.weights.stored_tensor import aligned_empty, copy_into, open_safetensors
from deepstack_jax.weights.torch_pickle import open_bin
from tests.parity.goldens import GOLDEN
from tests.unit.bins import write_archive, write_bin

pytestmark = pytest.mark.quick
WEIGHTS = GOLDEN / "weights" / "llama_mha" / "model.safetensors"

quick_draws = settings(max_examples=30, deadline=None)


def outs_of(tensors: dict[str, np.ndarray]) -> list[Out]:
    return [Out(name, tensor.shape, lambda tensor=tensor: tensor) for name, tensor in tensors.items()]


def nothing(nbytes: int) -> None:
    del nbytes


@quick_draws
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_what_is_written_is_what_the_library_and_we_read(shapes, dtype, tmp_path_factory):
    rng = np.random.default_rng(len(shapes))
    tensors = {f"t{at}": rng.standard_normal(shape).astype(np.float32) for at, shape in enumerate(shapes)}
    file = tmp_path_factory.mktemp("written") / "model.safetensors"
    write_safetensors(file, outs_of(tensors), dtype, nothing)
    ours = open_safetensors(file)
    with safe_open(file, "numpy") as opened:
        assert set(opened.keys()) == set(tensors) == set(ours)
        for name, tensor in tensors.items():
            wanted = tensor.astype(DTYPES[dtype][1])
            assert opened.get_slice(name).get_shape() == list(tensor.shape) == list(ours[name].shape)
            assert ours[name].read().tobytes() == wanted.tobytes()
            if dtype != "bfloat16":
                assert opened.get_tensor(name).tobytes() == wanted.tobytes()


@quick_draws
@given(
    st.permutations(range(3)),
    st.permutations([st.integers(1, 300), st.integers(1, 9), st.integers(1, 9)]).flatmap(lambda s: st.tuples(*s)),
)
def test_copies_in_strips_equal_plain_copies(axes, shape):
    source = np.arange(np.prod(shape), dtype=np.int32).reshape(shape).transpose(axes)
    out = aligned_empty(source.shape, np.dtype(np.float64))
    copy_into(out, source)
    np.testing.assert_array_equal(out, source)
    assert out.ctypes.data % 64 == 0


def test_several_files_with_and_without_an_index_equal_one(tmp_path):
    tensors = load_file(WEIGHTS)
    count = write_shards(outs_of(tensors), tmp_path, "float32", shard_size("100KB"), nothing)
    assert count == len(list(tmp_path.glob("model-*.safetensors"))) > 5
    assert max(file.stat().st_size for file in tmp_path.glob("model-*.safetensors")) < 130_000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for _ in ("with", "without"):
        found = dict(open_weight_files(weight_files(tmp_path)))
        assert {name: found[name].read().tobytes() for name in found} == {name: t.tobytes() for name, t in tensors.items()}
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)


_CHOICES = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("there", [list(some) for n in (1, 2, 3, 4) for some in itertools.combinations(_CHOICES, n)])
def test_a_whole_file_goes_before_an_index_and_safetensors_before_bin(there, tmp_path):
    for name in there:
        shard = f"{name.split('.')[0]}-00001-of-00001.{'bin' if '.bin' in name else 'safetensors'}"
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": shard}}))
        (tmp_path / shard).write_bytes(b"")
    first = there[0].split(".")[0] + "-00001-of-00001" if there[0].endswith(".json") else there[0].split(".")[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [file.name for file in weight_files(tmp_path)] == [f"{first}.{there[0].split('.')[1]}"]
    assert [all(name in str(one.message) for name in there) for one in said] == [True] * (len(there) > 1)


def test_an_index_that_names_nothing_but_the_whole_file_is_no_second_choice(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": {"a": "../x"}}', '{"weight_map": {}}'])
def test_a_damaged_index_beside_the_whole_file_is_only_said(index, content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / index).write_text(content)
    with pytest.warns(UserWarning, match=rf"and by {index}; model\.safetensors is read"):
        assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "consolidated.safetensors", "model-00001-of-00002.safetensors", "a.bin"]
)
def test_variants_and_parts_are_not_taken_for_the_weights(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=rf"no model\.safetensors and no pytorch_model\.bin in .*\({name} are not chosen"):
        weight_files(tmp_path)


def test_config_json_may_name_the_weights(tmp_path):
    for name in ("model.safetensors", "tuned.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"tuned\.safetensors is read"):
        assert [file.name for file in weight_files(tmp_path, "tuned.safetensors")] == ["tuned.safetensors"]
    (tmp_path.parent / "outside.safetensors").write_bytes(b"")
    for wrong in ("../outside.safetensors", "gone.safetensors", "config.json", str(tmp_path.parent / "outside.safetensors")):
        with pytest.raises(WeightsError, match=r"transformers_weights is '.*expected a \*\.safetensors or its index inside"):
            weight_files(tmp_path, wrong)


@pytest.mark.parametrize("map_", [["a"], {"a": 3}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, None])
def test_an_index_names_files_of_its_folder(map_, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_}))
    with pytest.raises(WeightsError, match="has no weight_map of tensors to files of its folder"):
        weight_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(outs_of(load_file(WEIGHTS)), tmp_path, "float32", 200_000, nothing)
    gone = sorted(tmp_path.glob("model-00002-*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(WeightsError, match=rf"{gone.name} missing; download the rest"):
        weight_files(tmp_path)


@pytest.mark.parametrize("keep", [4, 100, 5000])
def test_a_file_that_is_cut_off_is_refused(keep, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"not a whole safetensors file .* copy or download it again"):
        open_safetensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ('{"a": ENTRY, "a": ENTRY}', "a name is there twice"),
        ("[" * 50000, "not a whole safetensors file"),
        ('{"a": [1]}', "not a whole safetensors file"),
    ],
)
def test_a_header_that_says_nothing_sure_is_refused(header, reason, tmp_path):
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    text = header.replace("ENTRY", entry).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(WeightsError, match=reason) as caught:
        open_safetensors(tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value)


def test_quantised_and_absent_weights_are_refused(tmp_path):
    save_file({"a": np.zeros(3, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"a is stored as I8, expected one of F64.*full-precision"):
        open_safetensors(tmp_path / "model.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "training_args.bin").write_bytes(b"x")
    with pytest.raises(
        WeightsError, match=r"no model\.safetensors and no pytorch_model\.bin in .* \(training_args\.bin are not chosen"
    ):
        weight_files(tmp_path / "empty")
    with pytest.raises(WeightsError, match="no folder"):
        weight_files(tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_bin_equals_safetensors(dtype, tmp_path):
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(WEIGHTS).items()}
    names = list(tensors)
    for part, some in enumerate((names[:20], names[20:]), 1):
        write_bin(tmp_path / f"pytorch_model-0000{part}-of-00002.bin", {name: tensors[name] for name in some})
    shutil.copyfile(
        tmp_path / "pytorch_model-00001-of-00002.bin", tmp_path / "mm_projector.bin"
    )  # no part of the model's files
    found = dict(open_weight_files(weight_files(tmp_path)))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].read().tobytes() == tensor.tobytes()
        assert found[name].dtype == tensor.dtype


def test_views_into_a_storage_are_read_and_checked(tmp_path):
    table = np.arange(24, dtype=np.float32)
    write_bin(tmp_path / "view.bin", {"a": table}, view=(2, (3, 4), (1, 6)))
    wanted = [[2 + i + 6 * j for j in range(4)] for i in range(3)]
    np.testing.assert_array_equal(open_bin(tmp_path / "view.bin")["a"].read()[:, :3], np.array(wanted)[:, :3])
    for view in ((2, (3, 5), (1, 6)), (-1, (2,), (1,)), (0, (2,), (-1,))):
        write_bin(tmp_path / "bad.bin", {"a": table}, view=view)
        with pytest.raises(WeightsError, match="reaches beyond its storage"):
            open_bin(tmp_path / "bad.bin")


class Hostile:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_code_in_a_pickle_runs(protocol, tmp_path):
    mark = tmp_path / "mark"
    for at, attack in enumerate(
        (
            Hostile(os.system, f"touch {mark}"),
            Hostile(exec, f"open({str(mark)!r}, 'w')"),
            {"model": Hostile(os.mkdir, str(mark))},
            Hostile(getattr, Hostile(__import__, "os"), "system"),
        )
    ):
        file = tmp_path / f"{at}.bin"
        write_archive(file, pickle.dumps(attack, protocol), {})
        with pytest.raises(WeightsError, match=r"asks for .*, expected tensors only; nothing of it was run"):
            open_bin(file)
    assert not mark.exists()


def test_other_pickles_are_refused(tmp_path):
    old = tmp_path / "old.bin"
    old.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightsError, match=r"before version 1\.6.*torch\.save\(torch\.load\('.*old\.bin', weights_only=True\)"):
        open_bin(old)
    for content in ([1, 2], {"a": 1}, {"a": {"b": "c"}}):
        write_archive(tmp_path / "other.bin", pickle.dumps(content), {})
        with pytest.raises(WeightsError, match=r"more than named tensors; save model\.state_dict\(\) alone"):
            open_bin(tmp_path / "other.bin")
    write_archive(tmp_path / "torn.bin", pickle.dumps({"a": 1})[:-3], {})
    with pytest.raises(WeightsError, match="not a readable file of tensors"):
        open_bin(tmp_path / "torn.bin")


def test_sizes_of_files():
    assert [shard_size(text) for text in ("5GB", "500MB", "12 kb", "7")] == [5 * 10**9, 5 * 10**8, 12_000, 7]
    for text in ("", "5TB", "0", "-1GB", "five"):
        with pytest.raises(WeightsError, match=r"--max_shard got .*expected a size such as 5GB"):
            shard_size(text)


def test_float16_that_overflows_is_refused_and_infinities_stay(tmp_path):
    with pytest.raises(WeightsError, match=r"big has values beyond float16.*--dtype=bfloat16"):
        write_safetensors(tmp_path / "a", outs_of({"big": np.array([1e6], np.float32)}), "float16", nothing)
    write_safetensors(tmp_path / "b", outs_of({"inf": np.array([np.inf], np.float32)}), "float16", nothing)
    assert np.isinf(open_safetensors(tmp_path / "b")["inf"].read()).all()


def _attack(change: bytes) -> bytes:
    """A tensor over storage "0", whose storage is changed by `change` before it is used."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    arguments = b"(" + storage + b"q\x01" + change + b"K\x00K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


_ELSEWHERE = b"}(X\x04\x00\x00\x00fileX\x0b\x00\x00\x00/etc/passwdX\x04\x00\x00\x00sizeM\xff\xffX\x06\x00\x00\x00offsetK\x00u"


@pytest.mark.parametrize(
    "change", [_ELSEWHERE + b"b", b"N" + _ELSEWHERE + b"\x86b", _ELSEWHERE[:1] + b"X\x01\x00\x00\x00aK\x01s" + b"b"]
)
def test_no_opcode_changes_what_a_storage_is(change, tmp_path):
    """BUILD once set the file and the size of a storage: any file of the user could be copied into an export."""
    write_archive(tmp_path / "plain.bin", _attack(b""), {"0": np.arange(4, dtype=np.float32).tobytes()})
    np.testing.assert_array_equal(open_bin(tmp_path / "plain.bin")["a"].read(), np.arange(4, dtype=np.float32))
    write_archive(tmp_path / "built.bin", _attack(change), {"0": np.arange(4, dtype=np.float32).tobytes()})
    with pytest.raises(WeightsError, match="a Stored where a dict belongs"):
        open_bin(tmp_path / "built.bin")


def test_numbers_that_stand_there_negated_are_refused(tmp_path):
    """torch saves a lazily negated tensor as the plain one with a note after its hooks."""
    for note, fine in ((b"}", True), (b"}X\x03\x00\x00\x00neg\x88s", False)):
        write_archive(tmp_path / "a.bin", _attack(b"").replace(b")Rt", b")R" + note + b"t"), {"0": bytes(16)})
        if fine:
            assert open_bin(tmp_path / "a.bin")["a"].shape == (4,)
        else:
            with pytest.raises(WeightsError, match="a tensor of an unknown kind"):
                open_bin(tmp_path / "a.bin")


def test_a_storage_is_a_member_of_its_own_archive(tmp_path):
    write_archive(
        tmp_path / "a.bin", _attack(b"").replace(b"X\x01\x00\x00\x000", b"X\x05\x00\x00\x00../..", 1), {"0": bytes(16)}
    )
    with pytest.raises(WeightsError, match="not a readable file of tensors"):
        open_bin(tmp_path / "a.bin")
    write_archive(tmp_path / "b.bin", _attack(b""), {"0": bytes(12)})
    with pytest.raises(WeightsError, match="a tensor reaches beyond its storage"):
        open_bin(tmp_path / "b.bin")


def test_keys_that_would_take_forever_to_hash_are_refused(tmp_path):
    """Forty tuples of the one before twice are 2**40 values to a hash, and a deep one overflows its stack."""
    for text in (b"\x80\x02)" + b"q\x01h\x01\x86" * 60, b"\x80\x02)" + b"\x85" * 2**20):
        write_archive(tmp_path / "a.bin", text + b"q\x01}h\x01Ns.", {})
        with pytest.raises(WeightsError, match="a tuple where a str belongs"):
            open_bin(tmp_path / "a.bin")


def test_a_state_dict_keeps_its_metadata_to_itself(tmp_path):
    write_bin(tmp_path / "a.bin", {"a": np.arange(3, dtype=np.float32)})
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        text = archive.read("archive/data.pkl")
    write_archive(
        tmp_path / "b.bin", text[:-1] + b"}X\x09\x00\x00\x00_metadata}sb.", {"0": np.arange(3, dtype=np.float32).tobytes()}
    )
    np.testing.assert_array_equal(open_bin(tmp_path / "b.bin")["a"].read(), np.arange(3))
