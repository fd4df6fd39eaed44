"""What the documents show, run in full on small inputs: the demo after a few steps, drawn receipts, tiny checkpoints.

The commands are those of the documents, with a few flags more that make them short. Left out is what no small input stands
for (recipes of billions of parameters, `plan` for machines that are elsewhere, a step that was not finite); `test_blocks.py`
looks at the flags of those.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.demo_tasks import write as write_demo_tasks
from deepstack_jax.config import from_stored
from deepstack_jax.data.encode.image import open_image
from deepstack_jax.data.open import open_source
from tests.docs.blocks import REPOSITORY, Block, blocks, commands_of_console, run_shell, scratch_folder
from tests.docs.conftest import Runner
from tests.e2e.receipts import draw_receipts
from tests.e2e.verb import ENVIRONMENT
from tests.parity.goldens import GOLDEN, write_folder

# Few layers, steps and examples: the programs are to be compiled, not to learn.
SHORT = {
    "train": (
        "--config.decoder.layers=3",
        "--config.vision.layers=2",
        "--config.train.steps=2",
        "--config.train.batch_size=2",
        "--config.evaluation.examples=2",
        "--config.evaluation.batch_size=2",
        "--config.evaluation.max_new_tokens=2",
    ),
    "evaluate": ("--limit=1", "--max_new_tokens=2"),
    "audit": ("--scan=4", "--n=2"),
    "prepare": ("--workers=1",),
}
SHORT_FINETUNE = ("--config.train.steps=2", "--config.train.batch_size=4", "--config.data.max_length=512")
LEFT_OUT = re.compile(r"configs/(llava|deepstack|phi)|--replay=|deepstack_jax\.(plan|serve)")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, runner) -> Path:
    """A scratch clone after `make demo` of two steps, with what the documents take for granted."""
    folder = scratch_folder(tmp_path_factory.mktemp("docs") / "clone")
    module, words = command_of_the_demo()
    run(runner, folder, module, [*words, *SHORT["train"]])
    leave_page(folder)
    draw_receipts(folder / "DIR", train=8, validation=2)
    (folder / "DIR" / "images" / "images").symlink_to(".")  # for --config.data.images=images
    shutil.copy(GOLDEN / "images" / "img0.png", folder / "photo.jpg")
    for name, case in (("DeepStack-L-Vicuna-7B", "generate"), ("llava-1.5", "llava15")):
        made = write_folder(case, tmp_path_factory.mktemp(case))
        shutil.copytree(made.parent / "clip", folder / "clip", dirs_exist_ok=True)  # where a checkpoint looks, too
        shutil.move(made, folder / name)
        shutil.copytree(GOLDEN / "tokenizer" / "llama_legacy_false", folder / name, dirs_exist_ok=True)
    return folder


def command_of_the_demo() -> tuple[str, list[str]]:
    """What `make demo` runs for DeepStack: a module and its arguments."""
    command = ["make", "-n", "demo-deepstack"]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    module, words = re.findall(r"-m (deepstack_jax\.train) (.*)", printed)[-1]
    return module, words.split()


def leave_page(folder: Path) -> None:
    """As benchmarks/demo_report.py does at the end of `make demo`."""
    config = from_stored(json.loads((folder / "runs" / "demo" / "deepstack" / "config.json").read_text()))
    open_image(open_source(config.data, "validation")[0].images[0]).save(folder / "runs" / "demo" / "page.png")


def run(runner: Runner, folder: Path, module: str, words: list[str], typed: str = "") -> str:
    done = runner(module=module, arguments=words, folder=str(folder), typed=typed)
    assert done["code"] == 0, f"{module} {words}: {done['err']}"
    return done["out"]


def run_python(runner: Runner, folder: Path, block: Block) -> list[str]:
    """The lines that it prints."""
    done = runner(code=block.text, folder=str(folder))
    assert done["code"] == 0, f"{block.name}: {done['err']}"
    return done["out"].splitlines()


def of(document: str, language: str) -> list[Block]:
    return [block for block in blocks() if block.document == document and block.language == language]


def run_all(document: str, clone: Path, runner: Runner) -> list[str]:
    """Every verb that the shell and console blocks of a document call; the names of those that ran."""
    done, calls = run_shell(of(document, "sh"), clone)
    assert done.returncode == 0, done.stderr
    commands = [(list(call.words), "") for call in calls if call.words[:2] == ("python", "-m")]
    for block in of(document, "console"):
        commands += [(command.split(), typed) for command, typed, _ in commands_of_console(block)]
    ran = []
    for (_, _, module, *words), typed in commands:
        verb = module.removeprefix("deepstack_jax.")
        if verb != module and not LEFT_OUT.search(" ".join([module, *words])):
            whole = any(word.startswith(("--report=", "--verify=")) for word in words)
            more = SHORT_FINETUNE if verb == "train" and "--config=finetune.py" in words else SHORT.get(verb, ())
            run(runner, clone, module, [*words, *(() if whole else more)], typed)
            ran.append(verb)
    return ran


def shown(block: Block) -> list[str]:
    """What a block of Python says that it prints."""
    return [line.split("  # ", 1)[1] for line in block.text.splitlines() if line.startswith("print(") and "  # " in line]


def test_readme_and_what_takes_its_runs_further(clone, runner):
    """In the order of a reader: README, then docs/checkpoints.md, which converts README's run."""
    tuned, rest = ["train", "generate", "convert"], ["train", "audit", "prepare", "evaluate", "generate", "generate"]
    assert run_all("README.md", clone, runner) == tuned + rest
    assert (clone / "exports" / "tuned" / "config.json").is_file()
    assert (clone / "runs" / "audit" / "audit.html").is_file()
    assert (clone / "shards" / "train" / "manifest.json").is_file()
    (block,) = of("README.md", "python")
    one, two, shape = run_python(runner, clone, block)
    # The answers are those of a model that has learned nothing yet; there is one for each question, and the shape is known.
    assert one
    assert len(ast.literal_eval(two)) == len(ast.literal_eval(shown(block)[1])) == 2
    assert shape == shown(block)[2]
    assert run_all("docs/checkpoints.md", clone, runner) == ["convert", "convert", "convert"]
    assert {path.name for path in (clone / "out").iterdir()} == {"receipts", "llava", "bf16"}
    (block,) = of("docs/checkpoints.md", "python")
    shutil.rmtree(clone / "out")
    assert run_python(runner, clone, block)
    assert (clone / "out" / "clip").is_dir()


