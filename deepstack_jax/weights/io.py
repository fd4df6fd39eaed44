"""Reading checkpoint folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open

from deepstack_jax.config_checks import ConfigError
from deepstack_jax.weights.names import from_official


def weight_files(folder: str) -> list[Path]:
    """The safetensors files of a checkpoint folder.

    Raises:
      ConfigError: the folder is not there or holds none; says what to give and which flag points to it.
    """
    files = sorted(Path(folder).expanduser().glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"no *.safetensors in {folder}; give a DeepStack or LLaVA-1.5 checkpoint folder with --config.train.weights=DIR"
        )
    return files


def load_official(folder: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Parameters ({"a/b/c": f32 array}) from a folder of an official DeepStack or LLaVA-1.5 checkpoint in safetensors.

    Args:
      folder: holds one or several *.safetensors files, vision tower included.
      shapes: of every parameter that the model wants.

    Raises:
      ConfigError: as `weight_files`.
      ValueError: tensors are missing, left over or misshapen; all of them are named.
    """
    tensors: dict[str, np.ndarray] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="numpy") as opened:
            tensors |= {name: opened.get_tensor(name).astype(np.float32) for name in opened.keys()}  # noqa: SIM118 (no dict)
    return from_official(tensors, shapes)
