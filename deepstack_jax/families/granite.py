"""Granite: LLaMA with four multipliers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from deepstack_jax.config import DecoderConfig
from deepstack_jax.config.fields import positive
from deepstack_jax.families.base import register
from deepstack_jax.families.llama import COMMON, Llama
from deepstack_jax.families.values import real

_OFFICIAL = {"deepstack_granite": "granite", "llava_granite": "granite"}
_PASSTHROUGH = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_DEFAULTS = {"granite": COMMON | {"intermediate_size": 11008} | dict.fromkeys(_MULTIPLIERS, 1.0)}


@dataclass(frozen=True)
class GraniteConfig(DecoderConfig):
    """A Granite decoder. Its multipliers are those of Granite 3's 2B."""

    embedding_multiplier: Annotated[float, positive()] = 12.0  # on what enters the first layer, images included
    attention_multiplier: Annotated[float, positive()] = 0.015625  # on the products of queries and keys
    residual_multiplier: Annotated[float, positive()] = 0.22  # on what attention and MLP add
    logits_scaling: Annotated[float, positive()] = 8.0  # what scores are divided by


class Granite(Llama):
    """Granite 3's dense models."""

    architecture = "granite"
    section = GraniteConfig
    model_types = ("granite",)
    official = _OFFICIAL
    passthrough = _PASSTHROUGH
    defaults = _DEFAULTS

    def window(self, get: Mapping[str, Any], model_type: str) -> int:
        """None."""
        return 0

    def own_values(self, get: Mapping[str, Any]) -> dict[str, Any]:
        """The multipliers."""
        return {name: real(get, name) for name in _MULTIPLIERS}

    def own_keys(self, decoder: DecoderConfig) -> dict[str, Any]:
        """The multipliers."""
        return {"attention_bias": False, "mlp_bias": False, **{name: getattr(decoder, name) for name in _MULTIPLIERS}}

    def model_type(self, decoder: DecoderConfig) -> str:
        """One for all."""
        return "granite"

    def official_type(self, decoder: DecoderConfig, baseline: bool) -> tuple[str, str]:
        """Named like those over Qwen2."""
        return (
            ("llava_granite", "LlavaGraniteForCausalLM") if baseline else ("deepstack_granite", "DeepstackGraniteForCausalLM")
        )


register(Granite())
