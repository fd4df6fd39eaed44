"""A recipe's whole chain in small, from one command: `python -m benchmarks.tiny_recipe llava15 --workdir=runs/tiny/llava15`.

Synthetic weights (a language model and a CLIP as Hugging Face folders) and synthetic data in place of the published ones; then
the verbs as a user calls them: train stage 1, train stage 2, evaluate on held-out rows, convert into a folder that other code
loads. What is done stays done: killed and started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table
from safetensors.numpy import save_file

from benchmarks.small_tokenizer import train_bpe
from benchmarks.stand_in_sets import write_file, write_sets
from deepstack_jax.config import Config, build_config
from deepstack_jax.config.chat_template import OWN
from deepstack_jax.families.base import TOWER, decoder_of
from deepstack_jax.families.forms import DRAWN
from deepstack_jax.families.official import tower_to_hf
from deepstack_jax.families.processor import RESAMPLE, preprocessor_to_hf
from deepstack_jax.printing import Console
from deepstack_jax.weights.names import NameTable

REPOSITORY = Path(__file__).parents[1]
TOKENIZERS = {"llama": "llama_legacy_false", "phi3": "phi3_rstrip"}  # of tests/golden, which need no download
# A chat template as SmolLM2's and Qwen's, without their system turns.
CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = 24  # of every mixture
HELD_OUT = 4
# (recipe, stage) of every run, in order. A run takes its projector from the one before, or, as HD does, all of its weights.
CHAINS = {
    **{name: ((name, "pretrain"), (name, "finetune")) for name in ("llava15", "llava15_baseline", "deepstack_v", "phi3")},
    "nano": (("nano", "pretrain"), ("nano", "finetune")),
    "llava_next": (("llava_next", "pretrain"), ("llava_next", "finetune")),
    "deepstack_hd": (("llava_next", "pretrain"), ("llava_next", "finetune"), ("deepstack_hd", "")),
}


class Run(NamedTuple):
    """One training run of a chain."""

    recipe: str
    stage: str
    words: str  # further ones

    @property
    def spec(self) -> str:
        """NAME.py:WORDS, as `--config` takes it."""
        return f"{self.recipe}.py:{','.join(filter(None, (self.stage, self.words, 'tiny')))}"

    @property
    def folder(self) -> str:
        return "-".join(filter(None, (self.recipe, self.stage)))


@dataclass(frozen=True)
class Step:
    """One part of a chain: done once `proof` exists, which appears when all of it is there; then `result` describes it."""

    name: str
    proof: Path
    run: Callable[[], None]
    result: Callable[[], str]


def load_recipe(run: Run) -> Config:
    """The config of a run."""
    file, _, words = run.spec.partition(":")
    return build_config(runpy.run_path(str(REPOSITORY / "configs" / file))["get_config"](words))


def write_weights(folder: Path, config: Config, template: str = "", seed: int = 0) -> None:
    """A bare language model with a tokenizer (`llm/`) and a vision tower (`clip/`) of the config's sizes, at random.

    Args:
      template: of the conversations; where it is the model's own, the tokenizer's folder has one.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, dict[str, np.ndarray]] = {"llm": {}, "clip": {}}
    for name, foreign in NameTable(config).tensors.items():
        if name.startswith(TOWER):
            parts["clip"][name.removeprefix(TOWER)] = _draw(rng, name, foreign.shape)
        elif not name.startswith(DRAWN):
            parts["llm"][name] = _draw(rng, name, foreign.shape)
    kind = config.decoder.architecture
    described = {
        "llm": {"config.json": decoder_of(config).to_hf(config.decoder) | {"model_type": kind}},
        # As published: the filter that the tower was trained with, SigLIP 2's bilinear.
        "clip": {
            "config.json": tower_to_hf(config),
            "preprocessor_config.json": preprocessor_to_hf(config) | {"resample": RESAMPLE[config.image.global_filter]},
        },
    }
    for part, tensors in parts.items():
        (folder / part).mkdir(parents=True)
        save_file(tensors, folder / part / "model.safetensors", metadata={"format": "pt"})
        for file, values in described[part].items():
            (folder / part / file).write_text(json.dumps(values, indent=2))
    if template == OWN:
        train_bpe(["What is it? It is a sign."], config.decoder.vocab_size, folder / "llm", ("<|im_start|>", "<|im_end|>"))
        (folder / "llm" / "chat_template.jinja").write_text(CHATML)
    else:
        shutil.copytree(REPOSITORY / "tests" / "golden" / "tokenizer" / TOKENIZERS[kind], folder / "llm", dirs_exist_ok=True)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Kernels that keep activations near 1, norms near 1, biases near 0."""
    if len(shape) == 1 and "embedding" not in name:
        return (rng.normal(0, 0.02, shape) + name.endswith("weight")).astype(np.float32)
    fan_in = 1 if "embed" in name and "patch" not in name else int(np.prod(shape[1:]))
    return (rng.normal(0, 1, shape) * fan_in**-0.5).astype(np.float32)


def steps(name: str, words: str, workdir: Path) -> Iterator[Step]:
    """The chain of a recipe, with further words for all of its runs."""
    runs = [Run(recipe, stage, words) for recipe, stage in CHAINS[name]]
    weights, data, asked, exported = (workdir / part for part in ("weights", "data", "evaluation", "exported"))
    template = load_recipe(runs[-1]).data.template
    yield _folder("weights", weights, lambda to: write_weights(to, load_recipe(runs[0]), template))
    yield _folder("data", data, lambda to: write_data(to, runs))
    before = None
    for run in runs:
        target = workdir / run.folder
        flags = [f"--config={REPOSITORY / 'configs' / run.spec}", f"--workdir={target}", f"--config.data.root={data}"]
        if run.stage:
            flags += [f"--config.train.weights={weights / 'llm'}", f"--config.train.tower={weights / 'clip'}"]
            flags += [f"--config.train.projector={before}"] if before else []
        else:
            flags.append(f"--config.train.weights={before}")
        yield _verb(f"train {run.spec}", target / "results.json", "train", flags, partial(_last_loss, target))
        before = target
    held_out = [f"--data={data / 'held_out.json'}", f"--images={data / 'held_out'}", f"--out={asked}", "--max_new_tokens=8"]
    yield _verb("evaluate", asked / "results.json", "evaluate", [f"--model={before}", *held_out], partial(_scores, asked))
    yield _verb("convert", exported, "convert", [f"--from={before}", f"--to={exported}"], lambda: str(exported))


def write_data(folder: Path, runs: Sequence[Run]) -> None:
    """The files of every run's mixture, and a held-out file."""
    for run in runs:
        write_sets(folder, load_recipe(run).data.sets, ROWS)
    write_file(folder / "held_out.json", folder / "held_out", HELD_OUT)


