"""Parameters out of stored tensors: matched by name first, then read leaf by leaf, each straight to where it belongs.

Host memory beyond the arrays that come out: on a CPU, where jax takes over the host's arrays, one tensor of the
checkpoint; elsewhere one parameter, or with shardings those of its parts that this host holds.
"""

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike

from deepstack_jax.config import Config
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.forms import DRAWN
from deepstack_jax.types import PyTree
from deepstack_jax.weights.names import NameTable, ParameterLeaf, to_ours
from deepstack_jax.weights.stored_tensor import StoredTensor, aligned_empty, copy_into

_QUANTISED = (".absmax", ".qweight", ".qzeros", ".scales", ".SCB", "weight_scale", "quant_map")


class StoredLeaf:
    """A parameter that lies on disk: `leaf[index]` reads what the index asks for.

    Attributes:
      shape, dtype: of the parameter as a whole; elements are cast to `dtype` on the way.
    """

    def __init__(
        self, leaf: ParameterLeaf, tensors: Mapping[str, StoredTensor], dtype: DTypeLike, fresh: Any, unfinite: list[str]
    ) -> None:
        self.shape, self.dtype = leaf.shape, np.dtype(dtype)
        self._leaf, self._tensors, self._fresh, self._unfinite = leaf, tensors, fresh, unfinite

    def __getitem__(self, index: int | tuple[slice, ...]) -> np.ndarray:
        """A copy of one layer, or of a block given by one slice per axis."""
        if isinstance(index, int):
            return self._layer(index, ())
        if not self._leaf.stacked:
            return self._layer(0, index)
        layers = range(*index[0].indices(self.shape[0]))
        inner = tuple(len(range(*part.indices(n))) for part, n in zip(index[1:], self._leaf.layer_shape, strict=True))
        block = aligned_empty((len(layers), *inner), self.dtype)
        for at, layer in enumerate(layers):
            self._layer(layer, index[1:], block[at])
        return block

    def _layer(self, layer: int, index: tuple[slice, ...], out: np.ndarray | None = None) -> np.ndarray:
        piece = self._leaf.pieces[layer]
        if piece.name in self._tensors:
            rows = self._tensors[piece.name].read()[piece.start : piece.stop]
            part = to_ours(rows, self._leaf.layout, self._leaf.layer_shape)[index]
        else:
            part = np.asarray(self._fresh[(layer, *index)] if self._leaf.stacked else self._fresh[index])
        out = aligned_empty(part.shape, self.dtype) if out is None else out
        copy_into(out, part)
        if not self._unfinite and not is_finite(out):
            self._unfinite.append(piece.name)
            warnings.warn(
                f"the weights hold NaN or infinite numbers, first seen in {piece.name}: what they compute will be NaN; copy or "
                "download them again",
                stacklevel=2,
            )
        return out


def is_finite(array: np.ndarray) -> bool:
    """Whether no element of a contiguous array is NaN or infinite, which have every bit of the exponent set; reads it once."""
    info = ml_dtypes.finfo(array.dtype)
    bits, exponent = array.reshape(-1).view(f"u{array.itemsize}"), ((1 << info.nexp) - 1) << info.nmant
    strip = 2**18  # elements, that stay in the cache
    return all((bits[at : at + strip] & exponent).max() < exponent for at in range(0, bits.size, strip))


def stored_leaves(
    tensors: Mapping[str, StoredTensor],
    config: Config,
    dtype: DTypeLike | Mapping[str, DTypeLike] = np.float32,
    fresh: Mapping[str, Any] | None = None,
) -> dict[str, StoredLeaf]:
    """Every parameter of the model by its "/"-joined path, ready to be read.

    Args:
      tensors: by official name (`open_checkpoint` gives them).
      dtype: of what is read; one for all, or one for every path.
      fresh: freshly drawn arrays by path, for parameters or layers that the checkpoint may lack; see `absent_leaves`.

    Raises:
      WeightsError: tensors are missing, left over or misshapen; all of them are listed, with a guess at the cause.
    """
    table, fresh = NameTable(config), fresh or {}
    check_tensors({name: tensor.shape for name, tensor in tensors.items()}, table, drawn=fresh)
    whole = [
        f"{name} is {tensors[name].dtype}" for name in table.tensors if name in tensors and tensors[name].dtype.kind in "iub"
    ]
    if whole:
        raise WeightsError(
            f"weights must be floating point, got {'; '.join(whole)}; give the folder of the full-precision model"
        )
    kinds = dtype if isinstance(dtype, Mapping) else dict.fromkeys(table.leaves, dtype)
    unfinite: list[str] = []  # one for all, so that it is said once
    return {path: StoredLeaf(leaf, tensors, kinds[path], fresh.get(path), unfinite) for path, leaf in table.leaves.items()}


