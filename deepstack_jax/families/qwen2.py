"""Qwen2 and Qwen2.5: LLaMA with biases on queries, keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepstack_jax.config import DecoderConfig
from deepstack_jax.families.base import register
from deepstack_jax.families.llama import COMMON, Llama
from deepstack_jax.families.values import expect

_OFFICIAL = {"deepstack_qwen2": "qwen2", "llava_qwen": "qwen2"}
_PASSTHROUGH = {"bos_token_id": 151643, "eos_token_id": 151645}
DEFAULTS = COMMON | {
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
}
_DEFAULTS = {"qwen2": DEFAULTS}


@dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """A Qwen2 decoder."""

    qkv_bias = True


class Qwen2(Llama):
    """Qwen2, Qwen2.5 and their relatives, all of whose layers see the whole context."""

    architecture = "qwen2"
    section = Qwen2Config
    model_types = ("qwen2",)
    template = "chatml"
    official = _OFFICIAL
    passthrough = _PASSTHROUGH
    defaults = _DEFAULTS

    def window(self, get: Mapping[str, Any], model_type: str) -> int:
        """None; WeightsError where some layers have one and others not."""
        expect(get, "use_sliding_window", False)
        expect({"layer_types": sorted(set(get.get("layer_types", [])))}, "layer_types", [], ["full_attention"])
        return 0

    def own_keys(self, decoder: DecoderConfig) -> dict[str, Any]:
        """No window."""
        return {"use_sliding_window": False}

    def model_type(self, decoder: DecoderConfig) -> str:
        """One for all."""
        return self.model_types[0]

    def official_type(self, decoder: DecoderConfig, baseline: bool) -> tuple[str, str]:
        """LLaVA-NeXT's for a baseline; DeepStack's are named like those over LLaMA."""
        return ("llava_qwen", "LlavaQwenForCausalLM") if baseline else ("deepstack_qwen2", "DeepstackQwen2ForCausalLM")


register(Qwen2())
