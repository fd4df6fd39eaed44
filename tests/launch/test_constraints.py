"""constraints.txt: one version of every package for every Python, each within the ranges of requirements.txt."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch import constraints
from tests.launch.scripts import REPOSITORY

PYTHONS = ("3.11", "3.12", "3.13")


def read(name: str) -> list[Requirement]:
    lines = [re.sub(r"(^| )#.*", "", line).strip() for line in (REPOSITORY / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def pins(python: str) -> dict[str, str]:
    """Name -> version on that Python."""
    here = [pin for pin in read("constraints.txt") if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    names = [canonicalize_name(pin.name) for pin in here]
    assert len(names) == len(set(names)), "a package with two versions"
    assert all(len(pin.specifier) == 1 and next(iter(pin.specifier)).operator == "==" for pin in here)
    return {name: next(iter(pin.specifier)).version for name, pin in zip(names, here, strict=True)}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_range(python):
    found = pins(python)
    for wanted in read("requirements.txt"):
        version = found.get(canonicalize_name(wanted.name))
        assert version, f"{wanted.name} is not pinned: make constraints"
        assert wanted.specifier.contains(version), f"{wanted.name} {version} is not {wanted.specifier}: make constraints"


@pytest.mark.parametrize("python", PYTHONS)
def test_what_accelerators_need_and_what_builds_the_package_is_pinned_too(python):
    found = pins(python)
    assert {"jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13", "gcsfs"} <= set(found)
    assert found["jaxlib"] == found["jax-cuda13-plugin"] == found["jax-cuda13-pjrt"] == found["jax"]
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        (build,) = map(Requirement, tomllib.load(file)["build-system"]["requires"])
    assert build.specifier.contains(found[build.name])


def test_one_line_where_interpreters_agree_and_two_with_markers_where_not():
    older, newer = {"a": "1", "b": "1", "old": "3"}, {"a": "1", "b": "2", "new": "4"}
    assert constraints.lines(older, newer) == [
        "a==1",
        'b==1 ; python_version < "3.12"',
        'b==2 ; python_version >= "3.12"',
        'new==4 ; python_version >= "3.12"',
        'old==3 ; python_version < "3.12"',
    ]


def test_two_environments_are_asked_for(capsys):
    assert constraints.main([]) == 1
    assert capsys.readouterr().err.startswith("error: expected the environments of Python 3.11 and of a newer one")
