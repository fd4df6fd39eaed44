"""Training steps of the package, timed: the packed step itself, and beside it what one choice costs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_check import CASES
from benchmarks.attention_check import TINY as KERNELS_TINY
from benchmarks.gpu_check.programs import (
    PROBED,
    SHARE,
    build,
    config_of,
    fitting,
    made_state,
    packed_batch,
    planned,
    with_decoder,
)
from benchmarks.gpu_check.record import Record, target
from deepstack_jax.batch import Batch
from deepstack_jax.config import Config, build_config, to_dict
from deepstack_jax.parallel.chips import CHIPS
from deepstack_jax.parallel.distributed import put_batch
from deepstack_jax.parallel.kernels import Kernels, kernels_for
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.plan.topology import open_machine
from deepstack_jax.train.core.program import Program
from deepstack_jax.train.flops import step_flops

CHECKED = 3  # steps whose losses are compared
WARM = 2  # more steps that are not timed
MATMULS = 20  # of the plain product, in one program
MFU, OVER_STRING, INJECTION = 0.55, 2.0, 1.03  # to reach
FP8 = 700.0  # model TFLOP/s to reach, of an H100
# Attention that is taken in turn where the device's own does not run: told of segments by a mask, then XLA's.
FALLBACKS = (Kernels("cudnn_mask", "cudnn"), Kernels("xla", "xla"))


def full(record: Record) -> None:
    """The step by the fastest remat policy that there is; the best plain product before it."""
    measure_fitting(record, plain_matmul(record))


def block(record: Record) -> None:
    """The step by the recipes' own remat policy."""
    peak = record.figures_of("step", "plain product")["TFLOP/s"] * 1e12

    def run(record: Record, config: Config) -> None:
        measure(record, "remat block", with_decoder(config, remat="block"), peak)

    with_fewer(record, run)


def measure_fitting(record: Record, peak: float) -> Config:
    """Measure the step with as many layers as fit: fewer where `plan` took it for smaller than it is.

    Where the device's own attention does not run, or the losses are no numbers, another one is taken, as the figures say; what
    stage `kernels` saw fail is not tried at all.
    """
    config = fitting(record.size, {}, open_machine("here"), record.size.rows)
    own = kernels_for(jax.devices()[0].platform, config)
    seen, first = record.earlier.get("kernels", {}), (KERNELS_TINY if record.size.name == "tiny" else CASES)[0].name
    refused = seen and "refused" in seen.get(first, {"refused": "it ended the process"})
    tried = list(
        record.earlier.get("step", {}).get("tried", {}).get("kernels", ())
    )  # by a process that did not come to its end
    kernels = [one for one in (*(() if refused else (own,)), *FALLBACKS) if one.decoder not in tried] or [FALLBACKS[-1]]
    while True:
        try:
            tried.append(kernels[0].decoder)
            record.add("tried", {"kernels": tried})
            measure(record, "step", config, peak, kernels=kernels[0])
            return config
        except Exception as error:  # of whatever kind, as kernels are called by functions that jax keeps to itself
            if not is_of_memory(error) and len(kernels) > 1:
                print(f"  {kernels[0].decoder} does not run: {_line(error)}", flush=True)
                kernels = kernels[1:]
            else:
                config = fewer(record, config, error)


def fewer(record: Record, config: Config, error: Exception) -> Config:
    """The same with fewer layers, where the error is that they do not fit; else the error again."""
    layers = max(PROBED, int(SHARE * config.decoder.layers))
    if not is_of_memory(error) or layers >= config.decoder.layers:
        raise error
    print(f"  {config.decoder.layers} layers do not fit: {_line(error)}", flush=True)
    return config_of(record.size, {"decoder.layers": layers, "decoder.remat": config.decoder.remat})


