"""Two floors of each part of the 7B step, FLOPs over peak and bytes over bandwidth, into docs/performance.md.

`python -m benchmarks.floors` counts from the configuration and the program's shapes; nothing runs, nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import runpy
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.plan_table import write_section
from deepstack_jax.config import Config, MeshConfig, build_config
from deepstack_jax.parallel.chips import CHIPS, Chip
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.plan.memory import bytes_per_device
from deepstack_jax.plan.topology import simulated_devices
from deepstack_jax.train.core.optimizer import FROZEN, split
from deepstack_jax.train.core.program import Program, build_program
from deepstack_jax.train.flops import product_flops
from deepstack_jax.weights.names import NameTable

REPOSITORY = Path(__file__).parents[1]
OUTPUT = REPOSITORY / "docs" / "performance.md"
# (heading, kind of chip, devices along fsdp, micro-batches): as `plan --search` chose them for the 7B recipe.
MACHINES = (("8 H100", "NVIDIA H100 80GB HBM3", 8, 2), ("v5p:4x4x4", "TPU v5", 64, 1))
NARROW, WIDE = 2, 4  # bytes of bfloat16 and float32
# A part of the table, by what the path of a kernel of the decoder's layers holds.
OF_LAYERS = {"attention/q/": "qkv", "attention/k/": "qkv", "attention/v/": "qkv", "attention/o/": "attention output"}


@dataclasses.dataclass
class Cost:
    """What one device does of a part in one step."""

    flops: float = 0.0  # model FLOPs
    executed: float = 0.0  # with what the program computes again, and of masks
    moved: float = 0.0  # bytes: what every product reads and writes once, all that is between products fused


def part_of(kernel: str, name: str) -> str:
    """The part of the table that a product belongs to."""
    if name == "decoder":
        return next((part for words, part in OF_LAYERS.items() if words in kernel), "mlp")
    return "head and loss" if name == "head" else name


def costs(program: Program, rows: int, length: int) -> dict[str, Cost]:
    """Costs by part, on each device, attention's masked scores left out."""
    parts: dict[str, Cost] = defaultdict(Cost)
    for kernel, flops in product_flops(program.config, program.groups, rows, length, masked=False):
        cost = parts[part_of(kernel, flops.name)]
        cost.flops += flops.model / program.mesh.size
        cost.executed += flops.executed / program.mesh.size
        cost.moved += moved(program, kernel, flops.name, flops.forward, flops.backward, rows, length)
    trained, _ = split(program.abstract_state().params, program.groups)
    moments = bytes_per_device(program.abstract_state().opt_state)
    # The gradient and its parameter are read, the parameter written, and the moments both.
    parts["optimizer"] = Cost(moved=3 * bytes_per_device(trained) + 2 * moments)
    return parts


def moved(program: Program, kernel: str, name: str, forward: float, backward: float, rows: int, length: int) -> float:
    """Bytes to and from a device's memory of one product, forward and backward.

    A product reads its input and its kernel in bfloat16 and writes its result; its backward pass reads the result's gradient
    for each of the two products, with the kernel for one and the input for the other, and writes the gradients, that of the
    kernel in float32. The loss writes no logits. Kernels are whole on every device, once for every micro-batch.
    """
    devices, parts = program.mesh.size, program.config.train.accumulation
    if not kernel:
        return attention_moved(program.config, name, rows * length / devices, rows / devices) * (3 if backward else 1)
    leaf = NameTable(program.config).leaves[kernel]
    sizes = leaf.layer_shape
    inputs = outputs = 1
    for at, size in enumerate(sizes):
        inputs, outputs = (inputs * size, outputs) if at < leaf.inputs else (inputs, outputs * size)
    if name == "head" and program.config.decoder.tied_head:
        inputs, outputs = outputs, inputs
    tokens = forward / (2 * inputs * outputs) / devices  # times the layers
    kernels = program.sizes[kernel] * parts
    kept = tokens * (inputs + (0 if name == "head" else outputs))
    bytes_moved = NARROW * (kept + kernels)
    products = round(backward / forward)
    trains = program.groups[kernel] != FROZEN
    if products - trains:
        bytes_moved += NARROW * (kept + kernels)
    if trains:
        bytes_moved += NARROW * kept + WIDE * kernels
    return bytes_moved


def attention_moved(config: Config, name: str, tokens: float, rows: float) -> float:
    """Of one pass of attention, scores never written: queries, keys and values in, what it says out."""
    if name == "tower":
        layers, width = config.deepstack.tower_layers(config.vision), config.vision.width
        return NARROW * rows * config.data_spec.crop_slots * config.patch_side**2 * layers * 4 * width
    cfg = config.decoder
    return NARROW * tokens * cfg.layers * cfg.head_dim * 2 * (cfg.heads + cfg.kv_heads)


def table(chip: Chip, parts: dict[str, Cost]) -> Iterator[str]:
    """The lines of one machine."""
    yield "| part | model TFLOPs | FLOPs floor, ms | bytes, GB | bytes floor, ms | FLOPs done / model |"
    yield "|---|---|---|---|---|---|"
    total, least = Cost(), 0.0
    for name, cost in parts.items():
        yield line(chip, name, cost)
        total = Cost(total.flops + cost.flops, total.executed + cost.executed, total.moved + cost.moved)
        least += max(cost.flops / chip.flops, cost.moved / chip.hbm_bandwidth)
    yield line(chip, "all", total)
    yield ""
    yield f"The larger floor of every part, added up: {least * 1e3:.0f} ms, {total.flops / chip.flops / least:.0%} MFU."


def line(chip: Chip, name: str, cost: Cost) -> str:
    again = f"{cost.executed / cost.flops:.2f}" if cost.flops else "-"
    times = cost.flops / chip.flops * 1e3, cost.moved / chip.hbm_bandwidth * 1e3
    return f"| {name} | {cost.flops / 1e12:.1f} | {times[0]:.1f} | {cost.moved / 1e9:.1f} | {times[1]:.1f} | {again} |"


def program_on(devices: int, accumulation: int) -> Program:
    """The paper's DeepStack-L 7B, cut along fsdp over simulated devices."""
    config = build_config(runpy.run_path(str(REPOSITORY / "configs" / "llava15.py"))["get_config"]("finetune"))
    train = dataclasses.replace(config.train, accumulation=accumulation)
    config = dataclasses.replace(config, train=train, mesh=MeshConfig(data=1, fsdp=devices))
    return build_program(config, make_mesh(config.mesh, simulated_devices(devices)), steps=100)


def text() -> str:
    """The tables of all machines."""
    simulated_devices(max(devices for _, _, devices, _ in MACHINES))
    lines = []
    for heading, kind, devices, accumulation in MACHINES:
        program = program_on(devices, accumulation)
        rows, length = program.config.train.batch_size, program.config.data.max_length
        chip = CHIPS[kind]
        lines.append(
            f"**{heading}**, {rows} rows of {length} over fsdp {devices}, micro-batches {accumulation}, remat "
            f"`{program.config.decoder.remat}`; {chip.flops / 1e12:g} TFLOP/s, {chip.hbm_bandwidth / 1e12:g} TB/s:"
        )
        lines += ["", *table(chip, costs(program, rows, length)), ""]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    write_section("floors", text(), OUTPUT)
