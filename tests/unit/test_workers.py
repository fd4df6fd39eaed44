"""The shared memory of worker processes: looked at before a run begins, named where it or a worker gave out."""

import errno
import os
import subprocess
import sys
from collections import namedtuple

import pytest

from deepstack_jax.config import DataConfig, build_config, default_config
from deepstack_jax.data import workers
from deepstack_jax.data.example import SourceError
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.data.workers import check_shared_memory, worker_failure
from deepstack_jax.errors import ConfigError

Usage = namedtuple("Usage", "free")


def free(monkeypatch, count):
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: {"/dev/shm": Usage(count)}[path])


def test_all_batches_on_their_way_must_fit(monkeypatch):
    data = DataConfig(workers=2, prefetch=4)  # per worker two in its queue and one in hand, and two in use
    free(monkeypatch, 8_000_000)
    check_shared_memory(data, 1_000_000)
    with pytest.raises(
        ConfigError,
        match=r"/dev/shm has 8\.0 MB free; .*config\.data\.workers=2 .* 1\.1 MB each, take 8\.8 MB.*shm-size.*workers=0",
    ):
        check_shared_memory(data, 1_100_000)
    check_shared_memory(DataConfig(workers=0), 1 << 40)


def test_a_system_without_that_folder_is_not_asked(monkeypatch):
    monkeypatch.setattr(workers, "SHARED_MEMORY", "/no/such/folder")
    check_shared_memory(DataConfig(workers=2), 1 << 40)


def test_a_run_is_refused_before_anything_is_compiled(monkeypatch):
    free(monkeypatch, 1000)
    config = default_config()
    config.update({"data": {"source": "pages", "workers": 1}})
    with pytest.raises(ConfigError, match=r"/dev/shm has 0\.0 MB free"):
        TrainingStream(range(10), build_config(config).data_spec)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code -7. Search"),
            "/dev/shm, .* is full; give it more",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), r"/dev/shm, .* config\.data\.workers=0, which needs none"),
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search"),
            "killed, perhaps for want of memory",
        ),
        (RuntimeError("Worker process was terminated unexpectedly with exit code 3. Search"), "exit code 3; its own output"),
    ],
)
def test_why_workers_were_lost(error, said, monkeypatch):
    stream = object.__new__(TrainingStream)
    stream._iterator = None

    def fail(*_):
        raise error

    stream._next = 0
    monkeypatch.setattr(TrainingStream, "_dataset", fail)
    with pytest.raises(SourceError, match=said):
        next(stream)


SLOWLY_FREED = """
import time
from multiprocessing.shared_memory import SharedMemory
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.data.workers import free_shared_memory
from tests.unit.test_pipeline import SOURCE, make_config

stream = TrainingStream(SOURCE, make_config("padded", data__workers=1).data_spec)
batch = next(stream)
unlink = SharedMemory.unlink
SharedMemory.unlink = lambda memory: (time.sleep(0.05), unlink(memory))
batch = [batch]
batch.append(batch)  # a cycle, as jax makes them: only a collection of garbage ends it
del batch
stream.close()
free_shared_memory()

"""


def test_no_shared_memory_outlives_the_last_batch():
    """Python's resource tracker would warn of leaked objects after the last line that a run prints."""
    done = subprocess.run(
        [sys.executable, "-c", SLOWLY_FREED], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_other_errors_stay_what_they_are():
    assert worker_failure(OSError(errno.ENOSPC, "No space left on device", "runs/a/config.json")) == ""
    assert worker_failure(RuntimeError("a defect")) == ""