def _folder(name: str, folder: Path, write: Callable[[Path], None]) -> Step:
    """A step that writes a folder beside its place and renames it, so that there is never half of one."""

    def run() -> None:
        scratch = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        write(scratch)
        scratch.rename(folder)

    return Step(name, folder, run, lambda: str(folder))


def _verb(name: str, proof: Path, verb: str, flags: Sequence[str], result: Callable[[], str]) -> Step:
    """A step that runs a verb as a user does; where it fails the chain ends with its exit code."""

    def run() -> None:
        command = [sys.executable, "-m", f"deepstack_jax.{verb}", *flags]
        # For a few steps of a tiny program XLA's optimizations would cost more than they save.
        environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)

    return Step(name, proof, run, result)


def _last_loss(run: Path) -> str:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "loss" in record][-1]
    return f"loss {last['loss']:.4f} at step {last['step']}: {run}"


def _scores(folder: Path) -> str:
    results = json.loads((folder / "results.json").read_text())
    scores = ", ".join(f"{name} {score['score']:.3f}" for name, score in results["scores"].items())
    return f"{results['questions']} held-out questions: {scores}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of {', '.join(CHAINS)}; further words after a colon, e.g. llava15:phi3")
    parser.add_argument("--workdir", type=Path, help="everything goes here; default runs/tiny/NAME")
    given = parser.parse_args()
    name, _, words = given.name.partition(":")
    if name not in CHAINS:
        parser.error(f"no recipe {name!r}; expected one of {', '.join(CHAINS)}")
    try:
        for recipe, stage in CHAINS[name]:
            load_recipe(Run(recipe, stage, words))
    except ValueError as error:
        parser.error(str(error))
    workdir = (given.workdir or REPOSITORY / "runs" / "tiny" / given.name.replace(":", "-").replace(",", "-")).absolute()
    console, table = Console(), Table("step", "seconds", "result", title=f"{given.name} in small")
    for step in steps(name, words, workdir):
        began, done = time.perf_counter(), step.proof.exists()
        if not done:
            console.print(step.name, style="bold")
            step.run()
        table.add_row(step.name, "done before" if done else f"{time.perf_counter() - began:.1f}", step.result())
    console.print(table)


if __name__ == "__main__":
    main()
