"""LoRA adapters as PEFT writes and reads them: adapter_config.json beside adapter_model.safetensors.

An adapter there belongs to a module of theirs, which may hold several kernels of ours (Phi-3's fused maps): then its lora_B is
cut over them, and what is written has one block of rank for each. Names are those of an official checkpoint, or of the modules
of transformers' Llava (`llava-hf`).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from deepstack_jax.atomic import write_json
from deepstack_jax.config import Config
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.base import EMBEDDINGS, HEAD, TOWER
from deepstack_jax.families.forms import canonical
from deepstack_jax.families.llava_hf import llava_hf_name
from deepstack_jax.printing import quote
from deepstack_jax.weights.adapters import adapter_paths
from deepstack_jax.weights.checkpoint_files import open_weight_files, read_model_json
from deepstack_jax.weights.export_folder import ADAPTER_FILES
from deepstack_jax.weights.names import NameTable, to_ours, to_theirs
from deepstack_jax.weights.save import with_image_row

CONFIG, WEIGHTS = ADAPTER_FILES
FORMATS = {"peft": "official", "peft-llava-hf": "llava-hf"}  # of `convert`: adapters alone, by whose names
_FILES = (WEIGHTS, "adapter_model.bin")
_HEAD = "base_model.model."
_CHECKSUM = "deepstack_jax.base"  # in the header of the file: PEFT does not look there
# Variants of LoRA that compute something else, and the value that says no.
_PLAIN = {
    "bias": "none",
    **dict.fromkeys(("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora"), False),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"), None),
}


class Adapter(NamedTuple):
    """Adapters and what else was trained with them.

    Attributes:
      leaves: by path; each replaces what the base has there, or is beside it.
      base: checksum of all other parameters, None where nothing says it.
      what: where it comes from, for messages.
    """

    leaves: dict[str, np.ndarray]
    base: int | None
    what: str


class _Pair(NamedTuple):
    """An adapter of one module of theirs."""

    a: np.ndarray  # f32[r, in]
    b: np.ndarray  # f32[out, r]
    scale: float


def is_peft(folder: str | Path) -> bool:
    """Whether a folder holds adapters of PEFT."""
    return (Path(folder).expanduser() / CONFIG).is_file()


def read_peft(folder: str | Path, config: Config) -> Adapter:
    """The adapters of a folder, by either naming, and the modules that were trained whole beside them (`modules_to_save`).

    Raises:
      WeightsError: a file is missing, it is another kind of adapter, or its tensors are not those of this model.
    """
    folder = Path(folder).expanduser()
    values, file = read_model_json(folder / CONFIG), next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder} has {CONFIG} and no {WEIGHTS}; fetch that too")
    _check_kind(folder, values)
    table = NameTable(config)
    sides: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    modules, whole, unknown = {}, {}, []
    for stored, tensor in open_weight_files([file]):
        inside = stored.removeprefix(_HEAD).replace(".modules_to_save.", ".")
        found = re.fullmatch(r"(.*)\.lora_([AB])\.(default\.)?weight", inside)
        official = _official(f"{found[1]}.weight" if found else inside, table)
        if official is None:
            unknown.append(stored)
            continue
        array, rows = np.asarray(tensor.read(), np.float32), table.tensors[official].shape[0]
        if official in (EMBEDDINGS, HEAD) and len(array) == rows + 1 and (found is None or found[2] == "B"):
            array = array[:rows]  # `llava-hf` has a row for images, where the base here has none
        if found:
            sides[official][found[2]], modules[official] = array, found[1]
        else:
            whole[official] = array
    unknown += [f"{name} without its other half" for name, pair in sides.items() if len(pair) < 2]
    if unknown or not sides:
        raise WeightsError(
            f"{file} holds {', '.join(unknown[:8]) or 'no adapters'}, which this model has no place for; give adapters that "
            "were trained over it"
        )
    pairs = {name: _Pair(one["A"], one["B"], _scale(values, modules[name], len(one["A"]))) for name, one in sides.items()}
    try:
        leaves = {**_adapters(pairs, table), **_whole(whole, table)}
    except (ValueError, KeyError) as error:
        raise WeightsError(f"{file} holds adapters of another model ({error}); give some that were trained over it") from error
    return Adapter(leaves, _checksum(file), str(folder))


def write_peft(folder: Path, adapter: Adapter, config: Config, form: str) -> None:
    """Write both files into an existing folder.

    Args:
      adapter: of a model of `config`.
      form: one of FORMATS.

    Raises:
      WeightsError: something trained beside the adapters that PEFT has no place for.
    """
    table, leaves = NameTable(config), adapter.leaves
    inside = FORMATS[form] == "llava-hf"
    theirs = _transformers_name if inside else lambda name: name
    scale = next(float(np.ravel(leaf)[0]) for path, leaf in leaves.items() if path.endswith("/lora_scale"))
    tensors, ranks, saved = {}, {}, []
    for name, (shape, parts) in table.tensors.items():
        module = theirs(name).rpartition(".")[0]
        rows = with_image_row if inside and name in (EMBEDDINGS, HEAD) else np.ascontiguousarray
        if any(adapter_paths(path)[0] in leaves for path, _ in parts):
            pair = _pair(parts, shape, table, leaves, scale)
            tensors |= {f"{_HEAD}{module}.lora_A.weight": pair.a, f"{_HEAD}{module}.lora_B.weight": rows(pair.b)}
            ranks[module] = len(pair.a)
        elif all(path in leaves for path, _ in parts):
            if name.endswith("image_newline"):
                raise WeightsError("image_newline was trained beside the adapters, and PEFT keeps modules only; merge instead")
            tensors[_HEAD + theirs(name)] = rows(table.theirs(name, leaves).astype(np.float32))
            saved.append(module)
    rank = max(ranks.values(), key=list(ranks.values()).count)
    others = {_pattern(module): other for module, other in ranks.items() if other != rank}
    values = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": others,
        "alpha_pattern": {pattern: scale * other for pattern, other in others.items()},
        "target_modules": "|".join(sorted({_pattern(module) for module in ranks})),
        "modules_to_save": sorted(set(saved)) or None,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    write_json(folder / CONFIG, values)
    base = {} if adapter.base is None else {_CHECKSUM: f"{adapter.base:08x}"}
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt", **base}))


def _check_kind(folder: Path, values: Mapping[str, Any]) -> None:
    told = {key: values[key] for key, plain in _PLAIN.items() if values.get(key) not in (plain, None, False)}
    if values.get("peft_type") != "LORA" or told:
        said = ", ".join(f"{key}={quote(value)}" for key, value in (told or {"peft_type": values.get("peft_type")}).items())
        raise WeightsError(f"{folder / CONFIG} has {said}, expected plain LoRA; merge it in PEFT and give the whole weights")


def _scale(values: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of a module, as PEFT finds it."""
    patterns = values.get("alpha_pattern") or {}
    alpha = next(
        (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), values.get("lora_alpha", 8)
    )
    if not isinstance(alpha, int | float):
        raise WeightsError(f"{CONFIG}: the alpha of {module} is {quote(alpha)}, expected a number; take it from the source")
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _official(name: str, table: NameTable) -> str | None:
    return next((one for one in (name, canonical(name, "llava-hf")) if one in table.tensors), None)


