"""Tests run on the CPU, with eight simulated devices, a kept compilation cache, and axis annotations checked at run time."""

import gc
import os

from tests import QUICK_COMPILATION

if not os.environ.get("JAX_PLATFORMS", "").startswith("cpu,"):  # cpu,cuda: the few tests that ask for a GPU find it
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILATION} --xla_force_host_platform_device_count=8"
# Each simulated device waits in a collective with a thread of XLA's pool. On a machine with fewer cores than devices the pool
# can be full of waiting ones, and XLA ends the process after 40 seconds. NPROC is how XLA is told the size of the pool.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).parents[1]
jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_default_matmul_precision", "highest")
# Many small programs, each run once or twice: XLA's optimizations would cost more than they save.
jax.config.update("jax_disable_most_optimizations", True)

# `make fuzz`: other draws in every run, and many of them.
settings.register_profile("fuzz", max_examples=5_000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))


def pytest_collection_finish():
    """What is imported and collected stays to the end: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def optimized():
    """For tests that look at what XLA makes of a program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
