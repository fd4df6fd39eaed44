"""A configuration that leaves keys to the weights, with what the weights say: JSON files and tables are read, no arrays."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepstack_jax.config import Config, TrainConfig, filled_in, left_open
from deepstack_jax.config.chat_template import own_template
from deepstack_jax.data.encode.tokenizer import fitting_templates, lacking_end_of_turn, load_tokenizer
from deepstack_jax.errors import ConfigError, flags_as
from deepstack_jax.families.forms import keys_of_weights
from deepstack_jax.train.checkpoint.init_weights import WEIGHT_FLAGS, check_there
from deepstack_jax.train.checkpoint.reading import saved_steps
from deepstack_jax.train.checkpoint.restore_params import config_of, is_workdir
from deepstack_jax.weights.open_checkpoint import StoredModel, open_checkpoint

LENGTH = 2048  # positions of a row, unless images need more or the weights were trained with less
ROOM_FOR_TEXT = 1024  # positions beside an example's images
COMMON_TEMPLATES = ("chatml", "llama_3", "phi3_instruct", "v1")


def fill_config(
    values: Mapping[str, Any], workdir: Path | None = None, weights: str = "", dtype: str = TrainConfig.compute_dtype
) -> dict[str, Any]:
    """The values of a configuration, with those that are left to the weights.

    Args:
      values: as a configuration file and flags give them, None where a key is left open.
      workdir: of the run. One that has begun knows all that it was begun with: the weights need not be there any more.
      weights: a folder of weights or a workdir, where `train.weights` names none.
      dtype: of activations, where they are left open.

    Raises:
      ConfigError: no weights are named, something of them is missing, or a given value contradicts them.
    """
    if not left_open(values):
        return dict(values)
    if workdir is not None and saved_steps(workdir):
        return filled_in(values, config_of(workdir))
    train = values["train"]
    name = train["weights"] or weights
    if not name:
        raise ConfigError(
            "config.train.weights is empty, and this configuration takes its sizes from there; name the folder of the "
            "checkpoint with --config.train.weights=DIR"
        )
    whole = is_workdir(name)
    check_there(TrainConfig(weights=name, tower=train["tower"], projector=train["projector"]), tower=not whole)
    if whole:
        known, bare = config_of(Path(name).expanduser()), False
    else:
        projector = "" if is_workdir(train["projector"]) else train["projector"]
        with flags_as(WEIGHT_FLAGS):
            found = open_checkpoint(name, tower=train["tower"], projector=projector, recipe=Config())
        if not train["projector"] and not any(".mm_projector." in tensor for tensor in found.tensors):
            warnings.warn(
                f"{name} holds no projector: a fresh one is drawn, which has to learn first; see docs/finetune.md", stacklevel=2
            )
        known, bare = _described(found, values["data"]["max_images"], values["data"]["template"] is None), found.bare
    known = dataclasses.replace(known, train=dataclasses.replace(known.train, compute_dtype=dtype))
    sizes = [".".join(key) for key in keys_of_weights(known, bare=bare)]
    return filled_in(values, known, sizes, name)


def _described(found: StoredModel, images: int, choose_template: bool) -> Config:
    """The Config of a folder, with its tokenizer, and rows no longer than training needs.

    Args:
      images: that an example may have.
      choose_template: whether to look for another template where the tokenizer lacks the usual one's end of turn.
    """
    config = found.config
    needed = images * config.layout.max_tokens + ROOM_FOR_TEXT
    length = max(LENGTH, 1 << (needed - 1).bit_length())
    data = dataclasses.replace(
        config.data,
        template=_template_for(found) if choose_template else found.template,
        tokenizer=os.path.abspath(found.tokenizer) if found.tokenizer else config.data.tokenizer,
        max_length=min(length, max(config.data.max_length, needed - ROOM_FOR_TEXT + 1)),
    )
    return dataclasses.replace(config, data=data)


def _template_for(found: StoredModel) -> str:
    """The chat template of the folder; without one that which such checkpoints usually have, or a common one whose end of turn
    the tokenizer has, which is said."""
    if not found.template_told and (own := own_template(found.tokenizer or found.path, dated=True)):
        return own
    if not found.tokenizer:
        return found.template
    try:
        tokenizer = load_tokenizer(found.tokenizer)
    except (ValueError, OSError):  # which is said when it is opened
        return found.template
    end, fitting = lacking_end_of_turn(found.template, tokenizer), fitting_templates(tokenizer)
    chosen = next((name for name in COMMON_TEMPLATES if end and name in fitting), found.template)
    if chosen != found.template:
        warnings.warn(
            f"such checkpoints usually have config.data.template={found.template!r}, but {end} is no token of the tokenizer in "
            f"{found.tokenizer}; taken is {chosen!r}, whose end of turn it has",
            stacklevel=2,
        )
    return chosen
