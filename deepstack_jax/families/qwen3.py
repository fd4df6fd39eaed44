"""Qwen3: LLaMA with an RMS norm over each head of queries and keys, and heads of a width of their own."""

from dataclasses import dataclass

from deepstack_jax.config import DecoderConfig
from deepstack_jax.families.base import register
from deepstack_jax.families.qwen2 import DEFAULTS, Qwen2

_OFFICIAL = {"deepstack_qwen3": "qwen3", "llava_qwen3": "qwen3"}
_DEFAULTS = {"qwen3": DEFAULTS | {"head_dim": 128}}


@dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """A Qwen3 decoder."""

    head_norm = True


class Qwen3(Qwen2):
    """Qwen3's dense models."""

    architecture = "qwen3"
    section = Qwen3Config
    model_types = ("qwen3",)
    official = _OFFICIAL
    defaults = _DEFAULTS
    any_head_dim = True

    def official_type(self, decoder: DecoderConfig, baseline: bool) -> tuple[str, str]:
        """Named like those over Qwen2."""
        return ("llava_qwen3", "LlavaQwen3ForCausalLM") if baseline else ("deepstack_qwen3", "DeepstackQwen3ForCausalLM")


register(Qwen3())
