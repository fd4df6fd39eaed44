"""The image's recipe: what it copies exists and reaches the builder, what it installs is declared, signals reach train."""

import fnmatch
import json
import re
import tomllib

import pytest

from tests.launch.scripts import LAUNCH, REPOSITORY


@pytest.fixture(scope="module")
def steps():
    """(instruction, rest) pairs, continued lines joined, comments left out."""
    lines = [line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


def rests(steps, instruction):
    return [rest for name, rest in steps if name == instruction]


def test_everything_copied_exists_and_is_not_ignored(steps):
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    sources = [source for rest in rests(steps, "COPY") for source in rest.split()[:-1]]
    for source in sources:
        assert (REPOSITORY / source).exists()
        assert any(fnmatch.fnmatch(source, pattern) for pattern in let_in), source
    assert set(sources) == set(let_in)


def test_the_package_and_its_extra_are_installed(steps):
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    constraints = "/deepstack_jax/constraints.txt"
    assert rests(steps, "ARG") == ["EXTRA=tpu", f"PIP_CONSTRAINT={constraints}", f"PIP_BUILD_CONSTRAINT={constraints}"]
    documented = set(re.findall(r"--build-arg=EXTRA=(\w+)", (LAUNCH / "Dockerfile").read_text()))
    assert documented == {"tpu", "cuda"} <= set(project["optional-dependencies"])
    assert any('pip install ".[${EXTRA}]"' in command for command in rests(steps, "RUN"))
    (base,) = rests(steps, "FROM")
    found = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    assert found, base  # a tag alone is another image tomorrow
    python = tuple(int(part) for part in found.groups())
    assert (3, 11) <= python < (3, 14)
    assert project["requires-python"] == ">=3.11,<3.14"


def test_train_is_the_process_that_gets_the_signals(steps):
    (entry,) = rests(steps, "ENTRYPOINT")
    assert json.loads(entry) == ["python", "-m", "deepstack_jax.train"]


def test_train_is_nobody_elses_user(steps):
    (user,) = rests(steps, "USER")
    assert user == "1000:1000"  # by number: Kubernetes cannot tell by a name whether it is root's
    order = [name for name, _ in steps]
    assert order.index("USER") > max(index for index, name in enumerate(order) if name in ("COPY", "RUN"))
    assert not [rest for rest in rests(steps, "COPY") if "--chown" in rest]  # the code is root's: train cannot change it


def test_dependencies_are_installed_before_the_code_is_copied(steps):
    order = [rest for name, rest in steps if name in ("COPY", "RUN")]
    assert order[0].startswith("requirements.txt constraints.txt pyproject.toml")
    assert "pip install" in order[1]
    assert order.index("deepstack_jax deepstack_jax") > 1
