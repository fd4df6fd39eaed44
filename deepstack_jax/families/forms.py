"""The forms that a checkpoint folder can have: what its config.json says, and what it calls its tensors.

A form is official (DeepStack, and the LLaVA before it) or `llava-hf`; a folder may also hold a bare language model, a bare
tower, or a projector alone. Each asks the families of the two parts for what is theirs.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from deepstack_jax.config import Config
from deepstack_jax.config.checks import check_config
from deepstack_jax.errors import WeightsError, nearest
from deepstack_jax.families.base import Names, Row, decoder_of, language_models, tower_of
from deepstack_jax.families.llava_hf import MODEL_TYPES, NAMES, from_llava_hf, is_llava_hf
from deepstack_jax.families.official import VERBATIM_KEYS, from_official, official_types, to_official, tower_to_hf
from deepstack_jax.families.processor import preprocessor_to_hf
from deepstack_jax.families.values import present, word
from deepstack_jax.printing import quote

FORMATS = ("official", "llava-hf")
# Keys of vision and decoder that say how a model is drawn, run or read, not what its weights are.
HOW_IT_RUNS = ("position_std", "embed_std", "head_std", "scan", "remat")
_NOT_OF_THE_WEIGHTS = (*HOW_IT_RUNS, "feature_layer", "feature_norm", "post_layers", "max_positions")
_SECTIONS = ("image.", "vision.", "projector.", "decoder.", "deepstack.")  # of the configuration, that say what is computed
PROJECTOR, MERGERS, NEWLINE = "model.mm_projector.", "model.deepstack_mergers.", "model.image_newline"
# Beginnings of the tensors that no base model has: a new run draws them where its weights lack them.
DRAWN = (PROJECTOR, MERGERS, NEWLINE, "model.vision_tower.post_encoder.")
# What folders call the tensors of an mm_projector.bin, and their beginnings in an official checkpoint.
_PROJECTOR = (
    *((head + "mm_projector.", PROJECTOR) for head in ("model.", "base_model.model.model.", "")),
    *((head + "image_newline", NEWLINE) for head in ("model.", "")),
)
# Buffers that older versions of transformers saved: computed, not learned.
BUFFERS = (".position_ids", ".rotary_emb.inv_freq")


def from_hf(
    values: Mapping[str, Any], tower: Mapping[str, Any] | None = None, preprocessor: Mapping[str, Any] | None = None
) -> Config:
    """The Config of a checkpoint: model, image and DeepStack sections, template and length.

    Args:
      values: its config.json.
      tower: config.json of the vision tower that it names; `llava-hf` folders hold their own.
      preprocessor: settings of the image processor beside the tower (beside the folder's config.json for `llava-hf`).

    Raises:
      WeightsError: a value that is unknown or not implemented; going on would compute another model than the file's.
    """
    values, tower, pixels = present(values), present(tower), present(preprocessor or {})
    kind = word(values, "model_type")
    if "quantization_config" in values:
        raise WeightsError("config.json: quantization_config is set; quantised weights are not read: give the full model")
    inner = is_llava_hf(values) and kind in MODEL_TYPES
    if not inner and kind not in official_types():
        valid = sorted({*official_types(), *MODEL_TYPES})
        raise WeightsError(
            f"config.json: model_type is {quote(kind)}, expected {', '.join(valid)} (a bare {', '.join(language_models())} "
            f"needs --tower and a recipe); {nearest(kind[:100], valid)}"
        )
    try:
        config = from_llava_hf(values, pixels) if inner else from_official(values, tower, pixels)
        check_config(config)
        return config
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"config.json describes a model that cannot run: {error}") from error


def to_hf(config: Config, passthrough: Mapping[str, Any] | None = None, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of an official folder; WeightsError where the official code has no such model.

    Args:
      passthrough: keys that our Config does not describe (token ids above all), as `StoredModel.passthrough`.
      dtype: of the tensors beside it.
    """
    values, passthrough = to_official(config, passthrough or {}, dtype), passthrough or {}
    tower, pixels = tower_to_hf(config), preprocessor_to_hf(config)

    def config_of(values: Mapping[str, Any]) -> Config | None:
        with warnings.catch_warnings(action="ignore"):
            try:
                return from_hf(values, tower, pixels)
            except WeightsError:
                return None

    # The words of the folder that the model came from, where they still say the same: the order of ablations, "inconsistent"
    # for "anyres_unpad", any start after the last layer, what upstream does not look at (an HD folder's sampling).
    wanted = [key for key in VERBATIM_KEYS if key in values and passthrough.get(key, values[key]) != values[key]]
    meant = config_of(values) if wanted else None
    for key in wanted:
        worded = values | {key: passthrough[key]}
        if meant is not None and config_of(worded) == meant:
            values = worded
    return dict(sorted(values.items()))


def may_say(key: str, value: Any) -> bool:
    """Whether deepstack_jax.json may say this beside official files: what is computed, and words of its own, never a path."""
    if key == "data.tokenizer":
        return isinstance(value, str) and (value == "bytes" or value.startswith("words:")) and not value.startswith("words:@")
    runs = key.startswith(("vision.", "decoder.")) and key.partition(".")[2] in HOW_IT_RUNS
    return key == "data.template" or (key.startswith(_SECTIONS) and not runs)


def keys_of_weights(config: Config, *, bare: bool = False) -> list[tuple[str, str]]:
    """(section, key) of all in which a run has to be as its weights are.

    Args:
      bare: they are a bare tower and a bare language model, which say nothing about the feature layer.
    """
    keys = [("image", "size"), *(() if bare else (("vision", "feature_layer"), ("projector", "layers")))]
    for name, section in (("vision", config.vision), ("decoder", config.decoder)):
        keys += [(name, field.name) for field in dataclasses.fields(section) if field.name not in _NOT_OF_THE_WEIGHTS]
    return keys


def check_against(run: Config, stored: Config, *, bare: bool = False) -> None:
    """Refuse weights of other sizes than a run's model has; the WeightsError lists every key that differs, both values."""
    keys = keys_of_weights(run, bare=bare)
    ours, theirs = dataclasses.asdict(run), dataclasses.asdict(stored)
    differing = [
        f"config.{section}.{name} is {ours[section][name]}, the weights have {theirs[section].get(name)}"
        for section, name in keys
        if ours[section][name] != theirs[section].get(name)
    ]
    if stored.deepstack.taps and run.deepstack.taps != stored.deepstack.taps:  # without mergers there, new ones are drawn
        differing.append(f"config.deepstack.taps is {run.deepstack.taps}, the weights have {stored.deepstack.taps}")
    if differing:
        raise WeightsError(f"the weights are of another model than the run's: {'; '.join(differing)}; change one of them")


def model_names(config: Config) -> Iterator[Names]:
    """The tables of all parts of an official checkpoint, vision tower inside, in its order."""
    yield tower_of(config).names(config)
    yield from projector_names(config)
    yield decoder_of(config).names(config)
    if config.image.newline:
        yield Names((Row("image_newline", NEWLINE, "same", "D"),), {"D": config.decoder.width})


def projector_names(config: Config) -> Iterator[Names]:
    """The table of the projector, then those of the mergers of taps, whose names within are Qwen3-VL's.

    Upstream counts the activations between a projector's layers too, and does not count a single layer.
    """
    layers, sizes = config.projector.layers, {"C": config.projected, "E": config.vision.width, "D": config.decoder.width}
    places = [PROJECTOR if layers == 1 else f"{PROJECTOR}{2 * at}." for at in range(layers)]
    shared = [_linear(f"projector/fc{at}", place, "C" if at == 1 else "D", "D") for at, place in enumerate(places, 1)]
    yield Names(tuple(row for rows in shared for row in rows), sizes)
    for number in range(len(config.deepstack.taps)):
        ours, theirs = f"deepstack_mergers_{number}", f"{MERGERS}{number}."
        norm = (
            Row(f"{ours}/norm/{leaf}", f"{theirs}norm.{name}", "same", "E")
            for leaf, name in (("scale", "weight"), ("bias", "bias"))
        )
        first = _linear(f"{ours}/fc1", f"{theirs}linear_fc1.", "E", "E")
        yield Names((*norm, *first, *_linear(f"{ours}/fc2", f"{theirs}linear_fc2.", "E", "D")), sizes)


def _linear(ours: str, theirs: str, inputs: str, outputs: str) -> tuple[Row, Row]:
    kernel = Row(f"{ours}/kernel", f"{theirs}weight", "linear", f"{inputs} | {outputs}")
    return kernel, Row(f"{ours}/bias", f"{theirs}bias", "same", outputs)


def canonical(name: str, naming: str) -> str:
    """The official name of a tensor.

    Args:
      naming: official | llava-hf | projector, of the file that holds it; for a tower's own folder ask its family.
    """
    rules = {"official": (), "llava-hf": NAMES, "projector": _PROJECTOR}[naming]
    return next((official + name[len(theirs) :] for theirs, official in rules if name.startswith(theirs)), name)
