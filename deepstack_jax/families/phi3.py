"""Phi-3: LLaMA's arithmetic with fused tensors, scaled rotary positions and a sliding window."""

from typing import Any

from deepstack_jax.config import DecoderConfig
from deepstack_jax.families.base import register
from deepstack_jax.families.llama import COMMON, KERNEL_NAMES, Llama

_OFFICIAL = {"deepstack_phi": "phi3"}
_PASSTHROUGH = {"embd_pdrop": 0.0, "eos_token_id": 32000, "pad_token_id": 32000, "resid_pdrop": 0.0}
_DEFAULTS = {
    "phi3": COMMON
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32064,
    }
}
_KERNEL_NAMES = {
    **KERNEL_NAMES,
    **dict.fromkeys(("attention/q", "attention/k", "attention/v"), "self_attn.qkv_proj"),
    **dict.fromkeys(("mlp/gate", "mlp/up"), "mlp.gate_up_proj"),
}


class Phi3(Llama):
    """Phi-3-mini and its relatives."""

    architecture = "phi3"
    model_types = ("phi3",)
    template = "phi3_instruct"
    official = _OFFICIAL
    passthrough = _PASSTHROUGH
    defaults = _DEFAULTS
    refused_scalings = ()
    kernels = _KERNEL_NAMES

    def own_keys(self, decoder: DecoderConfig) -> dict[str, Any]:
        """The context before it was extended is outside of rope_scaling."""
        original = decoder.rope.original_positions or decoder.max_positions
        return {"original_max_position_embeddings": original, "sliding_window": decoder.sliding_window or None}

    def model_type(self, decoder: DecoderConfig) -> str:
        """One for all."""
        return "phi3"

    def official_type(self, decoder: DecoderConfig, baseline: bool) -> tuple[str, str]:
        """One for all: DeepStack's, of baselines too."""
        return "deepstack_phi", "DeepstackPhiForCausalLM"


register(Phi3())
