"""Every text that errors are told apart by, as the installed jax, jaxlib and tensorstore write it."""

import errno
import importlib.util
import inspect
import mmap
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tensorstore
from jax._src.clusters import k8s_cluster

from deepstack_jax import jax_messages
from deepstack_jax.jax_messages import (
    LOST_PROCESS,
    TRANSIENT_CODES,
    hbm_asked,
    is_after_failed_save,
    is_cluster_missing,
    is_lost_process,
    is_out_of_memory,
    is_transient,
    memory_asked,
)

pytestmark = pytest.mark.quick  # they change with the version of jax

# Said by libraries that come with a GPU, not with jax.
NCCL = "remote process exited"


def binary_of(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob(pattern))


def stands_in(file: Path, text: str) -> bool:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text.encode()) >= 0


def test_memory_that_is_not_there():
    with pytest.raises(RuntimeError) as caught:
        jnp.zeros(2**46).block_until_ready()
    assert is_out_of_memory(caught.value)
    assert memory_asked(str(caught.value)) == "Out of memory allocating 281,475.0 GB"
    assert is_transient(caught.value), "a checkpoint that memory does not hold is not damaged"
    assert memory_asked("RESOURCE_EXHAUSTED: Error writing d/ab: No space left on device") == ""


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.01G) exceeds", 20.01),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. Exceeded hbm capacity", 18.5),
        ("INVALID_ARGUMENT: Used 18.50G of nothing", 0),
    ],
)
def test_what_a_refused_step_would_take(message, gib):
    """As libtpu writes it, which is not among what the tests install."""
    assert hbm_asked(message) == pytest.approx(gib * 2**30)


@pytest.mark.parametrize("text", LOST_PROCESS)
def test_a_lost_process(text):
    """Gloo's and jax's own words are in jaxlib; those of the operating system change with no version."""
    system = text in (os.strerror(errno.ECONNRESET), os.strerror(errno.EPIPE))
    assert system or text == NCCL or stands_in(binary_of("jaxlib", "libjax_common.so"), text)
    assert is_lost_process(jax.errors.JaxRuntimeError(f"UNKNOWN: Gloo AllGather failed: {text}"))
    assert not is_lost_process(OSError(text))


def test_no_cluster():
    known = ("SLURM", "OMPI", "PMI", "TPU", "KUBERNETES", "CLOUD_TPU", "MEGASCALE", "JAX_COORD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(known)}
    code = "import jax; jax.distributed.initialize()"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert is_cluster_missing(ValueError(done.stderr.splitlines()[-1]))


def test_the_warning_of_kubernetes():
    assert jax_messages.KUBERNETES in inspect.getsource(k8s_cluster)


@pytest.mark.parametrize("code", TRANSIENT_CODES)
def test_status_codes(code):
    assert stands_in(binary_of("tensorstore", "_tensorstore*.so"), code)
    assert is_transient(ValueError(f'{code}: Error reading "step/.zarray"'))


def stored(folder: Path):
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/"}}
    tensorstore.open(spec, create=True, dtype=tensorstore.float32, shape=[64]).result().write(1.0).result()
    return spec


@pytest.mark.parametrize("damage", ["cut", "gone", "link"])
def test_damaged_files_are_not_taken_for_storage_that_fails(damage, tmp_path):
    spec = stored(tmp_path)
    file = tmp_path / "manifest.ocdbt"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:20])
    if damage == "link":
        file.symlink_to(file)
    with pytest.raises(ValueError) as caught:
        tensorstore.open(spec, open=True).result().read().result()
    expected = {"cut": "DATA_LOSS", "gone": "NOT_FOUND", "link": f"os_error_code='{errno.ELOOP}'"}[damage]
    assert expected in str(caught.value)
    assert not is_transient(caught.value)


def test_a_name_that_is_too_long_is_told_by_its_number(tmp_path):
    with pytest.raises(ValueError) as caught:
        tensorstore.KvStore.open(f"file://{tmp_path}/").result().read("x" * 300).result()
    assert f"os_error_code='{errno.ENAMETOOLONG}'" in str(caught.value)
    assert not is_transient(caught.value)


def async_serialize_from_host():
    async def write_fragment(): ...

    return write_fragment()


def test_what_python_says_of_arrays_that_a_failed_save_did_not_begin():
    with pytest.warns(RuntimeWarning) as warned:
        async_serialize_from_host()
    assert [is_after_failed_save(str(warning.message)) for warning in warned] == [True]
    assert is_after_failed_save(RuntimeError("Event loop is closed"))
    assert not is_after_failed_save("coroutine 'answer' was never awaited")
