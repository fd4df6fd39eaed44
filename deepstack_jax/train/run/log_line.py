"""The line in which a run tells how it goes."""

from __future__ import annotations

from collections.abc import Mapping

from deepstack_jax.config import DataConfig

# What the line shows of the numbers at hand, in this order.
_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("token_accuracy", "acc {:.3f}"),
    ("lr", "lr {:.2e}"),
    ("grad_norm", "grad {:.2f}"),
    ("examples_per_second", "{:.1f} ex/s"),
    ("supervised_tokens_per_second", "{:.0f} tok/s"),
    ("tflops_per_device", "{:.3g} TFLOP/s"),
    ("mfu", "MFU {:.1%}"),
    ("data_wait", "data wait {:.1%}"),
    ("padding", "padding {:.1%}"),
)
PADDING_HINTED = 0.7  # above it a run is told of packing and buckets


def log_line(values: Mapping[str, float]) -> str:
    """The latest numbers of a run in one line."""
    line = " ".join(text.format(values[name]) for name, text in _SHOWN if name in values)
    return f"{line} skipped {values['bad_steps']:.0f}" if values["bad_steps"] else line


def padding_hint(padding: float, length: float, data: DataConfig) -> str:
    """What to do about rows that hold little, with the numbers; "" where they are full enough, or packed already.

    Args:
      padding: share of positions that hold nothing, 0..1.
      length: positions of a row.
    """
    if padding <= PADDING_HINTED or data.packing.enabled:
        return ""
    used = round((1 - padding) * length)
    buckets = tuple(2**power for power in range(5, 31) if 1.25 * used < 2**power < length)
    shorter = f', or pad to shorter lengths with --config.data.buckets="{buckets}"' if buckets else ""
    unset = ' --config.data.buckets="()"' if data.buckets else ""
    return (
        f"{padding:.0%} of the positions are padding, an example has {used:,} of the {length:,.0f} of its row: pack about "
        f"{length / max(1, used):.0f} into each with --config.data.packing.enabled=True{unset}{shorter}, in a new --workdir"
    )
