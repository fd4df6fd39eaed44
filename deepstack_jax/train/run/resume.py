"""What is looked at before a run goes on in a workdir: that it is the same run on the same data, and that there is room."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepstack_jax.config import SAME_EXAMPLES, Config, TrainConfig, differences, on_resume
from deepstack_jax.config.chat_template import template_in_words
from deepstack_jax.data.fingerprint import UNUSABLE
from deepstack_jax.train.checkpoint.manager import bytes_of
from deepstack_jax.train.checkpoint.reading import CheckpointError, UnreadableError, cause_line, read_workdir_json, saved_steps
from deepstack_jax.train.checkpoint.restore_params import config_of
from deepstack_jax.train.core.optimizer import make_schedule
from deepstack_jax.types import PyTree


def check_disk_space(workdir: Path, state: PyTree, train: TrainConfig, steps: int) -> str | None:
    """A warning where the disk does not hold the checkpoints of a state that a run of `steps` makes; None where there is room.

    Raises:
      CheckpointError: not even the first one fits: better known now than after the first thousand steps. A run that goes on is
        only warned: it may have nothing left to save, or its old ones make room.
    """
    needed = bytes_of(state)
    free, there = shutil.disk_usage(workdir).free, len(saved_steps(workdir))
    stay = train.keep + train.keep_best + (steps // train.keep_every if train.keep_every else 0)
    most = min(stay, math.ceil(steps / train.checkpoint_every)) + 1  # the old ones stay until the new one was read back
    numbers = f"a checkpoint takes {needed / 1e6:,.1f} MB, {workdir} has {free / 1e6:,.1f} MB free"
    if free < needed and not there:
        raise CheckpointError(f"{numbers}; make room or choose another --workdir")
    return f"{numbers} and is to hold {most}, of which {there} are there" if free < (most - there) * needed else None


def check_same_run(config: Config, workdir: Path) -> list[str]:
    """Refuse to go on in a workdir of another configuration; returns the differences that do no harm, one line each.

    Raises:
      CheckpointError: listing every key that differs and would change what is computed; or the one there cannot be read.
    """
    stored = workdir / "config.json"
    if not stored.exists():
        return []
    try:
        changed = differences(config, read_workdir_json(stored))
    except UnreadableError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; if --config is that of the run, delete the file and run the same command again: it is written again"
        ) from error
    lines = {key: f"{key}: {_shown(key, theirs)} there, {_shown(key, ours)} now" for key, (ours, theirs) in changed.items()}
    fatal = [line for key, line in lines.items() if not on_resume(key)]
    if fatal:
        raise CheckpointError(f"{workdir} holds a run of another configuration ({', '.join(fatal)}); choose a new --workdir")
    return list(lines.values())


def _shown(key: str, value: Any) -> str:
    """A value for a message; of a chat template not its pages of text."""
    return repr(template_in_words(value) if key == "data.template" else value)


def new_length(config: Config, workdir: Path, steps: int, steps_of: Callable[[TrainConfig], int]) -> str:
    """What a run does that goes on for another number of steps than it was begun with; "" where it is the same number.

    The schedule is that of the new length, from the step on that the run is at: what it does is told by its configuration
    alone, and it goes on after another stop as it would have without. Moments and counters are kept.

    Args:
      steps: of the whole run. steps_of: those of another `train` section, on the same data.

    Raises:
      CheckpointError: it is beyond that step.
    """
    saved = saved_steps(workdir)
    if not saved or not (workdir / "config.json").exists():
        return ""
    before, done = steps_of(config_of(workdir).train), saved[-1]
    if steps < done:
        raise CheckpointError(
            f"{workdir} is at step {done}, config.train.steps or epochs give {steps}; give at least {done}, or take it as it is"
        )
    if before == steps:
        return ""
    if done == steps:
        return f"ends at step {steps}, begun for {before}"
    now, then = (make_schedule(config.optimizer.schedule, length) for length in (steps, before))
    last, first, end = (np.asarray(factor).item() for factor in (then(done - 1), now(done), now(steps - 1)))
    return (
        f"goes on to step {steps}, begun for {before}: moments are kept, learning rates are those of a schedule of {steps} "
        f"steps: {first:.3g} of their highest at step {done + 1}, {end:.3g} at step {steps} (it was {last:.3g} at step {done})"
    )


def check_same_data(config: Config, workdir: Path, now: dict[str, Any], texts: Callable[[], str]) -> list[str]:
    """Refuse to go on with other data than the run was begun with, at the same place or another.

    Args:
      now: see `describe_data`; that of the run is in its manifest.
      texts: see `describe_texts`; asked for where the manifest is of an earlier version.

    Raises:
      CheckpointError: naming what differs, and the ways to go on. Where `train.changed_data` accepts it, it is returned.
    """
    found = data_changes(config, workdir, now, texts)
    if not found or config.train.changed_data == "accept":
        return found
    # Another number of rows is another order, which no flag can go on with.
    accept = ", or go on with what is there now: --config.train.changed_data=accept" if "rows there" not in found[0] else ""
    raise CheckpointError(
        f"{workdir} holds a run on other examples, or that read them as other tokens ({'; '.join(found)}); put back what it "
        f"was begun with, choose a new --workdir{accept}"
    )


def data_changes(config: Config, workdir: Path, now: dict[str, Any], texts: Callable[[], str]) -> list[str]:
    """What of the data differs from what the run in a workdir has learned from; nothing where it has learned nothing yet."""
    if not (workdir / "config.json").exists() or not saved_steps(workdir):
        return []
    try:
        return _data_changes(config, workdir, now, texts)
    except UnreadableError:
        raise
    except (CheckpointError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{workdir}/manifest.json is damaged ({cause_line(error)}), which tells what data the run began with; if that "
            "is the same, delete the file and run the same command again: it is written again"
        ) from error


def _data_changes(config: Config, workdir: Path, now: dict[str, Any], texts: Callable[[], str]) -> list[str]:
    changed = differences(config, read_workdir_json(workdir / "config.json"))
    moved = [f"{key}: {changed[key][1]!r} there, {changed[key][0]!r} now" for key in changed if on_resume(key) == SAME_EXAMPLES]
    manifest = workdir / "manifest.json"
    if not manifest.exists():
        manifest = workdir / "checkpoints" / str(saved_steps(workdir)[-1]) / "about" / "metadata"  # which has the same
    before = read_workdir_json(manifest).get("data", {}) if manifest.exists() else {}
    found = []
    if before.get("rows", now["rows"]) != now["rows"]:
        found.append(f"{before['rows']:,} rows there, {now['rows']:,} now")
    for split, named in now["contents"].items():
        for name, digest in named.items():
            files = [side.get("files", {}).get(split, {}).get(name, "") for side in (before, now)]
            theirs = before.get("contents", {}).get(split, {}).get(name)
            if _is_changed(theirs, digest, *files, moved=bool(moved)):
                found.append(f"{split} data {name}: {files[0] or 'unknown'} there, {files[1]} now")
    if "looked_at" in before:
        found += _changed_rows(before["looked_at"], now["looked_at"])
    elif (moved or "texts" in before) and before.get("texts") != texts():
        found.append("rows looked at became other tokens")
    return found + moved if found else []


def _is_changed(theirs: str | None, ours: str, files_before: str, files_now: str, *, moved: bool) -> bool:
    """Whether one data file is another by now; by its number, size and time where its bytes are not known to the last."""
    if theirs and ours and theirs != ours:
        return True
    if moved or not files_before or (theirs and ours.startswith("whole")):
        return False
    if theirs is None:  # an earlier version, which may be read on a copy: the size tells
        return files_before.rpartition(", ")[0] != files_now.rpartition(", ")[0]
    return files_before != files_now


def _changed_rows(before: str, now: str) -> Iterator[str]:
    """Rows that both looked at and that are others by now.

    Not what could not be used and was fixed since, nor images that cannot be read now: those are the quarantine's business.
    """
    theirs, ours = ({row: (tokens, images) for row, tokens, images in _parts(side)} for side in (before, now))
    both = [row for row in ours if row in theirs]
    tokens = [row for row in both if theirs[row][0] not in (UNUSABLE, ours[row][0])]
    images = [row for row in both if theirs[row][1] != ours[row][1] and UNUSABLE not in (theirs[row][1], ours[row][1])]
    for rows, what in ((tokens, "became other tokens"), (images, "have other images")):
        if rows:
            yield f"{len(rows):,} of {len(both):,} rows looked at {what}, the first is row {rows[0]}"


def _parts(looked_at: str) -> Iterator[list[str]]:
    return (parts for parts in (word.split(":") for word in looked_at.split()) if len(parts) == 3)
