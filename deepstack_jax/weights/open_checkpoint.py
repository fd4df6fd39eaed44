"""Opening a checkpoint: which folders belong to it, and all of its tensors under one naming."""

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub import constants as hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from ml_collections import ConfigDict

from deepstack_jax.config import Config, build_config, to_dict
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.base import (
    EMBEDDINGS,
    HEAD,
    TOWER,
    decoder_from,
    language_models,
    tower_family,
    tower_from,
    tower_of,
)
from deepstack_jax.families.forms import BUFFERS, NEWLINE, canonical, check_against, from_hf, may_say
from deepstack_jax.families.llava_hf import is_llava_hf
from deepstack_jax.families.official import PASSTHROUGH_KEYS, VERBATIM_KEYS, tower_to_hf, with_data
from deepstack_jax.families.processor import image_values
from deepstack_jax.families.values import section, word
from deepstack_jax.printing import quote
from deepstack_jax.weights.checkpoint_files import (
    has_tower_json,
    open_weight_files,
    processor_of,
    read_model_json,
    read_tower_json,
    tower_files,
    weight_files,
)
from deepstack_jax.weights.export_folder import has_tokenizer
from deepstack_jax.weights.stored_tensor import BEYOND_FILE, StoredTensor

# Towers whose sizes are the defaults of our Config: a checkpoint with one of them inside needs no second folder.
_DEFAULT_TOWERS = ("openai/clip-vit-large-patch14-336",)
_FILES = (".safetensors", ".bin", ".json", ".pt", ".pth", ".ckpt", ".gguf", ".zip", ".tar", ".gz")  # ends of no hub id


@dataclass(frozen=True)
class StoredModel:
    """A model on disk, found and described, not yet read."""

    path: Path  # its folder
    config: Config  # what it computes
    tensors: Mapping[str, StoredTensor]  # by official name; `load_params(checkpoint.tensors, checkpoint.config)` reads them
    tokenizer: str  # folder with the tokenizer's files, or ""
    template: str  # of the conversations that such a model is trained with
    tower: str  # folder of its vision tower, or ""
    ends: tuple[int, ...]  # ids that end an answer besides the tokenizer's own (generation_config.json, or else config.json)
    passthrough: Mapping[str, Any]  # keys of its config.json that our Config does not describe, for an export
    bare: bool = False  # whether it is a bare language model, on which `config` builds what a run or a recipe says

    @property
    def template_told(self) -> bool:
        """Whether an export of ours says the template beside the official files; else it follows from the architecture."""
        file = self.path / BEYOND_FILE
        return file.is_file() and "data.template" in read_model_json(file)


