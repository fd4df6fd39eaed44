"""How our parameters are called elsewhere: one table per model, read in both directions.

A row pairs a path in our tree with a name in an official checkpoint; `{}` counts layers, which we stack along axis 0. Its
layout says how the tensor is turned, its sizes what shape it has, in letters that `Table` replaces by a config's numbers; a bar
stands between a kernel's inputs and outputs. Every layout is a bijection. Other projects' names are rewritten to the official
ones first (`canonical`), so there is no second table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from deepstack_jax.config import Config

TOWER = "model.vision_tower.vision_tower."
POST_ENCODER = "model.vision_tower.post_encoder.{}."


class Row(NamedTuple):
    """One parameter under both names."""

    ours: str  # "/"-joined path in the parameter tree
    theirs: str
    layout: str  # same | linear | patches
    sizes: str  # of one layer, e.g. "D | N H"
    behind: str = ""  # the name of the layers behind the tower's own


_EMBEDDINGS = TOWER + "vision_model.embeddings."
_CLIP_LAYER = TOWER + "vision_model.encoder.layers.{}."


def _in_clip_layers(ours: str, leaf: str, theirs: str, layout: str, sizes: str) -> Row:
    return Row(f"vision_tower/layers/block/{ours}/{leaf}", _CLIP_LAYER + theirs, layout, sizes, POST_ENCODER + theirs)


CLIP_ROWS = (
    Row("vision_tower/cls", _EMBEDDINGS + "class_embedding", "same", "E"),
    Row("vision_tower/patch_embed/kernel", _EMBEDDINGS + "patch_embedding.weight", "patches", "q | E"),
    Row("vision_tower/positions", _EMBEDDINGS + "position_embedding.weight", "same", "A E"),
    *(
        Row(f"vision_tower/{ours}/{leaf}", f"{TOWER}vision_model.{theirs}.{name}", "same", "E")
        for ours, theirs in (("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm"))
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    ),
    *(
        _in_clip_layers(ours, leaf, f"{theirs}.{name}", "same", "E")
        for ours, theirs in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"))
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    ),
    *(
        _in_clip_layers(ours, leaf, f"{theirs}.{name}", layout, sizes)
        for ours, theirs, kernel, bias in (
            ("q", "self_attn.q_proj", "E | n h", "n h"),
            ("k", "self_attn.k_proj", "E | n h", "n h"),
            ("v", "self_attn.v_proj", "E | n h", "n h"),
            ("o", "self_attn.out_proj", "n h | E", "E"),
            ("fc1", "mlp.fc1", "E | f", "f"),
            ("fc2", "mlp.fc2", "f | E", "E"),
        )
        for leaf, name, layout, sizes in (("kernel", "weight", "linear", kernel), ("bias", "bias", "flat", bias))
    ),
)

_LAYER = "model.layers.{}."


def _decoder_rows(names: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of a decoder; `names` says how its kernels are called. Kernels of one name are fused, in the order given here."""
    kernels = (
        ("attention/q", "D | N H"),
        ("attention/k", "D | K H"),
        ("attention/v", "D | K H"),
        ("attention/o", "N H | D"),
        ("mlp/gate", "D | F"),
        ("mlp/up", "D | F"),
        ("mlp/down", "F | D"),
    )
    return (
        Row("embed/embedding", "model.embed_tokens.weight", "same", "V D"),
        Row("head/kernel", "lm_head.weight", "linear", "D | V"),
        Row("layers/norm/scale", "model.norm.weight", "same", "D"),
        Row("layers/layers/block/attention_norm/scale", _LAYER + "input_layernorm.weight", "same", "D"),
        Row("layers/layers/block/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight", "same", "D"),
        *(Row(f"layers/layers/block/{ours}/kernel", f"{_LAYER}{names[ours]}.weight", "linear", s) for ours, s in kernels),
    )


