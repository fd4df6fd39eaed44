"""What a family of vision towers or decoders says of itself, and the one registry in which everybody looks it up.

A family subclasses `TowerFamily` or `DecoderFamily` and registers an instance. Towers and decoders combine freely; what a
checkpoint's config.json says of the pair is the business of the forms (`forms.py`). Nothing here imports jax: the data workers
read configurations too, and only `build` makes a flax module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from deepstack_jax.config import Config, DecoderConfig, VisionConfig, register_section
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.values import present, word
from deepstack_jax.printing import quote

if TYPE_CHECKING:
    import flax.linen as nn

TOWER = "model.vision_tower.vision_tower."  # what the names of a tower's tensors begin with in an official checkpoint
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


class Row(NamedTuple):
    """One parameter under both names."""

    ours: str  # "/"-joined path in the parameter tree
    theirs: str  # in an official checkpoint; `{}` is the beginning of a layer's names, whose layers we stack along axis 0
    layout: str  # same | linear | flat | patches: how the tensor is turned; each is a bijection
    sizes: str  # of one layer, in letters, e.g. "D | N H"; the bar is between a kernel's inputs and outputs


class Names(NamedTuple):
    """The rows of one part of a model, and what their letters and `{}` stand for."""

    rows: tuple[Row, ...]
    sizes: Mapping[str, int]
    layers: tuple[str, ...] = ()  # the beginning of each layer's names


class Processor(NamedTuple):
    """The image processor that a tower's own folder describes."""

    name: str  # its class is called so, and then ImageProcessor
    fill: str  # how it makes a square: "centre" (shorter side resized, centre cut) or "stretch"
    mean: tuple[float, float, float]  # where it says nothing
    std: tuple[float, float, float]


class LayerTerms(NamedTuple):
    """Costs of a layer beside its matrix products: elements for each token; along the tensor axis the part of a device."""

    kept: float  # of the backward pass where nothing is recomputed
    traffic: float  # read and written in one pass
    products: float = 0  # of `kept`, those of its products with weights
    working: float = 0  # alive at once while the layer runs, gradients included
    kernels: float = 0  # elements of its weights, not for each token


class Family:
    """What towers and decoders have in common."""

    architecture: str  # the value of `config.vision.architecture` or `config.decoder.architecture` that chooses it
    section: type  # class of its keys in the configuration
    model_types: tuple[str, ...]  # of the config.json that it reads
    last_kernel: str  # path, within a layer, of the kernel whose product a recomputed layer does not compute again


class TowerFamily(Family):
    """A vision tower: pixels to patch features."""

    section: type[VisionConfig] = VisionConfig
    folder: str  # what an export calls its own folder
    not_built: Mapping[str, str]  # model_type of a relative of it -> why there is none here, and which to take
    processor: Processor

    def build(self, config: Config, **settings: Any) -> nn.Module:
        """The flax module, of the interface of `model/vision.py`'s VisionTower.

        It gets `attend`, `dtype`, `crop_shards` and `tapped`: layers whose input is given too, after the feature layer's.
        """
        raise NotImplementedError

    def unused(self, vision: VisionConfig) -> tuple[str, ...]:
        """Beginnings of the parameters that no feature depends on."""
        return () if vision.feature_norm else ("vision_tower/post_norm/",)

    def prefix_tokens(self, vision: VisionConfig) -> int:
        """Tokens before the patches' own in every sequence, such as CLS."""
        raise NotImplementedError

    def names(self, config: Config) -> Names:
        """The table of its parameters; official names begin with TOWER."""
        raise NotImplementedError

    def official_name(self, name: str) -> str | None:
        """The official name of a tensor in the tower's own folder; None where the model has no such parameter."""
        return TOWER + name

    def official_names(self, name: str) -> tuple[str, ...]:
        """The same, as a tuple: where it names several, these are equal parts of the tensor's rows."""
        official = self.official_name(name)
        return () if official is None else (official,)

    def from_hf(self, values: Mapping[str, Any]) -> tuple[VisionConfig, int]:
        """The tower of its config.json, and its picture size in pixels."""
        raise NotImplementedError

    def to_hf(self, config: Config) -> dict[str, Any]:
        """config.json of the tower's own folder."""
        raise NotImplementedError

    def layer(self, vision: VisionConfig) -> LayerTerms:
        """Costs of one layer."""
        raise NotImplementedError


