"""Adapters from where they were trained, a run's workdir or a folder of PEFT, over the model that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deepstack_jax.config import Config
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.forms import check_against
from deepstack_jax.train.checkpoint.checksums import base_checksum_in_memory
from deepstack_jax.train.checkpoint.restore_params import is_workdir, restore_base, restore_params
from deepstack_jax.weights.adapters import is_adapter
from deepstack_jax.weights.peft import Adapter, is_peft, read_peft
from deepstack_jax.weights.save import LeafLike


def open_adapter(path: str | Path, config: Config) -> Adapter:
    """The adapters in a workdir or a folder of PEFT, for a model of `config`.

    Raises:
      WeightsError: there are none, or they are another model's. CheckpointError: no checkpoint can be read.
    """
    folder = Path(path).expanduser()
    if is_peft(folder):
        return read_peft(folder, config)
    if not is_workdir(folder):
        raise WeightsError(f"{folder} holds no adapters, expected the workdir of a run that trained some, or a folder of PEFT")
    step, run, leaves = restore_params(folder)
    if not any(map(is_adapter, leaves)):
        raise WeightsError(f"{folder} is a run without adapters; give it in the base's place")
    check_against(run, config)
    return Adapter(leaves, restore_base(folder, step), f"run {run.name}, step {step}")


def over_base(leaves: Mapping[str, LeafLike], adapter: Adapter, base: str | Path) -> dict[str, LeafLike]:
    """All parameters of a model with adapters, by path.

    Args:
      leaves: of the base. base: its name, for messages.

    Raises:
      WeightsError: the adapters were trained over another base, where it is known.
    """
    if adapter.base is not None:
        found = base_checksum_in_memory({path: leaf for path, leaf in leaves.items() if path not in adapter.leaves})
        check_base(adapter.base, found, str(base))
    return {**leaves, **adapter.leaves}


def check_base(trained_over: int, found: int, base: str) -> None:
    """Refuse a base that adapters were not trained over, each given by its checksum."""
    if trained_over != found:
        raise WeightsError(
            f"the adapters were trained over a base with checksum {trained_over:08x}, and {base} gives {found:08x}; give the "
            "weights that the run began with"
        )
