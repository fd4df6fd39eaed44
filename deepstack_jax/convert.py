"""Convert checkpoints: `python -m deepstack_jax.convert --from=DIR --to=DIR`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from deepstack_jax import cli
from deepstack_jax.api import LMM, placed, token_ids
from deepstack_jax.config import Config
from deepstack_jax.config.words import parts_in_words
from deepstack_jax.data.encode.labels import IMAGE_TOKEN
from deepstack_jax.data.encode.tokenizer import load_tokenizer, tokenizer_files
from deepstack_jax.errors import ConfigError, WeightsError
from deepstack_jax.families.forms import FORMATS
from deepstack_jax.printing import Console
from deepstack_jax.train.checkpoint.adapter import open_adapter, over_base
from deepstack_jax.train.checkpoint.init_weights import run_leaves
from deepstack_jax.train.checkpoint.restore_params import config_of, is_workdir
from deepstack_jax.weights.adapters import is_adapter, merged
from deepstack_jax.weights.export_folder import whole_export
from deepstack_jax.weights.load import stored_leaves
from deepstack_jax.weights.open_checkpoint import StoredModel, open_checkpoint
from deepstack_jax.weights.peft import FORMATS as PEFT_FORMATS
from deepstack_jax.weights.peft import write_peft
from deepstack_jax.weights.save import DTYPES, LeafLike, Written, save_checkpoint

USAGE = """
Convert a checkpoint into a folder that the official DeepStack code, LLaVA or transformers loads.

  python -m deepstack_jax.convert --from=runs/receipts --to=exports/receipts --dtype=bfloat16
  python -m deepstack_jax.convert --from=checkpoints/llava-v1.5-7b --to=exports/llava-hf --format=llava-hf
  python -m deepstack_jax.convert --from=checkpoints/llava-v1.5-7b --adapter=runs/lora --to=exports/merged
  python -m deepstack_jax.convert --from=runs/lora --to=exports/adapter --format=peft
  python -m deepstack_jax.convert --from=stage1 --base=lmsys/vicuna-7b-v1.5 --to=exports/stage1

  --from=DIR|ID       a training workdir; or a folder or hub id of DeepStack, LLaVA-1.5, LLaVA-NeXT or llava-hf
  --to=DIR            new folder; nothing is written over without --force
  --tower=DIR|ID      vision tower, in place of the one that config.json names
  --base=DIR|ID       language model under a folder that holds a projector alone
  --projector=FILE    an mm_projector.bin, in place of the folder's
  --adapter=DIR       LoRA adapters over --from: a workdir, or a folder of PEFT. They are merged, and the merged logits are
                      compared with the others before the folder is there; so are those of a workdir with adapters in --from
  --dtype=DTYPE       float32, bfloat16 or float16; as stored if not given
  --format=FORMAT     official (default), or llava-hf for LLaVA-1.5 and LLaVA-NeXT in transformers; peft or peft-llava-hf for
                      the adapters alone, in float32, under the names of either
  --max_shard=SIZE    most bytes of one file (default 5GB)
  --force             replace an earlier export in --to; nothing else is ever replaced