def open_checkpoint(
    path: str | Path,
    *,
    tower: str = "",
    base: str = "",
    projector: str = "",
    run: Config | None = None,
    recipe: Config | None = None,
) -> StoredModel:
    """Find everything that belongs to a checkpoint; reads its JSON files and the tables of its weight files.

    What it is is told by config.json alone. Tensors inside the folder win over those of `tower` and `base`, a projector
    file over all; what is missing in the end shows when parameters are loaded.

    Args:
      path: a folder, or a hub id (looked for in the local cache first).
      tower: folder or hub id of the vision tower, in place of config.json's mm_vision_tower.
      base: folder or hub id of the language model under a folder that holds a projector alone (LLaVA's stage 1).
      projector: an mm_projector.bin, in place of the one in the folder.
      run: a run's configuration: it says what is computed; the sizes must agree.
      recipe: where there is no run, what is built on a bare language model, which needs one of them.

    Raises:
      WeightsError: something is missing, ambiguous, or of a kind that is not read here.
    """
    folder = find_folder(path)
    if (folder / "adapter_config.json").exists():
        raise WeightsError(
            f"{folder} holds a LoRA adapter, expected whole weights; give its base model, and this folder with --adapter=DIR"
        )
    values = read_model_json(folder / "config.json")
    bare = word(values, "model_type") in language_models()
    tower_folder = _tower_folder(folder, values, tower)
    base_folder = find_folder(base) if base else None
    tensors = _collect(folder, values, base_folder, tower_folder, projector)
    stored = _describe(folder, values, tower_folder, tensors, run or recipe)
    seen = tower_of(stored)
    for name in [name for name in tensors if name.startswith(TOWER) and seen.official_name(name.removeprefix(TOWER)) is None]:
        del tensors[name]  # of the whole model that the tower is a part of
    if base_folder is not None:
        _check_base(base_folder, stored)
    stored = _with_head(folder, stored, tensors, run)
    config = _with_beyond(stored, folder)
    passthrough = _passthrough(values, (*PASSTHROUGH_KEYS, *VERBATIM_KEYS))
    if tower_folder is not None:
        passthrough |= _passthrough(read_tower_json(tower_folder), ("projection_dim",))
    if run is not None:
        check_against(run, config, bare=bare)
        _drop_newline(folder, run, tensors)
    return StoredModel(
        path=folder,
        config=run or config,
        tensors=tensors,
        tokenizer=next((str(at) for at in (folder, base_folder) if at is not None and has_tokenizer(at)), ""),
        template=config.data.template if run is None else stored.data.template,
        tower=str(tower_folder or ""),
        ends=end_tokens(folder),
        passthrough=passthrough,
        bare=bare,
    )


def _drop_newline(folder: Path, run: Config, tensors: dict[str, StoredTensor]) -> None:
    """Leave out, and say, the parameter of the ends of rows where a run has none."""
    if NEWLINE in tensors and not run.image.newline:
        mode = f"config.image.mode={run.image.mode!r}"
        warnings.warn(f"{folder} has an image_newline, which {mode} does not use", stacklevel=3)
        del tensors[NEWLINE]


def _tower_folder(folder: Path, values: Mapping[str, Any], tower: str) -> Path | None:
    """Where the vision tower is: the one asked for, or that of config.json; None where `llava-hf` holds its own, or nowhere."""
    named = values.get("mm_vision_tower") or ""
    if not isinstance(named, str):
        raise WeightsError(
            f"config.json: mm_vision_tower is {quote(named)}, expected the name of a folder; take it from the source"
        )
    return None if is_llava_hf(values) and not tower else find_tower(tower or named, folder, bool(tower))