def load_params(
    tensors: Mapping[str, StoredTensor],
    config: Config,
    dtype: DTypeLike | Mapping[str, DTypeLike] = np.float32,
    shardings: PyTree | None = None,
    fresh: Mapping[str, Any] | None = None,
    keep: Callable[[str, jax.Array], Any] = lambda path, array: array,
) -> PyTree:
    """The parameter tree {"embed": {...}, ...} that `model.apply({"params": ...})` takes; all else as `stored_leaves`.

    Args:
      shardings: a tree of shardings like the parameters; each device's part is read for itself. None: the default device.
      keep: what becomes of a parameter, by its path, before the next one is read.
    """
    leaves = stored_leaves(tensors, config, dtype, fresh)
    places: dict[str, Any] = {} if shardings is None else traverse_util.flatten_dict(shardings, sep="/")
    kept = {path: keep(path, _place(leaf, places.get(path))) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(kept, sep="/")


def _place(leaf: StoredLeaf, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        array = jax.device_put(leaf[tuple(slice(None) for _ in leaf.shape)])
    else:
        blocks: dict[str, np.ndarray] = {}  # devices that hold the same part share one read

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or tuple(slice(None) for _ in leaf.shape)
            if str(index) not in blocks:
                blocks[str(index)] = leaf[index]
            return blocks[str(index)]

        array = jax.make_array_from_callback(leaf.shape, sharding, block)
    return array.block_until_ready()  # or the host's copies of several leaves would exist side by side


def absent_leaves(tensors: Collection[str], config: Config) -> tuple[str, ...]:
    """Paths of the parameters that no base model has and these tensors lack, whole or in some layers.

    A new run draws them: the projector over a bare language model, mergers, `image_newline`, and layers after a plain tower.
    """
    return tuple(
        path
        for path, leaf in NameTable(config).leaves.items()
        if any(piece.name not in tensors and piece.name.startswith(DRAWN) for piece in leaf.pieces)
    )


def check_tensors(shapes: Mapping[str, tuple[int, ...]], table: NameTable, drawn: Collection[str] = ()) -> None:
    """Refuse tensors that are not exactly those of the table; the WeightsError lists what is missing, unknown or misshapen.

    Args:
      shapes: of the tensors there are, by official name. drawn: paths that need not be there.
    """
    missing = [n for n, t in table.tensors.items() if n not in shapes and not all(path in drawn for path, _ in t.parts)]
    unknown = [name for name in shapes if name not in table.tensors]
    wrong = {n: t.shape for n, t in table.tensors.items() if n in shapes and tuple(shapes[n]) != t.shape}
    if not (missing or unknown or wrong):
        return
    problems = []
    for kind, names in (("missing", missing), ("unknown", unknown)):
        if names:
            problems.append(f"{len(names)} {kind}: {shorten(names)}")
    if wrong:
        listed = [f"{name} is {list(shapes[name])}, expected {list(shape)}" for name, shape in wrong.items()]
        problems.append(f"{len(wrong)} misshapen: {shorten(listed, '; ')}")
    guess = _cause(missing, unknown, wrong, shapes)
    raise WeightsError(f"the tensors do not fit the model of config.json: {'; '.join(problems)}. {guess}")


def shorten(names: list[str], between: str = ", ") -> str:
    """Names with their layer numbers folded together, so that 32 layers are one entry; all of them appear."""
    groups: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        key = f"{name[: match.start()]}{{}}{name[match.end() :]}" if match else name
        groups.setdefault(key, []).append(int(match.group()) if match else -1)
    return between.join(key.replace("{}", _ranges(numbers)) for key, numbers in groups.items())


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
    return text if text.isdigit() else f"{{{text}}}"


def _cause(missing: list[str], unknown: list[str], wrong: Mapping[str, tuple[int, ...]], shapes: Mapping[str, Any]) -> str:
    """What most probably happened, and what to do."""
    if any("lora_" in name for name in unknown):
        return "These are LoRA weights: give their base model, and the folder with their adapter_config.json with --adapter=DIR"
    if any(name.endswith(_QUANTISED) for name in unknown):
        return "The weights are quantised: give the folder of the full-precision model"
    if missing == ["lm_head.weight"]:
        return "The head seems tied to the embeddings, which is not so in this model; give a checkpoint with a head of its own"
    if vocab := [name for name in wrong if name in ("lm_head.weight", "model.embed_tokens.weight")]:
        return (
            f"The embeddings have {shapes[vocab[0]][0]} rows, vocab_size in config.json is {wrong[vocab[0]][0]}: tokens "
            "were added, or the official loader resized them; set vocab_size to the rows that are there"
        )
    if any(name.startswith("model.layers.") for name in (*missing, *unknown)):
        if missing and unknown:
            return "The names are another architecture's: compare model_type in config.json with the weights"
        return "num_hidden_layers in config.json is not what the files hold, or a shard is missing"
    if missing and all(name.startswith("model.vision_tower.") for name in missing):
        return "The vision tower is not in the checkpoint: give its folder with --tower=DIR"
    if missing and all("mm_projector" in name for name in missing) and any("mm_projector" in name for name in shapes):
        return "The projector has other layers than mm_projector_type in config.json says; compare the two"
    if missing and all("mm_projector" in name for name in missing):
        return "There is no projector: give it with --projector=FILE (mm_projector.bin), or train one over a bare model"
    if any("deepstack_mergers" in name for name in (*missing, *unknown)):
        return "Mergers go with config.deepstack.taps, one for each; say there what the weights were trained with"
    if any("image_newline" in name for name in (*missing, *unknown)):
        return "image_newline goes with mm_patch_merge_type spatial_unpad or is_anyres_deepstack; check config.json"
    return "A file may be missing or belong to another model: compare the folder with its source"
