"""The stages, most valuable first, and the one budget that they share. Imports nothing heavy: the parent process reads it."""

from __future__ import annotations

from dataclasses import dataclass

BUDGET = 540  # seconds of one call, the most that all stages may take together
EXIT_ABSENT = 3  # of a stage that cannot run here, which is no failure


@dataclass(frozen=True)
class Stage:
    """One question, answered in a process of its own."""

    name: str
    part: str  # of the check's parts (a) to (g)
    function: str  # MODULE:FUNCTION, called with a Record
    expected: int  # seconds on an H100, as far as can be told beforehand
    limit: int  # seconds after which it is ended; figures that it had by then stay
    what: str
    platforms: str = ""  # JAX_PLATFORMS of its process; empty = as the machine has it
    peer: bool = False  # of PyTorch, whose version counts


STAGES = (
    Stage("kernels", "a", "attention:compare", 45, 90, "attention kernels against the portable one: values and gradients"),
    Stage("step", "b", "step:full", 55, 200, "the packed step at 7B width: s, tokens/s, samples/s, MFU; the best plain matmul"),
    Stage(
        "torch",
        "c",
        "torch_step:run",
        90,
        150,
        "the same arithmetic in PyTorch, eager and compiled; losses compared",
        "cpu",
        peer=True,
    ),
    Stage("memory", "d", "memory:against_plan", 10, 40, "peak memory of the step against `plan`", "cpu"),
    Stage("injection", "e", "step:injection", 50, 110, "the step with the stack injected and without"),
    Stage("string", "e", "step:string", 40, 110, "DeepStack-L against the 2880 tokens as a string, samples/s"),
    Stage("decode", "f", "decode:ours", 45, 110, "decoding at batch 1, 8, 64 against the bandwidth of the memory"),
    Stage("generate", "f", "decode:theirs", 35, 80, "the same batches by transformers' generate", "cpu", peer=True),
    Stage("profile", "g", "profile:run", 20, 70, "where the step's time goes, by kind of kernel and by kernel"),
    Stage("tests", "a", "attention:tests", 35, 120, "of tests/distributed/test_kernels.py, those of a GPU", "cpu,cuda"),
    Stage("lora", "e", "step:lora", 40, 110, "LoRA against full fine-tuning"),
    Stage("fp8", "e", "step:fp8", 40, 110, "FP8 matrix products against bfloat16"),
    Stage("block", "b", "step:block", 35, 90, "the step with the recipes' remat policy, `block`"),
)
NAMES = tuple(stage.name for stage in STAGES)


def listing() -> str:
    """The stages with their budgets, as a table for a terminal."""
    lines = [f"{'stage':<10} {'part':<5} {'s':>4} {'limit':>6}  what"]
    lines += [f"{one.name:<10} ({one.part})  {one.expected:>4} {one.limit:>6}  {one.what}" for one in STAGES]
    total = sum(stage.expected for stage in STAGES)
    lines.append(
        f"{'all':<10} {'':<5} {total:>4} {BUDGET:>6}  of one call; what is left over goes on where the same call is made again"
    )
    return "\n".join(lines)
