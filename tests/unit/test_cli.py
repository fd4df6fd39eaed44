"""How a verb ends: a user's mistake and a full disk in one line, a defect with its traceback."""

import subprocess
import sys

import pytest

HEAD = "import errno, sys; from deepstack_jax import cli; sys.argv = ['verb']"


def ending(body: str) -> subprocess.CompletedProcess[str]:
    """A verb whose main is `body`."""
    lines = [HEAD, "def main():", *(f"    {line}" for line in body.splitlines()), "cli.run(main, (), '')"]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', 'runs/a/x.json')",
            "cannot write runs/a/x.json: No space",
        ),
        ("raise OSError(errno.EDQUOT, 'Disk quota exceeded')", "cannot write: Disk quota exceeded; make room and run the same"),
    ],
)
def test_one_line(body, message):
    done = ending(body)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("body", ["raise OSError(errno.EBADF, 'Bad file descriptor')", "raise RuntimeError('a defect')"])
def test_a_defect_keeps_its_traceback(body):
    done = ending(body)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