class DecoderFamily(Family):
    """A language model."""

    section: type[DecoderConfig] = DecoderConfig
    middle_kernel: str  # the last kernel before the hidden states between attention and MLP, which remat="minimal" keeps
    template: str  # of the conversations that such a model is usually trained with
    official: Mapping[str, str]  # model_type of an official folder -> that of the language model alone
    passthrough: Mapping[str, Any]  # what an official config.json says beside the sizes where nothing else is known

    def build(self, config: Config, **settings: Any) -> nn.Module:
        """The flax module, of the interface of `model/decoder.py`'s Decoder, with `attend`, `dtype` and `keep_inputs`."""
        raise NotImplementedError

    def names(self, config: Config) -> Names:
        """The table of its parameters, embeddings and head included."""
        raise NotImplementedError

    def from_hf(self, values: Mapping[str, Any], model_type: str) -> DecoderConfig:
        """The decoder of a config.json (or of its text_config)."""
        raise NotImplementedError

    def to_hf(self, decoder: DecoderConfig) -> dict[str, Any]:
        """The keys of config.json that describe the decoder."""
        raise NotImplementedError

    def model_type(self, decoder: DecoderConfig) -> str:
        """model_type of the language model alone."""
        return self.model_types[0]

    def official_type(self, decoder: DecoderConfig, baseline: bool) -> tuple[str, str]:
        """model_type and class of an official folder, or a WeightsError; `baseline`: of LLaVA, where nothing is injected."""
        raise NotImplementedError

    def layer(self, decoder: DecoderConfig, tensor: int) -> LayerTerms:
        """Costs of one layer on each of `tensor` devices along that axis."""
        raise NotImplementedError


TOWERS: dict[str, TowerFamily] = {}
DECODERS: dict[str, DecoderFamily] = {}
F = TypeVar("F", bound=Family)


def register(family: F) -> F:
    """Make a family known, by its architecture; a later one of the same name replaces the first."""
    known, section = (TOWERS, "vision") if isinstance(family, TowerFamily) else (DECODERS, "decoder")
    known[family.architecture] = family  # type: ignore[assignment]
    register_section(section, family.architecture, family.section)
    return family


def tower_of(config: Config) -> TowerFamily:
    """The family of a run's tower."""
    return TOWERS[config.vision.architecture]


def decoder_of(config: Config) -> DecoderFamily:
    """The family of a run's decoder."""
    return DECODERS[config.decoder.architecture]


def language_models() -> dict[str, DecoderFamily]:
    """model_type of a bare language model -> its family."""
    return {kind: family for family in DECODERS.values() for kind in family.model_types}


def decoder_from(values: Mapping[str, Any], model_type: str) -> DecoderConfig:
    """The decoder of a config.json, or of its text_config; WeightsError where it cannot be built here."""
    return language_models()[model_type].from_hf(present(values), model_type)


def tower_from(values: Mapping[str, Any]) -> tuple[VisionConfig, int]:
    """A tower's config.json as VisionConfig and its picture size in pixels; WeightsError where it cannot be built here."""
    return tower_family(values).from_hf(present(values))


def tower_family(values: Mapping[str, Any]) -> TowerFamily:
    """The family of a tower's config.json; WeightsError where none is known that reads it."""
    kind = word(present(values), "model_type")
    known = {name: family for family in TOWERS.values() for name in family.model_types}
    if kind not in known:
        why = next((family.not_built[kind] for family in TOWERS.values() if kind in family.not_built), "")
        raise WeightsError(
            f"the vision tower's config.json has model_type {quote(kind)}{why and ', ' + why}, expected {' or '.join(known)}; "
            "give one with --tower=DIR"
        )
    return known[kind]
