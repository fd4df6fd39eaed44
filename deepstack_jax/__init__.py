"""deepstack_jax: train and run DeepStack multimodal models (arXiv 2406.04334) in JAX and Flax.

`load`, `save_hf`, `LMM` and `Chat` come from `deepstack_jax.api`, which is imported when one of them is asked for: the data
workers import this package and never jax.
"""

from typing import TYPE_CHECKING, Any

from deepstack_jax import families as families  # whose names a configuration may give

if TYPE_CHECKING:
    from deepstack_jax.api import LMM, Chat, load, save_hf

__version__ = "0.1.0"
__all__ = ["LMM", "Chat", "load", "save_hf"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from deepstack_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'deepstack_jax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
