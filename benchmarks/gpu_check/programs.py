"""The programs and batches that the stages run: the package's own, cut in depth to what fits, on synthetic packed rows."""

from __future__ import annotations

import dataclasses
import importlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_check.sizes import Size
from deepstack_jax.batch import Batch
from deepstack_jax.config import Config, build_config
from deepstack_jax.data.encode.batch_rows import EncodedExample, ExampleSize, fill
from deepstack_jax.data.encode.labels import IMAGE_TOKEN
from deepstack_jax.data.order.packing import RowCapacity, pack
from deepstack_jax.errors import ConfigError
from deepstack_jax.model.decoder import REMAT
from deepstack_jax.parallel.kernels import Kernels
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.plan.planner import assemble_plan
from deepstack_jax.plan.report import Load, Plan
from deepstack_jax.plan.topology import Machine
from deepstack_jax.train.core.optimizer import unflatten
from deepstack_jax.train.core.program import Program, build_program
from deepstack_jax.types import TrainState
from deepstack_jax.weights.names import NameTable, to_ours

# The fastest first, each with as many layers as then fit: by `plan`'s estimate for an H100 778, 666 and 647 model TFLOP/s with
# 11, 14 and 15 layers. Which of them there are, says the package.
POLICIES = ("dots", "minimal", "block")
SHARE = 0.8  # of the usable memory that a plan may take: PyTorch has to run the same layers beside its own ways
PROBED = 6  # layers, the fewest into which all groups of the stack are injected, and one more
EXAMPLES = 400  # that wait to be packed
WORDS = 3  # ids below are special


def config_of(size: Size, changes: dict[str, Any]) -> Config:
    """`configs/llava15.py:finetune` on one device, packed, on drawn weights."""
    config = importlib.import_module("configs.llava15").get_config(size.words)
    config.update_from_flattened_dict(
        {
            "data.packing.enabled": True,
            "data.max_length": size.length,
            "train.weights": "",
            "train.tower": "",
            "train.projector": "",
            "train.batch_size": 16 * size.rows,  # examples; the batch itself is made here
            "optimizer.schedule.warmup": 0.0,  # or the first steps would change nothing
            "mesh.fsdp": 1,
            **changes,
        }
    )
    return build_config(config)


def build(config: Config, kernels: Kernels | None = None) -> Program:
    """Its program on the first device, with the attention that the device has or with another."""
    return build_program(config, make_mesh(config.mesh, jax.devices()[:1]), 10**6, kernels)