def is_of_memory(error: Exception) -> bool:
    """Whether the device's memory was too small."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _line(error: Exception) -> str:
    return f"{type(error).__name__} {error}".splitlines()[0][:160]


def with_fewer(record: Record, run: Callable[[Record, Config], Any]) -> None:
    """`run` with the configuration that stage `step` measured, and with fewer layers where that does not fit."""
    config = as_in_step(record)
    while True:
        try:
            run(record, config)
            return
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            config = fewer(record, config, error)


def whole_step(record: Record, config: Config) -> dict[str, Any]:
    """What the step of so many layers took: stage `step` knows, but where they had to be fewer since."""
    found = record.figures_of("step", "step")
    layers = config.decoder.layers
    return found if found["layers"] == layers else measure(record, f"step of {layers} layers", config)


def injection(record: Record) -> None:
    """The same batch and parameters, with all groups injected and with none: the tower sees the same crops in both."""
    with_fewer(record, _injection)


def _injection(record: Record, config: Config) -> None:
    off = dataclasses.replace(config, deepstack=dataclasses.replace(config.deepstack, schedule=(-1,) * config.decoder.layers))
    runs = {"on": measure(record, "on", config), "off": measure(record, "off", off)}
    added = runs["on"]["s/step"] - runs["off"]["s/step"]
    layers = config.decoder.layers
    # What is injected costs the same at any depth: beside 32 layers it is so much less.
    per_layer = runs["off"]["s/step"] * runs["off"]["decoder share"] / layers
    whole = runs["off"]["s/step"] + (32 - layers) * per_layer
    record.add(
        "injection", {"added, s": added, "on / off here": 1 + added / runs["off"]["s/step"], "at 32 layers": 1 + added / whole}
    )
    record.add("goal: injection, on / off at 32 layers", target(1 + added / whole, INJECTION, at_most=True))


def string(record: Record) -> None:
    """DeepStack-L beside a LLaVA that reads all 2880 visual tokens of an image in its sequence, by examples per second."""
    with_fewer(record, _string)


def _string(record: Record, config: Config) -> None:
    rows, length = record.size.string
    changes = {"deepstack.sequence": "global_crops", "deepstack.stack": "none", "data.max_length": length}
    longer = config_of(record.size, {**changes, "decoder.layers": config.decoder.layers, "decoder.remat": config.decoder.remat})
    theirs = measure(record, "string", longer, rows=rows)["samples/s"]
    record.add("goal: L / string, samples/s", target(whole_step(record, config)["samples/s"] / theirs, OVER_STRING))


def lora(record: Record) -> None:
    """Adapters of rank 64 in every map of the decoder over a bfloat16 base, beside training it all."""
    with_fewer(record, _lora)


def _lora(record: Record, config: Config) -> None:
    values = to_dict(config)
    values["optimizer"]["table"] = (
        (r"^layers/.*/kernel$", "lora"),
        (r"^projector/", "projector"),
        (r"^(vision_tower|embed|layers|head)/", "frozen"),
    )
    group = values["optimizer"]["groups"]["language"]
    values["optimizer"]["groups"] = {"lora": group | {"lora": True}, "projector": group}
    found = measure(record, "lora", build_config(values), drawn=True)
    whole = whole_step(record, config)
    record.add(
        "lora / full",
        {"s/step": found["s/step"] / whole["s/step"], "peak memory": _ratio(found["peak, GiB"], whole["peak, GiB"])},
    )


def fp8(record: Record) -> None:
    """The step with `train.matmul=fp8` beside the same in bfloat16."""
    with_fewer(record, _fp8)


def _fp8(record: Record, config: Config) -> None:
    values = to_dict(config)
    values["train"]["matmul"] = "fp8"
    found, whole = measure(record, "fp8", build_config(values)), whole_step(record, config)
    apart = max(abs(a - b) for a, b in zip(found["losses"], whole["losses"], strict=True))
    record.add("bf16 / fp8", {"s/step": whole["s/step"] / found["s/step"], "losses differ by": apart})
    record.add("goal: fp8, model TFLOP/s", target(found["TFLOP/s"], FP8))


def as_in_step(record: Record) -> Config:
    """The configuration that stage `step` measured."""
    found = record.figures_of("step", "step")
    return config_of(record.size, {"decoder.layers": found["layers"], "decoder.remat": found["remat"]})


def kernels_in_step(record: Record) -> Kernels | None:
    """The attention with which stage `step` ran, None before it has."""
    found = record.earlier.get("step", {}).get("step")
    return Kernels(found["kernel"], found["tower kernel"]) if found else None


def measure(
    record: Record,
    name: str,
    config: Config,
    peak: float = 0.0,
    rows: int = 0,
    *,
    kernels: Kernels | None = None,
    drawn: bool = False,
    then: Callable[[Callable[[], Any]], None] | None = None,
) -> dict[str, Any]:
    """Compile the step, run it on one packed batch, and record what it took.

    Args:
      peak: FLOP/s of the best plain product, 0 = not measured.
      rows: of the batch, 0 = the size's own.
      kernels: of attention, None = those of stage `step`.
      drawn: parameters are drawn as a run draws them, not made from their names.
      then: is given the step, to run it more.

    Raises:
      MemoryError: the compiled step asks for more than the device has, said before it is run.
      FloatingPointError: its losses are not finite.
    """
    rows = rows or record.size.rows
    program, batch = build(config, kernels or kernels_in_step(record)), packed_batch(config, rows)
    with use_mesh(program.mesh):
        placed = put_batch(program.mesh, batch)
        began = time.perf_counter()
        compiled = (
            program.jit_step().lower(program.abstract_state(), program.abstract_batch(rows, config.data.max_length)).compile()
        )
        compiling = time.perf_counter() - began
        needed, usable = compiled_memory(compiled), open_machine("here").usable
        if usable and needed > usable:
            raise MemoryError(f"the compiled step asks for {needed / 2**30:.1f} GiB of {usable / 2**30:.1f}")
        state = (
            jax.jit(lambda key: program.begin(program.draw(key)), out_shardings=program.shardings)(jax.random.key(0))
            if drawn
            else made_state(program)
        )
        held = [state]
        del state
        before = _peak()

        def step() -> Any:
            held[0], metrics = compiled(held[0], placed)
            return jax.block_until_ready(metrics)

        losses = [float(step()["loss"]) for _ in range(CHECKED)]
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"losses {losses}")
        for _ in range(WARM):
            step()
        seconds = timed(step, record.size.repeats)
        squares = float(step()["segment_squares"])
        figures = describe(program, batch, seconds, squares, peak)
        after = _peak()
        figures |= {
            "losses": losses,
            # The count is of the process's life: where it did not grow, the step's own is not known.
            "peak, GiB": after / 2**30 if after > before else None,
            "compiler says, GiB": needed / 2**30,
            "plan says, GiB": planned(program, open_machine("here"), rows).used / 2**30,
            "compiled in, s": compiling,
        }
        record.add(name, figures)
        if peak and figures["MFU"] is not None:
            record.add(f"goal: {name}, MFU", target(figures["MFU"], MFU))
        if then:
            then(step)
    return figures


def describe(program: Program, batch: Batch, seconds: list[float], squares: float, peak: float) -> dict[str, Any]:
    """What a step of so many seconds does: of every position and crop slot, filled or not, as `train/flops.py` counts."""
    config, taken = program.config, float(np.median(seconds))
    rows, length = batch.tokens.shape
    flops = step_flops(config, program.groups, rows, length, squares=squares)
    chip = CHIPS.get(jax.devices()[0].device_kind)
    examples = int((batch.example_id >= 0).sum())
    return {
        "s/step": taken,
        "tokens/s": float((batch.segment_ids > 0).sum()) / taken,
        "samples/s": examples / taken,
        "TFLOP/s": flops.model / taken / 1e12,
        "MFU": flops.model / taken / chip.flops if chip else None,
        "of the best product": flops.model / taken / peak if peak else None,
        "layers": config.decoder.layers,
        "rows": rows,
        "length": length,
        "examples": examples,
        "useful positions": float((batch.segment_ids > 0).mean()),
        "remat": config.decoder.remat,
        "kernel": program.kernels.decoder,
        "tower kernel": program.kernels.tower,
        "decoder share": sum(part.model for part in flops.parts if part.name in ("decoder", "attention")) / flops.model,
        "model TFLOPs": {part.name: part.model / 1e12 for part in flops.parts},
        "seconds": seconds,
    }


def plain_matmul(record: Record) -> float:
    """FLOP/s of large bfloat16 products, each of the last one's result."""
    side = record.size.square
    a, b = (jnp.asarray(np.random.default_rng(seed).normal(0, side**-0.5, (side, side)), jnp.bfloat16) for seed in (0, 1))
    run = jax.jit(lambda a, b: jax.lax.fori_loop(0, MATMULS, lambda _, x: x @ b, a))
    jax.block_until_ready(run(a, b))
    seconds = timed(lambda: jax.block_until_ready(run(a, b)), 5)
    best = 2.0 * side**3 * MATMULS / min(seconds)
    chip = CHIPS.get(jax.devices()[0].device_kind)
    record.add(
        "plain product", {"TFLOP/s": best / 1e12, "of the data sheet": best / chip.flops if chip else None, "seconds": seconds}
    )
    return best


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of every call; each ends when the device is done."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds


def compiled_memory(compiled: Any) -> int:
    """Bytes that the compiler says the program takes: arguments, results that reuse none of them, temporaries and code."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def _peak() -> int:
    """Bytes that this process had in use at once so far, 0 where the device keeps no count."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None
