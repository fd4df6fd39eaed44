"""One runner of verbs for all tests of a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.verb import ask_fork

Runner = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def runner() -> Runner:
    """Runs a verb, or a piece of Python, in a process of its own that begins with everything imported."""
    return ask_fork
