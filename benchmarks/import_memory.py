"""Host memory that reading and converting a checkpoint takes beyond the arrays that come out.

`python -m benchmarks.import_memory [--folder=DIR]` writes a synthetic checkpoint of several GB in several files, reads it in
processes of its own and prints peak resident memory against the limit: 1.5x the largest file or 1.2x the largest stacked
parameter, whichever is more. Nothing is kept.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.table import Table

from deepstack_jax.config import Config, DecoderConfig, ImageConfig, VisionConfig
from deepstack_jax.families.base import TOWER
from deepstack_jax.families.forms import to_hf
from deepstack_jax.families.official import tower_to_hf
from deepstack_jax.families.processor import preprocessor_to_hf
from deepstack_jax.printing import Console
from deepstack_jax.weights.load import load_params, stored_leaves
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from deepstack_jax.weights.save import Out, save_checkpoint, write_safetensors, write_shards

DECODER = DecoderConfig(vocab_size=32000, width=2048, layers=24, heads=16, kv_heads=16, head_dim=128, mlp=8192)
VISION = VisionConfig(layers=6)
SHARD = 500_000_000
GB = 1e9

flags.DEFINE_string("folder", "", "Where the checkpoint is written; a temporary folder if empty.")
flags.DEFINE_string("measure", "", "Used by the benchmark itself: what one process measures.")


def write_checkpoint(folder: Path) -> None:
    """A DeepStack-L checkpoint in bfloat16 whose numbers mean nothing."""
    config = Config(decoder=DECODER, vision=VISION, image=ImageConfig())
    noise = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32).astype(ml_dtypes.bfloat16)
    outs = [Out(name, t.shape, lambda t=t: np.resize(noise, t.shape)) for name, t in NameTable(config).tensors.items()]
    (folder / "clip").mkdir(parents=True)
    write_shards(outs, folder, "bfloat16", SHARD, lambda nbytes: None)
    tower = [out._replace(name=out.name.removeprefix(TOWER)) for out in outs if out.name.startswith(TOWER)]
    write_safetensors(folder / "clip" / "model.safetensors", tower, "bfloat16", lambda nbytes: None)
    for file, values in (
        ("config.json", to_hf(config, dtype="bfloat16")),
        ("clip/config.json", tower_to_hf(config, dtype="bfloat16")),
        ("clip/preprocessor_config.json", preprocessor_to_hf(config)),
    ):
        (folder / file).write_text(json.dumps(values))


def measure(what: str, folder: Path) -> dict[str, float]:
    """In a fresh process: read (or convert) the checkpoint; bytes resident before, at the peak, and in the arrays."""
    checkpoint = open_checkpoint(folder)
    jax.device_put(np.zeros(8)).block_until_ready()
    before, began, held = resident("VmRSS"), time.perf_counter(), 0
    if what == "convert":
        leaves = stored_leaves(checkpoint.tensors, checkpoint.config)
        save_checkpoint(leaves, checkpoint.config, folder / "out", dtype="bfloat16")
    else:
        dtype, _, sharded = what.partition(",")
        shardings = over_devices(checkpoint.config) if sharded else None
        kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
        params = load_params(checkpoint.tensors, checkpoint.config, kind, shardings)
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    return {"seconds": time.perf_counter() - began, "before": before, "peak": resident("VmHWM"), "held": held}


def over_devices(config: Config) -> dict:
    """Every parameter split over all devices along its longest axis that divides."""
    devices = np.array(jax.devices())

    def place(shape: tuple[int, ...]) -> NamedSharding:
        axes = [axis for axis in range(1, len(shape)) if shape[axis] % len(devices) == 0]
        longest = max(axes, key=lambda axis: shape[axis], default=-1)
        spec = PartitionSpec(*("x" if axis == longest else None for axis in range(len(shape))))
        return NamedSharding(Mesh(devices, "x"), spec)

    places = {path: place(leaf.shape) for path, leaf in NameTable(config).leaves.items()}
    return traverse_util.unflatten_dict(places, sep="/")


def resident(key: str) -> int:
    """Bytes of this process now (VmRSS) or at most so far (VmHWM)."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def run(what: str, folder: Path) -> dict[str, float]:
    """`measure` in a process of its own, with eight simulated devices if it shards."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if "sharded" in what:
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "benchmarks.import_memory", f"--folder={folder}", f"--measure={what}"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(folder: Path, console: Console) -> None:
    """Write, measure, print."""
    write_checkpoint(folder)
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    leaves = NameTable(open_checkpoint(folder).config).leaves.values()
    stacked = max(int(np.prod(leaf.shape)) for leaf in leaves)
    title = (
        f"{sum(files) / GB:.2f} GB in {len(files)} files, largest {max(files) / GB:.2f}; largest parameter {stacked / 1e6:.0f}M"
    )
    table = Table("", "seconds", "arrays GB", "beyond GB", "limit GB", title=title)
    for what in ("bfloat16", "float32", "bfloat16,sharded", "float32,sharded", "convert"):
        got = run(what, folder)
        itemsize = 4 if what.startswith("float32") else 2
        limit = max(1.5 * max(files), 1.2 * stacked * itemsize)
        beyond = got["peak"] - got["before"] - got["held"]
        numbers = (got["seconds"], got["held"] / GB, beyond / GB, limit / GB)
        table.add_row(what, *(f"{number:.2f}" for number in numbers))
    console.print(table)


def main(_: list[str]) -> None:
    folder, what = flags.FLAGS["folder"].value, flags.FLAGS["measure"].value
    if what:
        print(json.dumps(measure(str(what), Path(str(folder)))))
        return
    with tempfile.TemporaryDirectory(dir=folder or None) as scratch:
        report(Path(scratch) / "checkpoint", Console(width=110))


if __name__ == "__main__":
    app.run(main)
