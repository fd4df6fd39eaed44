"""What the step took of the device's memory, against what `plan` says of it."""

from __future__ import annotations

from benchmarks.gpu_check.record import AbsentError, Record, target

APART = 0.10  # planned and seen may be so far apart


def against_plan(record: Record) -> None:
    """Of every step that was measured so far."""
    seen = 0
    for stage, figures in record.earlier.items():
        for name, one in figures.items():
            if not isinstance(one, dict) or "plan says, GiB" not in one or not one["peak, GiB"]:
                continue
            seen += 1
            peak = one["peak, GiB"]
            ratios = {who: one[f"{who} says, GiB"] / peak for who in ("plan", "compiler")}
            record.add(f"{stage}: {name}", {"peak, GiB": peak, **{f"{who} / peak": ratio for who, ratio in ratios.items()}})
            if (stage, name) == ("step", "step"):
                # The larger distance above or below counts.
                record.add("goal: plan / peak, off by", target(abs(ratios["plan"] - 1), APART, at_most=True))
    if not seen:
        raise AbsentError("no step was measured on a device that counts its memory (peak_bytes_in_use); CPUs do not")