@pytest.mark.slow
def test_the_demos_models_go_through_three_tasks_and_are_compared(clone, runner):
    (block,) = [block for block in of("docs/evaluation.md", "sh") if "demo_tasks" in block.text]
    demo = clone / "runs" / "demo"
    shutil.copytree(demo / "deepstack", demo / "baseline", dirs_exist_ok=True)  # stands in for one that is not trained here
    done, calls = run_shell([block], clone)
    assert done.returncode == 0, done.stderr
    made, *asked, compared = [list(call.words[2:]) for call in calls]
    write_demo_tasks(clone / made[1], pages=1)
    for module, *words in asked:
        printed = run(runner, clone, module, [*words, "--limit=1", "--batch_size=1"])
        assert all(f"│ {name}" in printed for name in ("vqav2", "gqa", "docvqa"))
    printed = run(runner, clone, compared[0], compared[1:])
    assert "vqa_accuracy" in printed
    assert "+0.000 to +0.000" in printed
    assert (demo / "compare" / "compare.html").is_file()


@pytest.mark.slow
def test_from_a_downloaded_checkpoint_to_answers(clone, runner):
    for folder in ("runs/tuned", "exports/tuned"):
        shutil.rmtree(clone / folder, ignore_errors=True)
    assert run_all("docs/finetune.md", clone, runner) == ["audit", "train", "train", "generate", "evaluate", "convert"]
    (block,) = of("docs/finetune.md", "python")
    assert "nothing injected" in "".join(run_python(runner, clone, block))


@pytest.mark.slow
def test_data_and_the_report_of_a_run(clone, runner):
    shutil.rmtree(clone / "shards", ignore_errors=True)
    assert run_all("docs/data.md", clone, runner) == ["train", "audit", "prepare", "prepare", "prepare", "train"]
    assert run_all("docs/runs.md", clone, runner) == ["train"]
    assert (clone / "runs" / "mine" / "report" / "time.png").is_file()


@pytest.mark.slow
def test_readme_says_what_the_demo_answers(tmp_path, runner):
    """The whole training of `make demo`'s DeepStack, and then every line that README shows of it."""
    folder = scratch_folder(tmp_path / "clone")
    module, words = command_of_the_demo()
    optimized = {name: ENVIRONMENT[name] for name in ENVIRONMENT.keys() - {"JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"}}
    subprocess.run(
        [sys.executable, "-m", module, *words], cwd=folder, env=optimized | {"PYTHONPATH": str(REPOSITORY)}, check=True
    )
    leave_page(folder)
    (block,) = of("README.md", "python")
    assert run_python(runner, folder, block) == shown(block)
    for block in of("README.md", "console"):
        for command, typed, expected in commands_of_console(block):
            _, _, module, *words = command.split()
            said = run(runner, folder, module, words, typed)
            without_time = [re.sub(r'"seconds": [\d.]+', "", text) for text in (said, expected)]
            assert without_time[0] == without_time[1]


@pytest.mark.parametrize(("target", "profile"), [("test", "ci"), ("test-all", "ci"), ("fuzz", "fuzz")])
def test_only_the_long_run_of_the_fuzzers_draws_anew(target, profile):
    done = subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert f"--hypothesis-profile={profile} " in done.stdout
    assert done.stdout.count("--hypothesis-profile=") == 1