def _transformers_name(official: str) -> str:
    """The name of a parameter in transformers' own Llava, which a `llava-hf` folder's older names are turned into."""
    if official.startswith("lm_head."):
        return official
    if official.startswith(TOWER):
        return "model.vision_tower." + official.removeprefix(f"{TOWER}vision_model.")
    return "model." + llava_hf_name(official).replace("language_model.model.", "language_model.")


def _pattern(module: str) -> str:
    """The module's name in every layer."""
    return re.sub(r"(?<=layers\\\.)\d+", r"\\d+", re.escape(module))


def _adapters(pairs: Mapping[str, _Pair], table: NameTable) -> dict[str, np.ndarray]:
    """Pairs by official name as leaves by path; layers of a stack that have none get zeros."""
    left, made = set(pairs), {}
    for path, leaf in table.leaves.items():
        there = [piece.name for piece in leaf.pieces if piece.name in pairs]
        if not there or not path.endswith("/kernel"):
            continue
        left -= set(there)
        rank = max(len(pairs[name].a) for name in there)
        ins, outs = leaf.layer_shape[: leaf.inputs], leaf.layer_shape[leaf.inputs :]
        layers = []
        for name, start, stop in leaf.pieces:
            a, b, scale = np.zeros((*ins, rank), np.float32), np.zeros((rank, *outs), np.float32), np.float32(0)
            if name in pairs:
                pair = pairs[name]
                own = len(pair.a)
                a[..., :own] = to_ours(pair.a, leaf.layout, (*ins, own))
                b[:own] = pair.b.reshape(-1, own)[start:stop].T.reshape(own, *outs)
                scale = np.float32(pair.scale)
            layers.append((a, b, scale))
        parts = [np.stack(part) if leaf.stacked else np.asarray(part[0]) for part in zip(*layers, strict=True)]
        made |= dict(zip(adapter_paths(path), parts, strict=True))
    if left:
        raise ValueError(f"{', '.join(sorted(left)[:8])} is no linear map")
    return made


def _whole(tensors: Mapping[str, np.ndarray], table: NameTable) -> dict[str, np.ndarray]:
    """Tensors by official name as whole parameters by path."""
    left, made = set(tensors), {}
    for path, leaf in table.leaves.items():
        names = [piece.name for piece in leaf.pieces]
        if set(names) <= set(tensors):
            left -= set(names)
            layers = [
                to_ours(tensors[name][start:stop], leaf.layout, leaf.layer_shape).copy() for name, start, stop in leaf.pieces
            ]
            made[path] = np.stack(layers) if leaf.stacked else layers[0]
    if left:
        raise ValueError(f"{', '.join(sorted(left)[:8])} is there for some layers only")
    return made


def _pair(
    parts: tuple[tuple[str, int], ...],
    shape: tuple[int, ...],
    table: NameTable,
    leaves: Mapping[str, np.ndarray],
    scale: float,
) -> _Pair:
    """The adapter of the module whose tensor holds these parts: one block of its rank for each that has an adapter."""
    downs, blocks, rows = [], [], 0
    for path, layer in parts:
        leaf = table.leaves[path]
        size = math.prod(leaf.layer_shape[leaf.inputs :])
        if adapter_paths(path)[0] in leaves:
            a, b, own = (leaves[name][layer if leaf.stacked else ...] for name in adapter_paths(path))
            downs.append(to_theirs(a, leaf, shape))
            blocks.append((rows, b.reshape(len(b), -1).T * np.float32(own / scale)))
        rows += size
    a, at = np.ascontiguousarray(np.concatenate(downs), np.float32), 0
    b = np.zeros((rows, len(a)), np.float32)
    for first, block in blocks:
        b[first : first + len(block), at : at + block.shape[1]] = block
        at += block.shape[1]
    return _Pair(a, b.reshape(*b.shape, *(1 for _ in shape[2:])), scale)


def _checksum(file: Path) -> int | None:
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, "numpy") as opened:
        said = (opened.metadata() or {}).get(_CHECKSUM, "")
    return int(said, 16) if re.fullmatch(r"[0-9a-f]{8}", said) else None
