"""deepstack_jax: train and run DeepStack multimodal models (arXiv 2406.04334) in JAX and Flax."""

__version__ = "0.1.0"
