"""SigLIP's vision transformer, and SigLIP 2's of fixed resolution: no class token, and no norm before the first layer."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from deepstack_jax.config import Config, VisionConfig
from deepstack_jax.config.fields import positive
from deepstack_jax.families.base import TOWER, Names, Processor, Row, register
from deepstack_jax.families.clip import DEFAULTS, Clip

_DEFAULTS = DEFAULTS | {  # transformers' SiglipVisionConfig
    "hidden_act": "gelu_pytorch_tanh",
    "image_size": 224,
    "layer_norm_eps": 1e-6,
    "patch_size": 16,
}
_NOT_THERE = ("vision_tower/cls", "vision_tower/pre_norm/")
# Of a whole SigLIP, what the tower does not need beside what it has in common with CLIP: it pools the patches.
_POOLING = ("head.", "vision_model.head.", "logit_bias")
_NAFLEX = "SigLIP 2's NaFlex, which sees pictures of any aspect (those of fixed resolution say siglip)"
_NOT_BUILT: dict[str, str] = dict.fromkeys(("siglip2", "siglip2_vision_model"), _NAFLEX)
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class SiglipConfig(VisionConfig):
    """A SigLIP tower."""

    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "gelu_tanh"  # between the two maps of an MLP
    norm_eps: Annotated[float, positive()] = 1e-6  # epsilon of the layer norms
    feature_norm: bool = False  # whether the post norm is on the features, which is meant with feature_layer -1
    cuts_edge = True


class Siglip(Clip):
    """SigLIP of base, large and so400m size."""

    architecture = "siglip"
    section = SiglipConfig
    model_types = ("siglip", "siglip_vision_model")
    folder = "siglip"
    not_built = _NOT_BUILT
    defaults = _DEFAULTS
    processor = Processor("Siglip", "stretch", _HALF, _HALF)

    def build(self, config: Config, **settings: Any):
        """The tower of `model/vision.py`."""
        return super().build(config, class_token=False, norm_first=False, patch_bias=True, **settings)

    def prefix_tokens(self, vision: VisionConfig) -> int:
        """None."""
        return 0

    def names(self, config: Config) -> Names:
        """CLIP's without what is not there, and the patches' bias."""
        names = super().names(config)
        bias = Row("vision_tower/patch_embed/bias", f"{TOWER}vision_model.embeddings.patch_embedding.bias", "same", "E")
        return names._replace(rows=(bias, *(row for row in names.rows if not row.ours.startswith(_NOT_THERE))))

    def official_name(self, name: str) -> str | None:
        """CLIP's, without what pools the patches."""
        return None if name.startswith(_POOLING) else super().official_name(name)

    def to_hf(self, config: Config) -> dict[str, Any]:
        """config.json of the tower's own folder."""
        values = super().to_hf(config)
        more = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", "vision_use_head": False}
        kept = {key: value for key, value in values.items() if key not in ("projection_dim", "initializer_factor")}
        return kept | more


register(Siglip())
