"""One runner of verbs for all tests of a worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.docs.blocks import REPOSITORY
from tests.e2e.verb import ENVIRONMENT


class Runner:
    """Runs a verb, or a piece of Python, in a process of its own that begins with everything imported."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    command = [sys.executable, "-m", "tests.docs.runner"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Runner(process)
        assert process.stdin is not None
        process.stdin.close()
