"""Every recipe in small, from one command: stage 1, stage 2, evaluate, export; what trained, and what stayed to the byte."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import deepstack_jax as dsx
from benchmarks.tiny_recipe import CHAINS, HELD_OUT, Run, load_recipe
from deepstack_jax.config import Config
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.data.open import open_files
from deepstack_jax.train.checkpoint.init_weights import open_start
from deepstack_jax.train.checkpoint.restore_params import restore_params
from deepstack_jax.train.core.optimizer import FROZEN, assign_groups, flatten
from deepstack_jax.weights.load import load_params
from deepstack_jax.weights.names import NameTable
from deepstack_jax.weights.open_checkpoint import open_checkpoint
from tests.e2e.verb import Done, module, read_json, read_lines

PROJECTOR = ("projector/", "deepstack_mergers_")  # beginnings of what stage 1 trains
TIMEOUT = 1800  # seconds for a chain on a busy machine: the longest takes 100 of CPU
SLOW = pytest.mark.slow
# With further words after a colon: of the small models one with taps, since crops are everywhere else.
NAMES = ["nano:taps" if name == "nano" else name for name in CHAINS]
RECIPES = ("llava15", *(pytest.param(name, marks=SLOW) for name in NAMES if name != "llava15"))


@dataclass(frozen=True)
class Chain:
    """What a chain left, and what it printed."""

    name: str
    workdir: Path
    printed: str

    @property
    def runs(self) -> list[Run]:
        name, _, words = self.name.partition(":")
        return [Run(recipe, stage, words) for recipe, stage in CHAINS[name]]

    def params(self, run: Run) -> dict[str, np.ndarray]:
        return restore_params(self.workdir / run.folder)[2]

    def start(self) -> dict[str, np.ndarray]:
        """The synthetic weights by our paths, as far as they go."""
        config = load_recipe(self.runs[0])
        weights = self.workdir / "weights"
        found = open_checkpoint(weights / "llm", tower=str(weights / "clip"), run=config)
        absent = (*PROJECTOR, "image_newline")
        blank = {path: np.zeros(leaf.shape) for path, leaf in self.params(self.runs[0]).items() if path.startswith(absent)}
        leaves = flatten(load_params(found.tensors, config, fresh=blank))
        return {path: np.asarray(leaf) for path, leaf in leaves.items() if path not in blank}


def tiny_recipe(name: str, workdir: Path) -> Done:
    return module("benchmarks.tiny_recipe", name, f"--workdir={workdir}", seconds=TIMEOUT)


@pytest.fixture(scope="module", params=RECIPES)
def chain(request, tmp_path_factory) -> Chain:
    workdir = tmp_path_factory.mktemp("chains") / request.param.replace(":", "-")
    done = tiny_recipe(request.param, workdir)
    assert done.returncode == 0, done.stderr
    return Chain(request.param, workdir, done.stdout)


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest change of every parameter that both have."""
    return {path: float(np.abs(after[path] - before[path]).max()) for path in before.keys() & after.keys()}


def test_stage_1_trains_the_projector_and_nothing_else(chain):
    after = chain.params(chain.runs[0])
    config = load_recipe(chain.runs[0])
    changed = moved(kept(chain.start(), config), after)
    assert {path.split("/")[0] for path in changed} == {"vision_tower", "embed", "layers", *head(config)}
    assert not any(changed.values())
    assert {path for path in after if path.startswith(PROJECTOR)} == after.keys() - changed.keys()
    assert groups(chain.printed, 0) == {"frozen": "-", "projector": "0.001"} | mergers(config, 1e-3)


def test_stage_2_starts_from_stage_1_and_trains_what_the_recipe_says(chain):
    for number, (first, second) in enumerate(zip(chain.runs, chain.runs[1:], strict=False), 1):
        config = load_recipe(second)
        before, after = chain.params(first), chain.params(second)
        before |= chain.start() if second.stage else {}  # HD takes all from the run before, the others from where that began
        before = kept(before, config)
        change, steps = moved(before, after), read_json(chain.workdir / second.folder / "results.json")["steps"]
        tower = max(value for path, value in change.items() if path.startswith("vision_tower/"))
        rest = max(value for path, value in change.items() if not path.startswith("vision_tower/"))
        # AdamW moves a parameter by about its rate at each step: from other weights than stage 1's it would be 0.01 and up.
        rate = config.optimizer.groups["language"].lr
        assert rate < rest < rate * (steps + 1)
        tuned = "vision" in config.optimizer.groups
        assert (0.07 < tower / rest < 0.13) if tuned else tower == 0
        trained = [f"deepstack_mergers_{at}/fc2/kernel" for at in range(len(config.deepstack.taps))]
        trained += [f"{name}/kernel" for name in head(config)]
        assert all(change[path] > 0 for path in ("projector/fc1/kernel", "embed/embedding", *trained))
        printed = {"language": f"{rate:g}"} | ({"vision": "2e-06"} if tuned else {"frozen": "-"}) | mergers(config, rate)
        assert groups(chain.printed, number) == printed | ({"newline": "2e-05"} if config.image.newline else {})


