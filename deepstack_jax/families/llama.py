"""LLaMA, and Mistral, which is LLaMA with a sliding window; what other decoders of this arithmetic build on."""

from collections.abc import Mapping
from typing import Any

from deepstack_jax.config import Config, DecoderConfig
from deepstack_jax.errors import WeightsError
from deepstack_jax.families.base import EMBEDDINGS, HEAD, DecoderFamily, LayerTerms, Names, Row, register
from deepstack_jax.families.rope import rope_from, rope_to
from deepstack_jax.families.values import expect, flag, number, real

# What transformers assumes where a config.json says nothing.
COMMON = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}
_KERNELS = {
    "attention/q": "D | N H",
    "attention/k": "D | K H",
    "attention/v": "D | K H",
    "attention/o": "N H | D",
    "mlp/gate": "D | F",
    "mlp/up": "D | F",
    "mlp/down": "F | D",
}

# Path of a kernel within a layer -> its official name; kernels of one name are fused, in the order of _KERNELS.
KERNEL_NAMES = {
    **{f"attention/{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"mlp/{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_DEFAULTS = {
    "llama": COMMON | {"intermediate_size": 11008},
    "mistral": COMMON
    | {"intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
_OFFICIAL = {"deepstack_llama": "llama", "llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral"}
_PASSTHROUGH = {"eos_token_id": 2, "pad_token_id": 0, "pretraining_tp": 1}


class Llama(DecoderFamily):
    """Pre-norm blocks of grouped-query attention and SwiGLU, without biases."""

    architecture = "llama"
    model_types = ("llama", "mistral")
    template = "v1"
    official = _OFFICIAL
    passthrough = _PASSTHROUGH
    last_kernel = "mlp/down"
    middle_kernel = "attention/o"
    defaults: Mapping[str, Mapping[str, Any]] = _DEFAULTS
    refused_scalings: tuple[str, ...] = ("yarn",)
    any_head_dim = False  # whether heads may be of another width than width / heads
    kernels: Mapping[str, str] = KERNEL_NAMES

    def build(self, config: Config, **settings: Any):
        """The decoder of `model/decoder.py`."""
        from deepstack_jax.model.decoder import Decoder  # here, since jax is not for who reads a configuration

        schedule = config.deepstack.decoder_schedule(config.decoder.layers, config.layout.groups)
        return Decoder(config.decoder, schedule, **settings)

    def names(self, config: Config) -> Names:
        """Rows of a decoder with a head of its own, or without one where the embeddings are the head."""
        cfg, block = config.decoder, "layers/layers/block"
        rows = (
            Row("embed/embedding", EMBEDDINGS, "same", "V D"),
            *(() if cfg.tied_head else (Row("head/kernel", HEAD, "linear", "D | V"),)),
            Row("layers/norm/scale", "model.norm.weight", "same", "D"),
            Row(f"{block}/attention_norm/scale", "{}input_layernorm.weight", "same", "D"),
            Row(f"{block}/mlp_norm/scale", "{}post_attention_layernorm.weight", "same", "D"),
            *(Row(f"{block}/{at}/kernel", f"{{}}{self.kernels[at]}.weight", "linear", s) for at, s in _KERNELS.items()),
        )
        if cfg.qkv_bias:
            rows += tuple(
                Row(f"{block}/{at}/bias", f"{{}}{self.kernels[at]}.bias", "flat", _KERNELS[at].partition("| ")[2])
                for at in ("attention/q", "attention/k", "attention/v")
            )
        if cfg.head_norm:
            names = ("q_norm", "k_norm")
            rows += tuple(Row(f"{block}/attention/{name}/scale", f"{{}}self_attn.{name}.weight", "same", "H") for name in names)
        sizes = {"V": cfg.vocab_size, "D": cfg.width, "F": cfg.mlp, "N": cfg.heads, "K": cfg.kv_heads, "H": cfg.head_dim}
        return Names(rows, sizes, tuple(f"model.layers.{layer}." for layer in range(cfg.layers)))

    def from_hf(self, values: Mapping[str, Any], model_type: str) -> DecoderConfig:
        """The sizes of config.json, transformers' defaults where it says nothing."""
        get: dict[str, Any] = {**self.defaults[model_type], **values}
        expect(values, "attention_bias", False)
        expect(values, "mlp_bias", False)
        expect(values, "hidden_act", "silu")
        expect(values, "partial_rotary_factor", 1.0)
        heads, width = number(get, "num_attention_heads"), number(get, "hidden_size")
        get = {"num_key_value_heads": heads, "head_dim": width // heads} | get
        return self.section(
            architecture=self.architecture,
            vocab_size=number(get, "vocab_size"),
            width=width,
            layers=number(get, "num_hidden_layers"),
            heads=heads,
            kv_heads=number(get, "num_key_value_heads"),
            head_dim=number(get, "head_dim"),
            mlp=number(get, "intermediate_size"),
            norm_eps=real(get, "rms_norm_eps"),
            max_positions=number(get, "max_position_embeddings"),
            sliding_window=self.window(get, model_type),
            rope=rope_from(get, self.refused_scalings),
            tied_head=flag(values, "tie_word_embeddings", False),
            **self.own_values(get),
        )

    def window(self, get: Mapping[str, Any], model_type: str) -> int:
        """The sliding window of a config.json with its defaults filled in, 0 where there is none."""
        windowed = "sliding_window" in get and get["sliding_window"] is not None and model_type != "llama"
        return number(get, "sliding_window") if windowed else 0

    def own_values(self, get: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `own_keys`: keys of the section that this family has and no other."""
        return {}

    def to_hf(self, decoder: DecoderConfig) -> dict[str, Any]:
        """The keys of config.json that describe the decoder; WeightsError where no official code has such heads."""
        if decoder.head_dim * decoder.heads != decoder.width and not self.any_head_dim:
            raise WeightsError(
                f"config.decoder has {decoder.heads} heads of {decoder.head_dim} in a width of {decoder.width}; the official "
                f"code has heads of width / heads = {decoder.width / decoder.heads:g}; there is no official form of this model"
            )
        sizes = {
            "hidden_act": "silu",
            "hidden_size": decoder.width,
            "intermediate_size": decoder.mlp,
            "max_position_embeddings": decoder.max_positions,
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": decoder.layers,
            "num_key_value_heads": decoder.kv_heads,
            "rms_norm_eps": decoder.norm_eps,
            **rope_to(decoder.rope),
            "tie_word_embeddings": decoder.tied_head,
            "vocab_size": decoder.vocab_size,
        }
        return sizes | ({"head_dim": decoder.head_dim} if self.any_head_dim else {}) | self.own_keys(decoder)

    def own_keys(self, decoder: DecoderConfig) -> dict[str, Any]:
        """What config.json says of this family and no other."""
        return {"sliding_window": decoder.sliding_window} if decoder.sliding_window else {"attention_bias": False}

    def model_type(self, decoder: DecoderConfig) -> str:
        """A window makes it Mistral."""
        return "mistral" if decoder.sliding_window else "llama"

    def official_type(self, decoder: DecoderConfig, baseline: bool) -> tuple[str, str]:
        """LLaVA's for a baseline, else DeepStack's, which knows no window."""
        if baseline:
            mistral, llama = ("llava_mistral", "LlavaMistralForCausalLM"), ("llava_llama", "LlavaLlamaForCausalLM")
            return mistral if decoder.sliding_window else llama
        if decoder.sliding_window:
            raise WeightsError(
                f"config.decoder.sliding_window {decoder.sliding_window} over LLaMA has no official DeepStack form"
            )
        return "deepstack_llama", "DeepstackLlamaForCausalLM"

    def layer(self, decoder: DecoderConfig, tensor: int) -> LayerTerms:
        """Costs of one layer; 7B L compiled for v5p and, under tensor 4, for v5e agrees with `kept` to 2%."""
        width, mlp, query = decoder.width, decoder.mlp, decoder.heads * decoder.head_dim
        keys = 2 * decoder.kv_heads * decoder.head_dim
        products = width + (query + keys + 2 * mlp) / tensor  # o, q, k, v, gate, up; `down` is needed by nothing
        normed = (query + keys / 2) / tensor if decoder.head_norm else 0  # queries and keys that have a norm
        return LayerTerms(
            # Both norms keep their input and output in float32; the gate's function and its product are kept too. Norms of
            # heads keep three arrays of float32 (5.7 elements instead of 6 in Qwen3-0.6B compiled for v5e).
            kept=11 * width + 2 * products + 2 * mlp / tensor + 6 * normed,
            products=products,
            working=6 * width + (4 * query + 4 * mlp) / tensor,
            traffic=12 * width + (4 * query + 2 * keys + 6 * mlp) / tensor + 2 * normed,
            kernels=width * (2 * query + keys + 3 * mlp) / tensor,
        )


register(Llama())