Exit codes: 0 done; 1 a mistake in the input, said in one line, nothing written.
"""

TEXT_FLAGS = {
    "from": "Checkpoint or training workdir to read.",
    "to": "Folder to write.",
    "tower": "Folder or hub id of the vision tower.",
    "base": "Folder or hub id of the language model under a projector.",
    "projector": "An mm_projector.bin.",
    "adapter": "LoRA adapters over --from.",
    "dtype": "float32, bfloat16 or float16.",
    "format": "official, llava-hf, peft or peft-llava-hf.",
    "max_shard": "Most bytes of one file.",
}
SOURCES = ("from", "adapter", "tower", "base", "projector")
# Most that merged logits may differ from those with adapters, relative to their norm, by the dtype of the activations.
MERGED = {"float32": 1e-4, "bfloat16": 0.1}
DEFAULTS = {"format": "official", "max_shard": "5GB"}
FLAGS = (
    *(cli.Flag(flags.DEFINE_string, name, DEFAULTS.get(name, ""), meaning) for name, meaning in TEXT_FLAGS.items()),
    cli.Flag(flags.DEFINE_bool, "force", False, "Replace an earlier export in --to."),
)


@dataclass(frozen=True)
class ConvertSource:
    """A model that can be written: from a run or from a checkpoint folder."""

    config: Config
    leaves: Mapping[str, LeafLike]
    dtype: str
    tokenizer: str
    passthrough: Mapping[str, Any]
    what: str
    sources: tuple[str | Path, ...] = ()


def main() -> int:
    given = {name: str(flags.FLAGS[name].value or "") for name in TEXT_FLAGS}
    for name in ("from", "to"):
        if not given[name]:
            raise ConfigError(f"--{name} is missing; e.g. --from=checkpoints/llava-v1.5-7b --to=exports/llava")
    for name, valid in (("dtype", ("", *DTYPES)), ("format", (*FORMATS, *PEFT_FORMATS))):
        if given[name] not in valid:
            raise ConfigError(f"--{name} got {given[name]!r}, expected {', '.join(filter(None, valid))}")
    target = Path(given["to"]).expanduser().absolute()
    cli.writable_folder(str(target.parent), "to")
    console, force = Console(), bool(flags.FLAGS["force"].value)
    if given["format"] in PEFT_FORMATS:
        console.print(write_adapter(given, target, force=force), soft_wrap=True)
        return cli.EXIT_DONE
    workdir = Path(given["from"]).expanduser()
    source = open_run(workdir) if is_workdir(workdir) else open_folder(given)
    if given["adapter"]:
        whole = merged(source.leaves, source.config)
        leaves = over_base(whole, open_adapter(given["adapter"], source.config), given["from"])
        source = dataclasses.replace(source, leaves=leaves, what=f"{source.what}; adapters of {given['adapter']}")
    dtype = given["dtype"] or source.dtype
    check = MergeCheck(source, dtype) if any(map(is_adapter, source.leaves)) else None
    leaves = merged(source.leaves, source.config)
    total = sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) * DTYPES[dtype][1].itemsize
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total)
        written = save_checkpoint(
            leaves,
            source.config,
            target,
            tokenizer_folder=source.tokenizer,
            dtype=dtype,
            max_shard=given["max_shard"],
            form=given["format"],
            passthrough=source.passthrough,
            force=force,
            sources=[*source.sources, *(given[name] for name in SOURCES if given[name])],
            progress=lambda nbytes: progress.advance(bar, nbytes),
            **({} if check is None else {"check": check}),
        )
    table = conversion_table(source, target, given["format"], dtype, written)
    if check is not None:
        table.add_row("merged", f"logits differ by {check.difference:.1e} of their size from those with adapters")
    console.print(table)
    return cli.EXIT_DONE


class MergeCheck:
    """Compares the logits of a written folder, whose adapters are merged, with those of the model that has them beside it.

    Attributes:
      difference: norm of the difference over that of the logits, after the call.
    """

    def __init__(self, source: ConvertSource, dtype: str) -> None:
        self._kind = dtype if dtype == "float32" else "bfloat16"  # that of the activations
        self._vocabulary = source.config.decoder.vocab_size  # the folder may have a row more, for the image
        self._expected = _logits(source.leaves, source.config, self._kind, self._vocabulary)
        self.difference = math.nan

    def __call__(self, folder: Path) -> None:
        stored = open_checkpoint(folder)
        found = _logits(stored_leaves(stored.tensors, stored.config), stored.config, self._kind, self._vocabulary)
        found = found[:, : self._expected.shape[1]]  # of `llava-hf` without the row for images
        self.difference = float(np.linalg.norm(found - self._expected) / np.linalg.norm(self._expected))
        if not self.difference < MERGED[self._kind]:
            raise WeightsError(
                f"merged adapters give other logits, by {self.difference:.1e} of their size, expected {MERGED[self._kind]:g}; "
                "nothing was written: look for infinite or very large weights, or use --dtype=float32"
            )


def _logits(leaves: Mapping[str, LeafLike], config: Config, kind: str, vocabulary: int) -> np.ndarray:
    """f32[T, V] of some tokens, below `vocabulary`, and a picture of noise."""
    rng = np.random.default_rng(0)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype=kind))
    ids = rng.integers(0, vocabulary, (1, 24))
    ids[0, 8] = IMAGE_TOKEN
    picture = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    model = LMM(config, placed(leaves, kind), None, config.data.template)
    return model.logits(ids, [[picture]], np.ones_like(ids))[0]


def write_adapter(given: Mapping[str, str], target: Path, *, force: bool) -> str:
    """Write adapters alone, as PEFT reads them; returns what was written, in words."""
    workdir = Path(given["from"]).expanduser()
    if is_workdir(workdir):
        config = config_of(workdir)
    else:
        config = open_checkpoint(workdir, tower=given["tower"], base=given["base"], projector=given["projector"]).config
    adapter = open_adapter(given["adapter"] or workdir, config)
    try:
        with whole_export(target, [given[name] for name in SOURCES if given[name]], force=force) as scratch:
            write_peft(scratch, adapter, config, given["format"])
    except OSError as error:
        raise WeightsError(f"cannot write {target}: {error.strerror or error}; choose another folder") from error
    parameters = sum(int(np.prod(leaf.shape)) for path, leaf in adapter.leaves.items() if not path.endswith("/lora_scale"))
    return f"{target}: adapters of {adapter.what}, {given['format']}, {parameters:,} parameters"


def open_run(workdir: Path) -> ConvertSource:
    """The newest parameters of a run."""
    step, config, leaves = run_leaves(workdir)
    folder, files, passthrough = config.data.tokenizer, "", {}
    if folder:
        try:
            tokenizer = load_tokenizer(folder)
        except (ValueError, OSError) as error:
            raise ConfigError(f"the run's tokenizer {folder} cannot be read: {error}; put it back where it was") from error
        files, passthrough = tokenizer_files(tokenizer), token_ids(tokenizer)
    return ConvertSource(config, leaves, "float32", files, passthrough, f"run {config.name}, step {step}")


def open_folder(given: Mapping[str, str]) -> ConvertSource:
    """A checkpoint folder, nothing of it read yet."""
    checkpoint = open_checkpoint(given["from"], tower=given["tower"], base=given["base"], projector=given["projector"])
    leaves = stored_leaves(checkpoint.tensors, checkpoint.config)
    sources = (checkpoint.path, checkpoint.tower)
    what = f"{checkpoint.path.name}, {len(checkpoint.tensors)} tensors"
    return ConvertSource(
        checkpoint.config, leaves, stored_dtype(checkpoint), checkpoint.tokenizer, checkpoint.passthrough, what, sources
    )


def stored_dtype(checkpoint: StoredModel) -> str:
    """The dtype of the checkpoint's own weights, read off the largest of them."""
    largest = max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
    return next((name for name, (_, kind) in DTYPES.items() if kind == largest.dtype), "float32")


def conversion_table(source: ConvertSource, target: Path, form: str, dtype: str, written: Written) -> Table:
    """What was converted into what."""
    table = Table(title=f"{target}", show_header=False)
    rows = {
        "from": source.what,
        "format": f"{form}, {dtype}, {written.files} file{'s' if written.files > 1 else ''}",
        "tensors": f"{written.tensors:,}",
        "parameters": f"{written.parameters:,}",
        "bytes": f"{written.nbytes:,}",
        **parts_in_words(source.config),
        "tokenizer": source.tokenizer or "none found, none written",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    cli.run(main, USAGE, FLAGS)
