"""The architectures that towers and decoders can have, each said once; what is imported here is known by name everywhere."""

from deepstack_jax.families import clip, granite, llama, phi3, qwen2, qwen3, siglip

__all__ = ["clip", "granite", "llama", "phi3", "qwen2", "qwen3", "siglip"]
