"""deepstack_jax: train and run DeepStack multimodal models (arXiv 2406.04334) in JAX and Flax.

All but the errors of configurations and weights comes from `deepstack_jax.api`, which is imported when it is asked for: data
workers import this package and never jax. Every error that a user can cause is a `UserError`.
"""

from typing import TYPE_CHECKING, Any

from deepstack_jax import families as families  # whose names a configuration may give
from deepstack_jax.errors import ConfigError, UserError, WeightsError

if TYPE_CHECKING:
    from deepstack_jax.api import LMM, Answer, Chat, CheckpointError, ImageError, Options, RequestError, load, save_hf

__version__ = "0.1.0"
__all__ = [
    "LMM",
    "Answer",
    "Chat",
    "CheckpointError",
    "ConfigError",
    "ImageError",
    "Options",
    "RequestError",
    "UserError",
    "WeightsError",
    "load",
    "save_hf",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from deepstack_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'deepstack_jax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