def lengths(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(text tokens i64[count] of examples of a mixture like LLaVA's 665k, whether each has an image)."""
    rng = np.random.default_rng(seed)
    kinds = (
        (0.24, rng.normal(280, 110, count).clip(60, 700)),  # pages, transcribed
        (0.50, rng.gamma(3, 40, count).clip(40, 900)),  # several questions
        (0.20, rng.integers(45, 80, count)),  # one word answered
        (0.06, np.exp(rng.normal(6.6, 0.8, count)).clip(30, 1400)),  # dialogues without an image
    )
    kind = rng.choice(len(kinds), count, p=[share for share, _ in kinds])
    return np.choose(kind, [tokens for _, tokens in kinds]).astype(int), kind < len(kinds) - 1


def packed_batch(config: Config, rows: int) -> Batch:
    """Examples of such lengths, packed as a run would, from a window in the middle of an epoch; random words and pixels.

    Tiny rows get texts that are shorter in proportion.
    """
    spec, layout, rng = config.data_spec, config.layout, np.random.default_rng(1)
    tokens, has_image = lengths(EXAMPLES)
    if config.data.max_length < 2048:
        tokens = np.maximum(8, tokens * config.data.max_length // 2048)
    weights = [grid[0] * grid[1] for grid in layout.grids]  # most images take many crops
    grids = (
        [layout.grids[at] for at in rng.choice(len(weights), EXAMPLES, p=np.array(weights) / sum(weights))]
        if weights
        else [None] * EXAMPLES
    )
    sizes = np.zeros((EXAMPLES, 3), np.int32)
    for at, grid in enumerate(grids):
        visual, views = (layout.token_count(grid), layout.views(grid)) if has_image[at] else (0, 0)
        sizes[at] = tokens[at] + visual, views, visual
    packs = pack(np.arange(EXAMPLES), sizes, RowCapacity.of(spec), spec.data.packing.window)
    first = min(len(packs) // 4, len(packs) - rows)
    chosen = [packs[first + row] for row in range(rows)]

    def made(at: int) -> EncodedExample:
        ids = rng.integers(WORDS, config.decoder.vocab_size, tokens[at] + int(has_image[at]))
        asked = len(ids) // 3
        grid, size = grids[at], config.image.size
        images = [layout.layout(grid, (640, 480))] if has_image[at] else []
        if images:
            ids[1] = IMAGE_TOKEN
        pixels = tuple(rng.integers(0, 256, (one.views, size, size, 3), np.uint8) for one in images)
        return EncodedExample(at, ids.astype(np.int32), np.arange(len(ids)) >= asked, pixels, tuple(images))

    shape = spec.batch_shape(rows, config.data.max_length)
    return fill(shape, [[(made(at), ExampleSize()) for at in row] for row in chosen], layout.patches).batch


def planned(program: Program, machine: Machine, rows: int) -> Plan:
    """What `plan` estimates of it, in seconds, without compiling."""
    load = Load(rows, program.config.data.max_length, float(rows), 0, "")
    return assemble_plan(program, machine, load, None)


def fitting(size: Size, changes: dict[str, Any], machine: Machine, rows: int) -> Config:
    """As many layers as fit, under the first policy that there is: estimates of two depths say how many."""

    def at(layers: int) -> Config:
        return config_of(size, {"decoder.remat": policies()[0], "decoder.layers": layers, **changes})

    if not machine.usable:
        return at(size.layers)
    first, second = (planned(build(at(layers)), machine, rows).used for layers in (PROBED, PROBED + 2))
    layers = int(PROBED + (SHARE * machine.usable - first) / ((second - first) / 2))
    if layers < PROBED:
        raise ConfigError(f"{PROBED} layers of this width need {first / 2**30:.0f} GiB; take a larger GPU")
    return at(min(layers, size.layers))


def policies() -> list[str]:
    """Those of POLICIES that the package has."""
    return [policy for policy in POLICIES if policy in REMAT]


def with_decoder(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **changes))


def seed_of(name: str) -> int:
    """A number for every tensor's name."""
    return zlib.crc32(name.encode())


def kind_of(name: str) -> str:
    """How a tensor is made: kernels and embeddings of hashed numbers, norms of ones, biases of zeros."""
    if name.endswith(".bias"):
        return "zeros"
    return "ones" if "norm" in name.rsplit(".", 2)[-2] or "layrnorm" in name else "hashed"


SPREAD = 0.07  # of the hashed numbers, evenly in [-0.035, 0.035): a standard deviation of 0.02


def hashed(seed: jax.Array, count: int) -> jax.Array:
    """f32[count], the same to the bit as `torch_step.hashed`: integers are mixed, and what comes of them is scaled exactly."""
    mixed = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(2654435761) + seed
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(2246822507)
    mixed = mixed ^ (mixed >> 13)
    return ((mixed >> 8).astype(jnp.float32) * 2.0**-24 - 0.5) * np.float32(SPREAD)


def made_state(program: Program) -> TrainState:
    """The state before the first step, its parameters a function of the tensors' official names, which PyTorch makes too."""
    table = NameTable(program.config)

    def parameter(path: str) -> jax.Array:
        leaf = table.leaves[path]
        shape = table.tensors[leaf.pieces[0].name].shape
        rows = leaf.pieces[0].stop - leaf.pieces[0].start
        whole = int(np.prod(shape))
        kinds = {kind_of(piece.name) for piece in leaf.pieces}
        if kinds != {"hashed"}:
            return jnp.full(leaf.shape, kinds == {"ones"}, jnp.float32)

        def one(seed: jax.Array, start: jax.Array) -> jax.Array:
            tensor = hashed(seed, whole).reshape(shape)
            part = jax.lax.dynamic_slice_in_dim(tensor, start, rows)
            return to_ours(part, leaf.layout, leaf.layer_shape)  # pyright: ignore[reportArgumentType, reportReturnType]

        seeds = jnp.asarray([seed_of(piece.name) for piece in leaf.pieces], jnp.uint32)
        starts = jnp.asarray([piece.start for piece in leaf.pieces], jnp.int32)
        layers = jax.lax.map(lambda given: one(*given), (seeds, starts))
        return layers if leaf.stacked else layers[0]

    def begin() -> TrainState:
        return program.begin(unflatten({path: parameter(path) for path in table.leaves}))

    return jax.jit(begin, out_shardings=program.shardings)()
