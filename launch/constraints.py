"""Write constraints.txt, the tested versions that launch/Dockerfile and launch/worker.sh install; `make constraints` runs it.

  python launch/constraints.py .venv/bin/python .venv-3.12/bin/python

Versions are those of the environments named, in which the tests ran: one of Python 3.11 and one of a newer Python, whose jax is
newer. What only an accelerator needs (libtpu, CUDA) is in no environment here; pip chooses it to go with the rest.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
WANTED = (".[tpu,cuda,gcs,serve,quantised]", "setuptools>=77")  # setuptools builds the package
MARKERS = ('python_version < "3.12"', 'python_version >= "3.12"')
HEAD = """\
# The versions with which the tests ran, for machines that should all be alike: pip install --constraint constraints.txt .
# Written by `make constraints`; requirements.txt has the ranges that hold. Python 3.11 has an older jax than 3.12 and 3.13.
"""


def versions(python: str) -> dict[str, str]:
    """Name -> version of all that the package and its extras install on an interpreter, what is there already kept."""
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet")
    frozen = subprocess.run([*pip, "freeze", "--exclude-editable"], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(
            "".join(line for line in frozen.stdout.splitlines(True) if "==" in line and not line.startswith("setuptools="))
        )
        file.flush()
        install = ("install", "--dry-run", "--ignore-installed", f"--constraint={file.name}", "--report=-", *WANTED)
        report = subprocess.run([*pip, *install], check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    packages = (entry["metadata"] for entry in json.loads(report.stdout)["install"] if "dir_info" not in entry["download_info"])
    return {package["name"].lower().replace("_", "-").replace(".", "-"): package["version"] for package in packages}


def lines(older: dict[str, str], newer: dict[str, str]) -> list[str]:
    """One pin a package, two with markers where the interpreters differ."""
    written = []
    for name in sorted(older | newer):
        pair = (older.get(name), newer.get(name))
        if pair[0] == pair[1]:
            written.append(f"{name}=={pair[0]}")
        else:
            written += [f"{name}=={version} ; {marker}" for version, marker in zip(pair, MARKERS, strict=True) if version]
    return written


def main(pythons: list[str]) -> int:
    ask = "import sys; print(*sys.version_info[:2])"
    found = [subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout for python in pythons]
    if sorted(text.split()[1] == "11" for text in found) != [False, True]:
        have = ", ".join(".".join(text.split()) for text in found) or "none"
        print(
            f"error: expected the environments of Python 3.11 and of a newer one, in which the tests ran, got {have}; "
            "make venv && make venv PYTHON=python3.12",
            file=sys.stderr,
        )
        return 1
    older, newer = (versions(python) for _, python in sorted(zip((text != "3 11\n" for text in found), pythons, strict=True)))
    (REPOSITORY / "constraints.txt").write_text(HEAD + "".join(f"{line}\n" for line in lines(older, newer)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
