"""What is looked at before a run goes on in a workdir: that it is the same run on the same data, and that there is room."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from deepstack_jax.config import Config, TrainConfig, differences
from deepstack_jax.training.checkpoint import bytes_of
from deepstack_jax.training.reading import CheckpointError, UnreadableError, read_json, saved_steps
from deepstack_jax.types import PyTree

# Keys that may change between the parts of one run: they decide what is shown and kept, not what is computed; or where a run
# starts from, which lies behind one that goes on.
HARMLESS = (
    "name",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.max_bad_steps",
    "train.wandb",
    "train.weights",
    "train.tower",
    "train.projector",
    "evaluation.",
    "profile.",
    "data.workers",
    "data.prefetch",
    "data.max_bad_fraction",
    "mesh.",
)
# Those that may change as far as the same examples come out of them, token by token: see `check_same_data`.
PLACES = ("data.root", "data.tokenizer")


def check_room(workdir: Path, state: PyTree, train: TrainConfig, steps: int) -> str | None:
    """A warning where the disk does not hold the checkpoints that are still to come; None where there is room.

    Args:
      state: abstract or real; its size is that of a checkpoint.
      train: says which ones stay.
      steps: of the whole run.

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
        changed = differences(config, read_json(stored))
    except UnreadableError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; if --config is that of the run, delete the file and run the same command again: it is written anew"
        ) from error
    lines = {key: f"{key}: {theirs!r} there, {ours!r} now" for key, (ours, theirs) in changed.items()}
    fatal = [line for key, line in lines.items() if key not in PLACES and not key.startswith(HARMLESS)]
    if fatal:
        raise CheckpointError(f"{workdir} holds a run of another configuration ({', '.join(fatal)}); choose a new --workdir")
    return list(lines.values())


def check_same_data(config: Config, workdir: Path, texts: str) -> None:
    """Refuse to go on with what lies at another place, unless it is what the run was begun with.

    Args:
      texts: see `describe_texts`; the run's own stands in its manifest.

    Raises:
      CheckpointError: naming the places.
    """
    if not (workdir / "config.json").exists() or not saved_steps(workdir):
        return
    changed = differences(config, read_json(workdir / "config.json"))
    moved = [f"{key}: {changed[key][1]!r} there, {changed[key][0]!r} now" for key in PLACES if key in changed]
    manifest = workdir / "manifest.json"
    known = read_json(manifest)["data"].get("texts") if manifest.exists() else None
    if moved and known != texts:
        raise CheckpointError(
            f"{workdir} holds a run on other examples, or that read them as other tokens ({', '.join(moved)}); point to those "
            "it was begun with, or choose a new --workdir"
        )
