"""The blocks of code in the documents, and the commands that a shell makes of them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")),
)
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\s*(\$ |python3? -m |make |pip3? install|uv pip |launch/|hf download|sbatch |git clone)", re.MULTILINE)
SECONDS = 120  # after which a block that waits for something is given up, on a busy machine too

# Programs that a block may call. `test_blocks.py` has rules for the first; nobody here knows the flags of the others.
KNOWN = ("python", "python3", "python3.12", "pip", "uv", "hf", "make", "sbatch", "docker")
OTHERS = ("curl", "gcloud", "gcsfuse", "kubectl", "tar", "unzip", "wget")
SYSTEM = ("bash", "cat", "mkdir", "dirname", "basename", "sed", "awk", "head", "mktemp", "rm", "ln", "git", "base64")


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    document: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Call:
    """One program that a block started."""

    block: str  # its name
    folder: str  # where it ran, relative to the scratch folder
    words: tuple[str, ...]
    variables: dict[str, str]  # of jax and XLA, that the block set


def blocks() -> list[Block]:
    """All of them, in the order of the documents."""
    return [block for document in DOCUMENTS for block in of_text(document, (REPOSITORY / document).read_text())]


def of_text(document: str, text: str) -> Iterator[Block]:
    for found in FENCE.finditer(text):
        yield Block(document, text[: found.start()].count("\n") + 1, found[1], found[2])


def unfenced(text: str) -> list[str]:
    """Lines that are code without a fence, by their indentation, and look like a command."""
    return [line for line in FENCE.sub("", text).splitlines() if line.startswith("    ") and COMMAND.match(line)]


def commands_of_console(block: Block) -> list[tuple[str, str, str]]:
    """(command, what is typed into it, what it prints) of every `$ ` in a console block; typed lines begin with `> `."""
    found = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, *rest = part.splitlines()
        typed = "".join(f"{line[2:]}\n" for line in rest if line.startswith("> "))
        found.append((command, typed, "".join(f"{line}\n" for line in rest if not line.startswith("> "))))
    return found


def scratch_folder(folder: Path) -> Path:
    """A place that looks like the root of a clone to a block, where launch scripts run dry and programs only leave a note."""
    (folder / "stubs").mkdir(parents=True)
    for name in (*KNOWN, *OTHERS):
        _script(folder / "stubs" / name, f'note {name} "$@"')
    for name in SYSTEM:
        (folder / "stubs" / name).symlink_to(shutil.which(name) or "")
    dry = 'options=(); while [[ $1 != *.sbatch ]]; do shift; done; exec bash "$REPOSITORY/$1" --dry-run "${@:2}"'
    _script(folder / "stubs" / "sbatch", f'note sbatch "$@"; {dry}')
    for part in ("configs", "benchmarks", "deepstack_jax", "docs", "constraints.txt", "requirements.txt", "pyproject.toml"):
        (folder / part).symlink_to(REPOSITORY / part)
    (folder / "launch").mkdir()
    for path in (REPOSITORY / "launch").iterdir():
        if path.suffix == ".sh":
            _script(
                folder / "launch" / path.name, f'note launch/{path.name} "$@"; exec bash "{path}" "$1" --dry-run "${{@:2}}"'
            )
        else:
            (folder / "launch" / path.name).symlink_to(path)
    archives = folder / "data" / "LLaVA-NeXT-Data" / "llava_next_raw_format"
    archives.mkdir(parents=True)
    (archives / "images.tar.gz").touch()
    (folder / "photo.jpg").touch()
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    for name in ("pip", "python"):
        (folder / ".venv" / "bin" / name).symlink_to(folder / "stubs" / name)
    return folder


def _script(path: Path, body: str) -> None:
    note = (
        'note() { { printf "%q " "$BLOCK" "$PWD" "$@"; printf "%s\\n" "|${XLA_FLAGS:-}|${NPROC:-}"; } >>"$CALLS"; }\n'
        "[ -t 0 ] || cat >/dev/null 2>&1 || true\n"
    )
    path.write_text(f"#!{shutil.which('bash')}\n{note}{body}\n")
    path.chmod(0o755)


def run_shell(document: Sequence[Block], folder: Path) -> tuple[subprocess.CompletedProcess[str], list[Call]]:
    """The shell blocks of one document, one after another as a reader does who follows it; and all that they called.

    A mistake in a line of shell, a program that is not known above, a variable that nothing sets, and a launch script that
    refuses its arguments end it with a code that is not 0.
    """
    calls = folder / "calls"
    calls.write_text("")
    script = ["set -euo pipefail"]
    for block in document:
        script += [f"export BLOCK={block.name}", f"cd {shlex.quote(str(folder))}", block.text]
    environment = {
        "PATH": str(folder / "stubs"),
        "HOME": str(folder),
        "CALLS": str(calls),
        "REPOSITORY": str(REPOSITORY),
        "LC_ALL": "C",
    }
    environment["ROOT"] = str(folder / "data")  # which a document tells its reader to set
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    found = []
    for line in calls.read_text().splitlines():
        said, flags, processors = line.rsplit("|", 2)
        block, where, *words = shlex.split(said)
        kept = {"XLA_FLAGS": flags, "NPROC": processors}
        found.append(
            Call(block, os.path.relpath(where, folder), tuple(words), {name: value for name, value in kept.items() if value})
        )
    return done, found