def kept(leaves: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Parameters as a run begins with them: what is frozen rounded to the dtype that it is stored in."""
    groups = assign_groups(list(NameTable(config).leaves), config.optimizer.table)
    dtype = jnp.dtype(config.train.frozen_dtype)
    return {p: leaf.astype(dtype).astype(np.float32) if groups[p] == FROZEN else leaf for p, leaf in leaves.items()}


def head(config: Config) -> list[str]:
    """The name of the head where it is a parameter of its own."""
    return [] if config.decoder.tied_head else ["head"]


def mergers(config: Config, rate: float) -> dict[str, str]:
    """The row of the mergers' group, where there are taps."""
    return {"mergers": f"{rate:g}"} if config.deepstack.taps else {}


def groups(printed: str, number: int) -> dict[str, str]:
    """Group -> rate, of the table that the run of that number printed."""
    table = printed.split("┃ group")[1:][number].split("└")[0]
    rows = [[cell.strip() for cell in line.split("│")[1:]] for line in table.splitlines() if line.startswith("│")]
    return {row[0]: row[2] for row in rows}


def test_held_out_answers_are_scored(chain):
    results = read_json(chain.workdir / "evaluation" / "results.json")
    lines = read_lines(chain.workdir / "evaluation" / "predictions.jsonl")
    assert (results["questions"], results["bad_examples"], len(lines)) == (HELD_OUT, 0, HELD_OUT)
    for name, entry in results["scores"].items():
        assert entry["score"] == pytest.approx(np.mean([line["scores"][name] for line in lines]))
    assert {"exact_match", "anls"} == results["scores"].keys()
    for part in ("exact_match", "anls", "greedy", "max_new_tokens 8"):
        assert part in chain.printed


def test_the_exported_folder_answers_as_the_run_does(chain):
    lmm = dsx.load(chain.workdir / "exported")
    run = dsx.load(chain.workdir / chain.runs[-1].folder)
    assert lmm.config.deepstack == run.config.deepstack
    assert lmm.config.layout == run.config.layout
    rows = open_files(str(chain.workdir / "data" / "held_out.json"), str(chain.workdir / "data" / "held_out"))
    lines = read_lines(chain.workdir / "evaluation" / "predictions.jsonl")
    for row, line in enumerate(lines[:2]):
        said = lmm.generate(list(rows[row].images), line["question"], max_new_tokens=8, template=run.template)
        assert said == line["prediction"]


def test_a_run_serves_as_weights(chain):
    """What `train.weights` reads from a workdir is what the run saved, through the official names and back, to the byte."""
    run, config = chain.runs[-1], load_recipe(chain.runs[-1])
    folder = str(chain.workdir / run.folder)
    config = replace(config, train=replace(config.train, weights=folder, projector=""))
    saved, read = chain.params(run), flatten(load_params(open_start(config).tensors, config))
    assert saved.keys() == read.keys()
    assert all(saved[path].tobytes() == np.asarray(read[path]).tobytes() for path in saved)
    assert load_tokenizer(folder) is load_tokenizer(str(chain.workdir / "weights" / "llm"))


def test_started_again_it_goes_on_where_it_was(chain):
    (chain.workdir / "evaluation" / "results.json").unlink()
    again = tiny_recipe(chain.name, chain.workdir)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == len(chain.runs) + 3
    assert (chain.workdir / "evaluation" / "results.json").exists()


def test_an_unknown_recipe_is_named(tmp_path):
    done = tiny_recipe("lava15", tmp_path)
    assert done.returncode == 2
    assert "no recipe 'lava15'; expected one of llava15" in done.stderr
    done = tiny_recipe("llava_next:phi3", tmp_path)
    assert done.returncode == 2
    assert "'phi3' is not known; expected" in done.stderr
    assert not list(tmp_path.iterdir())