_LLAMA = {
    **{f"attention/{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"mlp/{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_PHI3 = _LLAMA | dict.fromkeys(("attention/q", "attention/k", "attention/v"), "self_attn.qkv_proj")
_PHI3 |= dict.fromkeys(("mlp/gate", "mlp/up"), "mlp.gate_up_proj")
DECODER_ROWS = {"llama": _decoder_rows(_LLAMA), "phi3": _decoder_rows(_PHI3)}


def _projector_rows(layers: int) -> tuple[Row, ...]:
    """Rows of a projector; upstream counts the activations between its layers too, and does not count a single one."""
    return tuple(
        Row(f"projector/fc{at + 1}/{leaf}", f"model.mm_projector.{'' if layers == 1 else f'{2 * at}.'}{name}", layout, sizes)
        for at in range(layers)
        for leaf, name, layout, sizes in (
            ("kernel", "weight", "linear", "D | D" if at else "E | D"),
            ("bias", "bias", "same", "D"),
        )
    )


NEWLINE_ROWS = (Row("image_newline", "model.image_newline", "same", "D"),)


def official_rows(config: Config) -> tuple[Row, ...]:
    """The table of an official DeepStack (or original LLaVA) checkpoint, vision tower inside."""
    newline = NEWLINE_ROWS if config.newline else ()
    return CLIP_ROWS + _projector_rows(config.projector.layers) + DECODER_ROWS[config.decoder.architecture] + newline


class Piece(NamedTuple):
    """Where one layer of a parameter stands: rows `start` to `stop` of the tensor `name`."""

    name: str
    start: int
    stop: int


class Leaf(NamedTuple):
    """A parameter of ours: its whole shape, and one piece per layer (or one alone)."""

    shape: tuple[int, ...]
    layer_shape: tuple[int, ...]
    layout: str
    inputs: int  # leading axes of a layer that a kernel contracts
    stacked: bool
    pieces: tuple[Piece, ...]


class Foreign(NamedTuple):
    """A tensor of theirs: its shape, and the (path, layer) whose rows it holds, in order."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]


class Table:
    """The rows of one configuration, with numbers.

    Attributes:
      leaves: by our path. tensors: by the official name, in the order of the model.
    """

    def __init__(self, config: Config) -> None:
        vision, decoder = config.vision, config.decoder
        letters = _letters(config)
        self.leaves: dict[str, Leaf] = {}
        self.tensors: dict[str, Foreign] = {}
        for row in official_rows(config):
            ins, _, outs = row.sizes.rpartition("|")
            inner, outer = (tuple(letters[letter] for letter in side.split()) for side in (ins, outs))
            names = [row.theirs]
            if row.behind:
                names = [row.theirs.format(layer) for layer in range(vision.layers)]
                names += [row.behind.format(layer) for layer in range(vision.post_layers)]
            elif "{}" in row.theirs:
                names = [row.theirs.format(layer) for layer in range(decoder.layers)]
            shape = self._foreign_shape(row.layout, inner, outer, vision.patch_size)
            pieces = tuple(self._claim(name, row.ours, at, shape) for at, name in enumerate(names))
            stacked = "{}" in row.theirs
            full = (len(names), *inner, *outer) if stacked else (*inner, *outer)
            self.leaves[row.ours] = Leaf(full, (*inner, *outer), row.layout, len(inner), stacked, pieces)

    @staticmethod
    def _foreign_shape(layout: str, inner: tuple[int, ...], outer: tuple[int, ...], patch: int) -> tuple[int, ...]:
        if layout == "linear":
            return math.prod(outer), math.prod(inner)
        if layout == "patches":
            return *outer, 3, patch, patch
        return (math.prod(outer),) if layout == "flat" else outer

    def _claim(self, name: str, path: str, layer: int, shape: tuple[int, ...]) -> Piece:
        """The next rows of the tensor `name`, which another parameter may have begun (Phi-3 fuses)."""
        before = self.tensors.get(name, Foreign((0, *shape[1:]), ()))
        start = before.shape[0]
        self.tensors[name] = Foreign((start + shape[0], *shape[1:]), (*before.parts, (path, layer)))
        return Piece(name, start, start + shape[0])


def _letters(config: Config) -> dict[str, int]:
    """The sizes behind the letters of the rows; small letters are the tower's, D to V the decoder's."""
    vision, decoder = config.vision, config.decoder
    return {
        "E": vision.width,
        "A": config.patch_side**2 + 1,  # patches and CLS
        "q": vision.patch_size**2 * 3,
        "n": vision.heads,
        "h": vision.width // vision.heads,
        "f": vision.mlp,
        "D": decoder.width,
        "N": decoder.heads,
        "K": decoder.kv_heads,
        "H": decoder.head_dim,
        "F": decoder.mlp,
        "V": decoder.vocab_size,
    }


def to_ours(tensor: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    """One layer's foreign tensor as ours, of `shape` (without the layer axis); a view wherever numpy can make one."""
    if layout == "linear":
        tensor = tensor.T
    elif layout == "patches":
        tensor = tensor.transpose(2, 3, 1, 0)
    if tensor.size != math.prod(shape):
        raise ValueError(f"a tensor of shape {tensor.shape} cannot become {shape}")
    return tensor.reshape(shape)


def to_theirs(layer: np.ndarray, leaf: Leaf, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_ours`: one layer of a parameter as rows of the foreign tensor of `shape`."""
    if leaf.layout == "linear":
        return layer.reshape(math.prod(layer.shape[: leaf.inputs]), -1).T
    if leaf.layout == "patches":
        return layer.reshape(*shape[2:], 3, -1).transpose(3, 2, 0, 1)
    return layer.reshape(-1, *shape[1:])


# Prefixes of other projects, longest first where one begins another, and what they are in an official checkpoint.
_LLAVA_HF = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    *(
        (f"{head}{theirs}", ours)
        for head in ("model.", "")
        for theirs, ours in (
            ("vision_tower.vision_model.", TOWER + "vision_model."),
            ("vision_tower.", TOWER + "vision_model."),
            ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
            ("image_newline", "model.image_newline"),
        )
    ),
)
_CLIP = (("vision_model.", TOWER + "vision_model."), *((p, f"{TOWER}vision_model.{p}") for p in ("embeddings.", "encoder.")))
_CLIP += tuple((p, f"{TOWER}vision_model.{p}") for p in ("pre_layrnorm.", "post_layernorm."))
_PROJECTOR = tuple((head + "mm_projector.", "model.mm_projector.") for head in ("model.", "base_model.model.model.", ""))
NAMINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "official": (),
    "llava-hf": _LLAVA_HF,
    "clip": _CLIP,
    "projector": (*_PROJECTOR, *((head + "image_newline", "model.image_newline") for head in ("model.", ""))),
}
# Buffers that older versions of transformers saved: computed, not learned.
BUFFERS = (".position_ids", ".rotary_emb.inv_freq")
# Of a whole CLIP, what the tower does not need.
NOT_THE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


def canonical(name: str, naming: str) -> str | None:
    """The official name of a tensor that `naming` calls `name`; None for what no model here has a parameter for."""
    if name.endswith(BUFFERS) or (naming == "clip" and name.startswith(NOT_THE_TOWER)):
        return None
    for theirs, official in NAMINGS[naming]:
        if name.startswith(theirs):
            return official + name[len(theirs) :]
    return name


def llava_hf_name(official: str) -> str:
    """What `llava-hf` folders call an official tensor."""
    rules = sorted((rule for rule in _LLAVA_HF if not rule[0].startswith("model.")), key=lambda rule: -len(rule[1]))
    return next((theirs + official[len(ours) :] for theirs, ours in rules if official.startswith(ours)), official)
