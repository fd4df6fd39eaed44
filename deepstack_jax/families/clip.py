"""CLIP's vision transformer: class token, pre-norm layers with biases."""

from collections.abc import Mapping
from typing import Any, Literal

from deepstack_jax.config import CLIP_MEAN, CLIP_STD, Config, VisionConfig
from deepstack_jax.families import open_clip
from deepstack_jax.families.base import TOWER, LayerTerms, Names, Processor, Row, TowerFamily, register
from deepstack_jax.families.values import expect, number, real, section, word

DEFAULTS = {  # transformers' CLIPVisionConfig
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_ACTIVATIONS: dict[str, Literal["quick_gelu", "gelu", "gelu_tanh"]] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_INSIDE = TOWER + "vision_model."
_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
# Of a whole CLIP, what the tower does not need.
_NOT_THE_TOWER = ("text_model.", "text_projection", "visual_projection.", "logit_scale", *open_clip.NOT_THE_TOWER)
_NOT_BUILT: dict[str, str] = {}
_KERNELS = (  # ours, theirs, sizes
    ("q", "self_attn.q_proj", "E | n h"),
    ("k", "self_attn.k_proj", "E | n h"),
    ("v", "self_attn.v_proj", "E | n h"),
    ("o", "self_attn.out_proj", "n h | E"),
    ("fc1", "mlp.fc1", "E | f"),
    ("fc2", "mlp.fc2", "f | E"),
)


class Clip(TowerFamily):
    """CLIP ViT-L/14-336 and its relatives."""

    architecture = "clip"
    model_types = ("clip", "clip_vision_model", open_clip.MODEL_TYPE)
    last_kernel = "fc2"
    folder = "clip"
    not_built: Mapping[str, str] = _NOT_BUILT
    defaults: Mapping[str, Any] = DEFAULTS
    processor = Processor("CLIP", "centre", CLIP_MEAN, CLIP_STD)

    def build(self, config: Config, **settings: Any):
        """The tower of `model/vision.py`."""
        from deepstack_jax.model.vision import VisionTower  # here, since jax is not for who reads a configuration

        return VisionTower(config.vision, config.image.size, remat=config.decoder.remat != "none", **settings)

    def prefix_tokens(self, vision: VisionConfig) -> int:
        """CLS."""
        return 1

    def names(self, config: Config) -> Names:
        """The tower's rows; layers after its own (`post_encoder` upstream) follow them in one stack."""
        vision, block = config.vision, "vision_tower/layers/block"
        embeddings = _INSIDE + "embeddings."
        both = (("scale", "weight"), ("bias", "bias"))
        rows = (
            Row("vision_tower/cls", embeddings + "class_embedding", "same", "E"),
            Row("vision_tower/patch_embed/kernel", embeddings + "patch_embedding.weight", "patches", "q | E"),
            Row("vision_tower/positions", embeddings + "position_embedding.weight", "same", "A E"),
            *(
                Row(f"vision_tower/{ours}/{leaf}", f"{_INSIDE}{theirs}.{name}", "same", "E")
                for ours, theirs in (("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm"))
                for leaf, name in both
            ),
            *(Row(f"{block}/norm{n}/{leaf}", f"{{}}layer_norm{n}.{name}", "same", "E") for n in (1, 2) for leaf, name in both),
            *(
                row
                for ours, theirs, sizes in _KERNELS
                for row in (
                    Row(f"{block}/{ours}/kernel", f"{{}}{theirs}.weight", "linear", sizes),
                    Row(f"{block}/{ours}/bias", f"{{}}{theirs}.bias", "flat", sizes.partition("| ")[2]),
                )
            ),
        )
        layers = [f"{_INSIDE}encoder.layers.{layer}." for layer in range(vision.layers)]
        layers += [f"model.vision_tower.post_encoder.{layer}." for layer in range(vision.post_layers)]
        sizes = {
            "E": vision.width,
            "A": config.patch_side**2 + self.prefix_tokens(vision),
            "q": vision.patch_size**2 * 3,
            "n": vision.heads,
            "h": vision.width // vision.heads,
            "f": vision.mlp,
        }
        return Names(rows, sizes, tuple(layers))

    def official_name(self, name: str) -> str | None:
        """With and without `vision_model.` before it."""
        if name.startswith(_NOT_THE_TOWER):
            return None
        return _INSIDE + name if name.startswith(_PARTS) else TOWER + name if name.startswith("vision_model.") else name

    def official_names(self, name: str) -> tuple[str, ...]:
        """Those of OpenCLIP's tensors too, whose queries, keys and values are one."""
        parts = open_clip.clip_names(name) if name.startswith("visual.") else (name,)
        return tuple(official for part in parts if (official := self.official_name(part)) is not None)

    def from_hf(self, values: Mapping[str, Any]) -> tuple[VisionConfig, int]:
        """The sizes of a whole CLIP's config.json, or of its tower's."""
        if word(values, "model_type") == self.model_types[0]:
            values = section(values, "vision_config") or section(values, "vision_config_dict")
        elif word(values, "model_type") == open_clip.MODEL_TYPE:
            values = open_clip.clip_values(values)
        get = {**self.defaults, **values}
        expect(get, "hidden_act", *_ACTIVATIONS, move="choose another tower")
        expect(get, "num_channels", 3, move="choose another tower")
        vision = self.section(
            architecture=self.architecture,
            patch_size=number(get, "patch_size"),
            width=number(get, "hidden_size"),
            layers=number(get, "num_hidden_layers"),
            heads=number(get, "num_attention_heads"),
            mlp=number(get, "intermediate_size"),
            activation=_ACTIVATIONS[get["hidden_act"]],
            norm_eps=real(get, "layer_norm_eps"),
        )
        return vision, number(get, "image_size")

    def to_hf(self, config: Config) -> dict[str, Any]:
        """config.json of the tower's own folder."""
        vision = config.vision
        return {
            "architectures": ["CLIPVisionModel"],
            "attention_dropout": 0.0,
            "hidden_act": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == vision.activation),
            "hidden_size": vision.width,
            "image_size": config.image.size,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": vision.mlp,
            "layer_norm_eps": vision.norm_eps,
            "model_type": "clip_vision_model",
            "num_attention_heads": vision.heads,
            "num_channels": 3,
            "num_hidden_layers": vision.layers,
            "patch_size": vision.patch_size,
            "projection_dim": 768,  # of the head that is not used here
        }

    def layer(self, vision: VisionConfig) -> LayerTerms:
        """Costs of one layer, each picture whole on one device; `kept` is from the compilation of 7B V for v5p."""
        return LayerTerms(kept=18 * vision.width + 6 * vision.mlp, traffic=12 * vision.width + 4 * vision.mlp)


register(Clip())
