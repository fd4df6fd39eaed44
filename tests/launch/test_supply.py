"""Every launch script: what it installs is pinned, nothing downloaded is run unseen, no words of a user are read as code."""

import re

import pytest

from tests.launch.scripts import LAUNCH

FILES = sorted(path.name for path in LAUNCH.iterdir() if path.is_file() and path.suffix != ".txt")
# (what must not be there, why)
FORBIDDEN = (
    (r"\|\s*(sudo\s+)?(ba|da|z)?sh\b", "what is downloaded, run without a look"),
    (r"\beval\b", "words read as code"),
    (r"\bbash -c \"(?!\$script\")", "a command put together as text"),
    (r"\bcurl\b(?!.*--fail)|\bcurl\b(?!.*--proto =https)|curl.*(-k\b|--insecure)", "an answer that may be anybody's"),
    (r"http://", "without encryption"),
    (r"privileged: true|hostNetwork|hostPath|--privileged", "rights of the machine"),
    (r"StrictHostKeyChecking|chmod (-R )?[0-7]*[2367]\b", "open to others"),
    (r"[^$\w{}]/tmp/", "a name in /tmp that another user may take first"),
    (r":latest\b", "another image tomorrow"),
)


def commands(name: str) -> str:
    """A script without its comments, continued lines joined."""
    lines = [line for line in (LAUNCH / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    return re.sub(r"\\\n\s*", "", "\n".join(lines))


@pytest.mark.parametrize("name", FILES)
def test_nothing_that_opens_a_door(name):
    text = commands(name)
    assert not [(why, found[0]) for pattern, why in FORBIDDEN for found in re.finditer(pattern, text, re.MULTILINE)]


@pytest.mark.parametrize("name", FILES)
def test_every_install_says_which_version(name):
    for line in commands(name).splitlines():
        if re.search(r"\bapt-get install\b", line) and "python3-pip" not in line:  # that one is the system's own
            assert re.search(r'"\w+=\$\w+"$', line), line
        if re.search(r"\bpip\"? install\b", line) and not re.search(r"\b(die|need_tool) ", line):
            pinned = "--require-hashes" in line or "--constraint" in line or name == "Dockerfile"  # by its ARGs
            assert pinned, line


def test_uv_is_known_by_its_hash():
    (line,) = [line for line in (LAUNCH / "uv.txt").read_text().splitlines() if not line.startswith("#")]
    assert re.fullmatch(r"uv==\d+\.\d+\.\d+ --hash=sha256:[0-9a-f]{64}", line)
