"""The numbers of the steps: judged, printed and written at every log line, and what could not be used of the data."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from deepstack_jax.config import DataConfig
from deepstack_jax.data.encode.batch_rows import HostBatch
from deepstack_jax.data.encode.encoder import REMARKS
from deepstack_jax.errors import UserError
from deepstack_jax.parallel.chips import CHIPS
from deepstack_jax.parallel.distributed import is_first_host, process_slice, sum_over_hosts
from deepstack_jax.printing import label
from deepstack_jax.train.run.replay import write_bundle
from deepstack_jax.train.run.run import Run

Numbers = dict[str, jax.Array]
_WRITTEN = ("loss", "token_accuracy", "grad_norm", "lr_factor", "supervised_tokens", "bad_steps")
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


class NotFiniteError(UserError):
    """Too many steps in a row gave no finite loss or gradient."""


class StepLog:
    """The numbers of the steps since the last log line. They stay on the device until then: no step waits for the host."""

    def __init__(self, run: Run, first: int) -> None:
        self._run, self._first = run, first  # the step that this attempt goes on from
        self._numbers: list[tuple[int, Numbers]] = []  # on the device
        self._fetched: list[tuple[int, Any]] = []
        self._judged = first  # the last step that was
        self._lengths: list[int] = []
        self._bad = 0  # examples that this host left out
        self._remarked: dict[str, set[int]] = defaultdict(set)  # rows by remark, in this attempt
        self._is_leader = process_slice(run.mesh).is_leader  # of those that hold the same rows
        kind = run.mesh.devices.flat[0].device_kind
        self._peak = CHIPS[kind].flops if kind in CHIPS else None  # unknown of CPUs, which then show no MFU
        self._timed = False  # the first interval holds the compilation: it yields no rate

    @property
    def waiting(self) -> bool:
        """Whether there are steps that no log line tells of."""
        return bool(self._numbers or self._fetched)

    def wait(self) -> None:
        """Until the devices are through with all steps, so that what comes next is not taken to last longer than it does."""
        jax.block_until_ready(self._numbers)

    def left_out(self, step: int, delivered: HostBatch) -> None:
        """Count what could not be used in the batch of a step; on one host too much of it ends the run at once."""
        run, before = self._run, self._bad
        self._bad = run.quarantine.add(delivered.bad)
        if self._bad and not before:
            bad = delivered.bad[0]
            run.console.print(
                f"step {step}: example {label(bad.name)} cannot be used and stays blank (further ones are only counted): "
                f"{bad.reason}",
                soft_wrap=True,
            )
        if delivered.bad and jax.process_count() == 1:
            run.quarantine.check(self._bad, self._seen(step))
        for row, remarks in delivered.remarks:
            for remark in sorted({*remarks}):
                if remark not in self._remarked:
                    run.console.print(f"{remark}: row {row} is the first; their number comes at the end", soft_wrap=True)
                self._remarked[remark].add(row)

    def say_remarks(self) -> None:
        """Say how many images and texts of this attempt were read in a way that not everybody expects. All hosts call it."""
        mine = {remark: len(self._remarked[remark]) if self._is_leader else 0 for remark in REMARKS}
        for remark, count in sum_over_hosts(mine).items():
            if count:
                self._run.console.print(f"{remark}: {count:.0f}", soft_wrap=True)

    def add(self, step: int, length: int, numbers: Numbers) -> None:
        """Keep the numbers of a step on a batch of `length` positions."""
        self._numbers.append((step, numbers))
        self._lengths.append(length)

    def write(self) -> dict[str, float]:
        """Fetch the numbers, judge them, write a record of the latest and return it."""
        run = self._run
        self._fetch()
        step, latest = self._fetched[-1]
        spent = run.journal.flush(step)
        bad = sum_over_hosts({"bad": self._bad if self._is_leader else 0})["bad"]
        run.quarantine.check(int(bad), self._seen(step))
        self.judge()
        numbers, lengths = [numbers for _, numbers in self._fetched], self._lengths
        self._fetched, self._lengths = [], []
        values = {name: float(latest[name]) for name in _WRITTEN}
        values["padding"] = float(np.mean([of_step["padding"] for of_step in numbers]))
        values |= {"lr": values["lr_factor"] * run.learning_rate, "bad_examples": bad}
        if not (self._first or self._timed) and (hint := padding_hint(values["padding"], float(np.mean(lengths)), run.data)):
            run.console.print(hint, soft_wrap=True)
        values |= self._rates(numbers, lengths, spent) if self._timed else {}
        self._timed = True
        run.metrics.write(step, values)
        return values

    def judge(self) -> None:
        """Write a bundle for every step since the last time that was skipped.

        Raises:
          NotFiniteError: too many in a row.
        """
        run, limit = self._run, self._run.train.max_bad_steps
        self._fetch()
        new = [(step, numbers) for step, numbers in self._fetched if step > self._judged]
        if not new:
            return
        self._judged, latest = new[-1]
        bad = [(step, numbers) for step, numbers in new if not numbers["good"]]
        if bad:
            with run.journal.spend("checkpoint"):
                run.checkpoints.settle()  # so that a bundle names the newest
        for step, numbers in bad:
            what = f"loss {float(numbers['loss'])}, gradient norm {float(numbers['grad_norm'])}"
            run.console.print(f"step {step}: {what}: skipped, nothing was updated", soft_wrap=True)
            if is_first_host():
                start = run.checkpoints.newest_before(step)
                write_bundle(run.workdir, step, run.stream.examples(step - 1), start, numbers)
        if latest["bad_in_a_row"] >= limit:
            raise NotFiniteError(
                f"the last {int(latest['bad_in_a_row'])} steps up to {self._judged} gave no finite loss or gradient and "
                f"changed nothing (config.train.max_bad_steps={limit}); look at one with "
                f"--replay={run.workdir}/replay/step-N.json, lower the learning rate in a new --workdir"
            )

    def _fetch(self) -> None:
        """From the devices, once they are through with all steps."""
        self._fetched += jax.device_get(self._numbers)
        self._numbers = []

    def _rates(self, numbers: list[dict[str, Any]], lengths: list[int], spent: dict[str, float]) -> dict[str, float]:
        """Speed over the interval; waiting for data is part of the steps' time, evaluating and saving are not."""
        run, seconds = self._run, sum(spent.get(kind, 0.0) for kind in ("step", "data"))
        flops = sum(run.flops(length, float(n["segment_squares"])) for length, n in zip(lengths, numbers, strict=True))
        per_device = flops / seconds / run.mesh.size
        rates = {
            "seconds_per_step": seconds / len(numbers),
            "examples_per_second": len(numbers) * run.train.batch_size / seconds,
            "supervised_tokens_per_second": float(sum(n["supervised_tokens"] for n in numbers)) / seconds,
            "data_wait": spent.get("data", 0.0) / seconds,
            "tflops_per_device": per_device / 1e12,
        }
        return rates if self._peak is None else rates | {"mfu": per_device / self._peak}

    def _seen(self, step: int) -> int:
        """Examples that were due since this attempt began."""
        return (step - self._first) * self._run.train.batch_size


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
