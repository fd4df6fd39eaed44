"""How our parameters are called elsewhere: one table per model, read in both directions.

A row pairs a path in our tree with a name in a Hugging Face checkpoint; `{}` counts layers, which we stack along axis 0. The
layout says how the tensor is turned; every layout is a bijection given our shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """One parameter under both names."""

    ours: str  # "/"-joined path in the parameter tree
    theirs: str
    layout: str  # same | linear | patches


_CLIP = "vision_model."
_CLIP_LAYER = "vision_model.encoder.layers.{}."
CLIP_ROWS = (
    Row("vision_tower/cls", _CLIP + "embeddings.class_embedding", "same"),
    Row("vision_tower/patch_embed/kernel", _CLIP + "embeddings.patch_embedding.weight", "patches"),
    Row("vision_tower/positions", _CLIP + "embeddings.position_embedding.weight", "same"),
    *(
        Row(f"vision_tower/{ours}/{leaf}", f"{_CLIP}{theirs}.{name}", "same")
        for ours, theirs in (("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm"))
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    ),
    *(
        Row(f"vision_tower/layers/block/{ours}/{leaf}", f"{_CLIP_LAYER}{theirs}.{name}", "same")
        for ours, theirs in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"))
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    ),
    *(
        Row(f"vision_tower/layers/block/{ours}/{leaf}", f"{_CLIP_LAYER}{theirs}.{name}", layout)
        for ours, theirs in (
            ("q", "self_attn.q_proj"),
            ("k", "self_attn.k_proj"),
            ("v", "self_attn.v_proj"),
            ("o", "self_attn.out_proj"),
            ("fc1", "mlp.fc1"),
            ("fc2", "mlp.fc2"),
        )
        for leaf, name, layout in (("kernel", "weight", "linear"), ("bias", "bias", "same"))
    ),
)

_LLAMA_LAYER = "model.layers.{}."
LLAMA_ROWS = (
    Row("embed/embedding", "model.embed_tokens.weight", "same"),
    Row("head/kernel", "lm_head.weight", "linear"),
    Row("layers/norm/scale", "model.norm.weight", "same"),
    Row("layers/layers/block/attention_norm/scale", _LLAMA_LAYER + "input_layernorm.weight", "same"),
    Row("layers/layers/block/mlp_norm/scale", _LLAMA_LAYER + "post_attention_layernorm.weight", "same"),
    *(
        Row(f"layers/layers/block/{ours}/kernel", f"{_LLAMA_LAYER}{theirs}.weight", "linear")
        for ours, theirs in (
            ("attention/q", "self_attn.q_proj"),
            ("attention/k", "self_attn.k_proj"),
            ("attention/v", "self_attn.v_proj"),
            ("attention/o", "self_attn.o_proj"),
            ("mlp/gate", "mlp.gate_proj"),
            ("mlp/up", "mlp.up_proj"),
            ("mlp/down", "mlp.down_proj"),
        )
    ),
)

PROJECTOR_ROWS = tuple(
    Row(f"projector/{ours}/{leaf}", f"model.mm_projector.{theirs}.{name}", layout)
    for ours, theirs in (("fc1", "0"), ("fc2", "2"))
    for leaf, name, layout in (("kernel", "weight", "linear"), ("bias", "bias", "same"))
)

NEWLINE_ROWS = (Row("image_newline", "model.image_newline", "same"),)


def official_rows(newline: bool) -> tuple[Row, ...]:
    """The table of an official DeepStack (or original LLaVA) checkpoint with a LLaMA decoder, vision tower inside."""
    tower = tuple(row._replace(theirs="model.vision_tower.vision_tower." + row.theirs) for row in CLIP_ROWS)
    return tower + PROJECTOR_ROWS + LLAMA_ROWS + (NEWLINE_ROWS if newline else ())


def to_ours(tensor: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    """One layer's foreign tensor as ours, of `shape` (without the layer axis)."""
    if layout == "linear":
        tensor = tensor.T
    elif layout == "patches":
        tensor = tensor.transpose(2, 3, 1, 0)
    if tensor.size != int(np.prod(shape)):
        raise ValueError(f"a tensor of shape {tensor.shape} cannot become {shape}")
    return tensor.reshape(shape)


def from_official(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Our flat tree ("/"-joined path -> array of `shapes[path]`) out of an official checkpoint's tensors.

    Raises:
      ValueError: naming every tensor that is missing, left over or misshapen.
    """
    ours: dict[str, np.ndarray] = {}
    problems: list[str] = []
    used: set[str] = set()
    rows = {row.ours: row for row in official_rows("image_newline" in shapes)}
    for path, shape in shapes.items():
        row = rows[path]
        stacked = "{}" in row.theirs
        names = [row.theirs.format(layer) for layer in range(shape[0])] if stacked else [row.theirs]
        used.update(names)
        missing = [name for name in names if name not in tensors]
        if missing:
            problems.extend(f"missing {name}" for name in missing)
            continue
        try:
            layers = [to_ours(tensors[name], row.layout, shape[1:] if stacked else shape) for name in names]
        except ValueError as error:
            problems.append(f"{row.theirs}: {error}")
            continue
        ours[path] = np.stack(layers) if stacked else layers[0]
    problems.extend(f"left over {name}" for name in tensors if name not in used)
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit the model: " + "; ".join(problems))
    return ours