def _passthrough(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """What an export writes again without looking at it: numbers and lists of them, and the words that say what is computed."""
    found = {key: value for key, value in values.items() if key in keys}
    for key, value in found.items():
        several = value if isinstance(value, list) else [value]
        if key not in VERBATIM_KEYS and not all(n is None or isinstance(n, int | float) for n in several):
            raise WeightsError(f"config.json: {key} is {quote(value)}, expected a number; take it from the model's source")
    return found


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Ids that end an answer, by generation_config.json or else config.json, as transformers does; none without either."""
    file = next((at for at in (folder / "generation_config.json", folder / "config.json") if at.is_file()), None)
    values = read_model_json(file) if file else {}
    said = {**section(values, "text_config"), **values}
    ids = said.get("eos_token_id", [])
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(id) is int and 0 <= id < 2**31 for id in ids):
        raise WeightsError(f"{file and file.name}: eos_token_id is {quote(ids)}, expected ids; take it from the model's source")
    return tuple(ids)


def find_folder(path: str | Path) -> Path:
    """The folder of a path or hub id; what is fetched is said first, and what looks like a path is never asked for."""
    folder = Path(path).expanduser()
    if os.path.isdir(folder):  # unlike Path.is_dir, says no to a name that is too long
        return folder
    name = str(path)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise WeightsError(
            f"no folder {quote(name)}; give a checkpoint folder with its config.json, or a hub id such as org/name"
        )
    if os.path.lexists(name.partition("/")[0]) or name.endswith(_FILES):
        raise WeightsError(f"no folder {name}, and it is not asked for on the hub, as it looks like a path; correct the path")
    cached = _cached(name)
    if cached is not None and (cached / "config.json").exists():
        try:
            weight_files(cached)
            return cached
        except WeightsError:  # only a part of it was ever fetched
            pass
    if not huggingface_hub.is_offline_mode():
        token = "with your token" if huggingface_hub.get_token() else "without a token"
        place = f"{hub.ENDPOINT}/{name} into {hub.HF_HUB_CACHE}"
        warnings.warn(f"there is no folder {name}: fetching {place}, {token}", stacklevel=2)
    try:
        rest = ["*.json", "*.model", "*.txt", "mm_projector.bin"]
        fetched = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*rest, "*.safetensors"]))
        if not any(fetched.glob("*.safetensors")):
            huggingface_hub.snapshot_download(name, allow_patterns=[*rest, "*.bin"])
        return fetched
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"{name} is not a folder, and cannot be fetched from the hub ({reason}); give a folder") from error


def _cached(name: str) -> Path | None:
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def find_tower(name: str, beside: Path, must: bool = False) -> Path | None:
    """The vision tower's folder: an absolute path, beside config.json, in its parent folder, or in the hub cache; else None.

    Args:
      name: a path or hub id. beside: the folder with config.json.
      must: the user named it: then it may also lie in the working directory or on the hub, and must be found.
    """
    if must:
        return find_folder(name)
    if not name:
        return None
    places = [Path(name)] if Path(name).is_absolute() else [beside / name, beside.resolve().parent / name]
    found = next((place for place in places if has_tower_json(place)), None)
    if found is None and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        found = _cached(name)
    return found if found is not None and has_tower_json(found) else None


def _describe(
    folder: Path, values: Mapping[str, Any], tower: Path | None, tensors: Mapping[str, StoredTensor], run: Config | None
) -> Config:
    """The Config of the folder's config.json and its tower's; a bare language model takes its recipe from the run."""
    name = values.get("mm_vision_tower")
    tower_json = read_tower_json(tower) if tower is not None else None
    if tower_json is None and name in _DEFAULT_TOWERS and any(tensor.startswith(TOWER) for tensor in tensors):
        tower_json = tower_to_hf(Config())
    beside = folder if is_llava_hf(values) else tower
    pixels = processor_of(beside) if beside is not None else {}
    if values.get("model_type") not in language_models():
        return from_hf(values, tower_json, pixels)
    if run is None or tower_json is None:
        raise WeightsError(
            f"{folder} is a bare {values['model_type']}: what is built on it is not said; "
            + ("give the vision tower's folder with --tower=DIR" if run is not None else "train on it first (finetune.py)")
        )
    (vision, size), own = tower_from(tower_json), tower_family(tower_json).processor
    kind = values["model_type"]
    built = dataclasses.replace(
        run,
        vision=dataclasses.replace(vision, feature_layer=run.vision.feature_layer, post_layers=run.vision.post_layers),
        image=dataclasses.replace(run.image, size=size, **image_values(pixels, size, run.image.kind, "bare", own)),
        decoder=decoder_from(values, kind),
    )
    return with_data(built, built.decoder.max_positions, language_models()[kind].template)


def _with_beyond(stored: Config, folder: Path) -> Config:
    """The Config with what an export of ours wrote beside the official files."""
    file = folder / BEYOND_FILE
    if not file.is_file():
        return stored
    said, values = read_model_json(file), ConfigDict(to_dict(stored), convert_dict=True)
    if foreign := [key for key, value in said.items() if not may_say(key, value)]:
        raise WeightsError(
            f"{file} has {quote(foreign[0])}: {quote(said[foreign[0]])}, which no export writes there; delete the file to "
            "load the plain model"
        )
    try:
        values.update_from_flattened_dict(said)
        config = build_config(values)
        check_against(config, stored)
        return config
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WeightsError(f"{file} does not fit the rest of the folder: {error}; delete it to load the plain model") from error


def _check_base(base: Path, stored: Config) -> None:
    """Refuse a base model of other sizes than the projector's config.json says."""
    values = read_model_json(base / "config.json")
    if word(values, "model_type") in language_models():
        decoder = decoder_from(values, values["model_type"])
        try:
            check_against(stored, dataclasses.replace(stored, decoder=decoder))
        except WeightsError as error:
            raise WeightsError(f"--base={base}: {error}") from error


def _collect(
    folder: Path, values: Mapping[str, Any], base: Path | None, tower: Path | None, projector: str
) -> dict[str, StoredTensor]:
    """All tensors by official name: the folder's own, then what the others add."""
    own = folder / "mm_projector.bin"
    try:
        files = weight_files(folder, word(values, "transformers_weights"))
    except WeightsError:
        if not own.is_file():
            raise
        if base is None:
            raise WeightsError(f"{folder} holds a projector alone; give its language model with --base=DIR") from None
        files = []
    tensors = _named(files, _naming(values))
    if projector or not any(".mm_projector." in name for name in tensors):
        file = Path(projector).expanduser() if projector else own
        if projector and not file.is_file():
            raise WeightsError(f"no file {file}; give an mm_projector.bin with --projector=FILE")
        if file.is_file():
            tensors |= _named([file], lambda name: (canonical(name, "projector"),))
    if base is not None:
        tensors = _named(weight_files(base), _naming(read_model_json(base / "config.json"))) | tensors
    if tower is not None and not any(name.startswith(TOWER) for name in tensors):
        tensors |= _named(tower_files(tower), tower_family(read_tower_json(tower)).official_names)
    return tensors


def _with_head(folder: Path, stored: Config, tensors: dict[str, StoredTensor], run: Config | None) -> Config:
    """The Config with what is so of its head: tied only where no other one is in the files, as in transformers.

    A run with a head of its own over tied embeddings, as all were before they could be tied, begins with a copy of them.
    """
    if not stored.decoder.tied_head:
        return stored
    untied = dataclasses.replace(stored, decoder=dataclasses.replace(stored.decoder, tied_head=False))
    if HEAD in tensors and EMBEDDINGS in tensors:
        if not np.array_equal(tensors[HEAD].read(), tensors[EMBEDDINGS].read()):
            both = "but holds a head that differs from its embeddings"
            warnings.warn(f"{folder} says tie_word_embeddings, {both}; it is taken as a head of its own", stacklevel=3)
            return untied
        del tensors[HEAD]
    if HEAD in tensors:
        tensors[EMBEDDINGS] = tensors.pop(HEAD)
    if run is not None and not run.decoder.tied_head and EMBEDDINGS in tensors:
        copied = "here the head is a copy of them, which trains by itself (config.decoder.tied_head is False)"
        warnings.warn(f"{folder} has its embeddings as head too; {copied}", stacklevel=3)
        tensors[HEAD] = tensors[EMBEDDINGS]
        return untied
    return stored


def _naming(values: Mapping[str, Any]) -> Callable[[str], tuple[str, ...]]:
    naming = "llava-hf" if is_llava_hf(values) else "official"
    return lambda name: (canonical(name, naming),)


def _named(files: Iterable[Path], official_names: Callable[[str], tuple[str, ...]]) -> dict[str, StoredTensor]:
    """Tensors by the names that `official_names` gives to the parts of each, none leaving one out.

    WeightsError lists those there twice.
    """
    found: dict[str, StoredTensor] = {}
    twice = []
    for name, tensor in open_weight_files(files):
        names = () if name.endswith(BUFFERS) else official_names(name)
        for at, official in enumerate(names):
            if official in found:
                twice.append(f"{official} in {found[official].file.name} and {tensor.file.name}")
            found[official] = tensor.part(at, len(names))
    if twice:
        raise WeightsError(
            f"{len(twice)} tensors are in the folder twice: {'; '.join(twice)}. Files of two checkpoints may be mixed: "
            "keep those of one, with their index"
        )
    return found
