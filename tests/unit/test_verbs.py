"""`python -m deepstack_jax` and the console script `deepstack`; what an installed package has with it."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from deepstack_jax.__main__ import VERBS

REPOSITORY = Path(__file__).parents[2]


def deepstack(*words: str, **how) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deepstack_jax", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, **{"cwd": REPOSITORY} | how)


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_the_verbs_are_listed(words):
    done = deepstack(*words)
    assert done.returncode == 0
    assert re.findall(r"^  (\w+) ", done.stdout, re.MULTILINE) == list(VERBS)


def test_every_verb_is_a_module_that_runs():
    package = REPOSITORY / "deepstack_jax"
    rooms = {file.parent.name for file in package.glob("*/__main__.py")}
    assert {*VERBS} == rooms | {"convert"}


def test_a_verb_is_that_module():
    done = deepstack("audit", "--help")
    assert done.returncode == 0
    assert "python -m deepstack_jax.audit --config=" in done.stdout
    wrong = deepstack("audit", "--config=demo.py", "--m=3")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert wrong.stderr.startswith("error: Unknown command line flag 'm'")


def test_an_unknown_verb_names_the_nearest():
    done = deepstack("trian")
    assert (done.returncode, done.stderr) == (1, "error: unknown verb 'trian'; nearest valid name: 'train'\n")


def test_the_script_is_that_function():
    import tomllib

    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"deepstack": "deepstack_jax.__main__:main"}


@pytest.mark.slow
@pytest.mark.skipif(
    int(metadata.version("setuptools").partition(".")[0]) < 77, reason="builds with the installed setuptools, of 77 or later"
)
def test_an_installed_package_has_the_recipes(tmp_path):
    """Built from a copy, so that nothing is left in the clone."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("deepstack_jax", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", f"--target={target}", source]
    subprocess.run(pip, check=True)
    shipped = {file.relative_to(target / "deepstack_jax") for file in (target / "deepstack_jax" / "configs").rglob("*.py")}
    assert shipped == {file.relative_to(REPOSITORY) for file in (REPOSITORY / "configs").rglob("*.py")}
    assert (target / "deepstack_jax" / "configs" / "lmms_eval" / "receipts.yaml").is_file()
    assert (target / "deepstack_jax" / "audit" / "templates").is_dir()
    assert (target / "deepstack_jax" / "serve" / "page.html").is_file()
    assert (target / "bin" / "deepstack").is_file()
    done = deepstack("audit", "--config=llava15.py:pretrain", "--config.help", cwd=tmp_path, env={"PYTHONPATH": str(target)})
    assert done.returncode == 0, done.stderr
    assert "--config.name='llava15-7b-pretrain'" in done.stdout
