"""What a run was made from: enough to tell two runs apart, and to do one again."""

import hashlib
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from deepstack_jax import __version__

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "chex", "ml_collections"),
    *("transformers", "tokenizers", "sentencepiece", "numpy", "pillow", "array_record", "pyarrow"),
)


def run_manifest(data: dict[str, Any]) -> dict[str, Any]:
    """Command line, code, versions, devices and data of this attempt.

    Args:
      data: files, digests and rows, see `describe_data`.
    """
    devices = jax.devices()
    return {
        "command": sys.argv,
        "git": git_revision(Path(__file__).parent),
        "versions": {"deepstack_jax": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "hosts": {"count": jax.process_count(), "first": platform.node(), "system": platform.platform()},
        "data": data | {"sha256": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()},
    }


def git_revision(folder: Path) -> str:
    """Commit of the checkout that a folder belongs to, with "+changes" where files differ from it; "" outside of one."""

    def ask(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return ask("rev-parse", "HEAD") + ("+changes" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
