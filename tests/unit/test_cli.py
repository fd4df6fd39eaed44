"""How a verb ends: a user's mistake, a full disk and too little memory in one line, a defect with its traceback."""

import subprocess
import sys

import pytest

HEAD = "import errno, sys; from deepstack_jax import cli; sys.argv = ['verb']"
EXHAUSTED = "RESOURCE_EXHAUSTED: "


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
        (
            "raise OSError(errno.EIO, 'Input/output error', 'runs/a/metrics.jsonl')",
            "cannot read or write runs/a/metrics.jsonl: Input/output error; run the same command again when that is mended",
        ),
        ("raise MemoryError", "out of memory: this process was given no more; use a machine with more"),
        ("raise OSError(errno.EDQUOT, 'Disk quota exceeded')", "cannot write: Disk quota exceeded; make room and run the same"),
        (
            "import jax; jax.numpy.zeros(1 << 50, 'int8').block_until_ready()",
            "out of memory: Out of memory allocating 1,125,899.9 G",
        ),
        (
            f"raise ValueError('{EXHAUSTED}Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm.')",
            "out of memory: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm; use a machine with more",
        ),
    ],
)
def test_one_line(body, message):
    done = ending(body)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "body",
    [
        "raise OSError(errno.EBADF, 'Bad file descriptor')",
        "raise RuntimeError('a defect')",
        f"raise ValueError('{EXHAUSTED}Error writing file: No space left on device')",
    ],
)
def test_a_defect_keeps_its_traceback(body):
    done = ending(body)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
