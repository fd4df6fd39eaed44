"""The flax module that a configuration describes: tower and decoder of its families, in the variant that it asks for."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from deepstack_jax.config import Config
from deepstack_jax.model.attention import AttentionFn, dot_product
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.model.variants import DeepStackV, HighResDeepStack, PooledDeepStack


def build_model(config: Config, attend: AttentionFn = dot_product, **more: Any) -> DeepStack:
    """The model that a run's configuration describes; `more` are further fields of DeepStack, e.g. `crop_shards`."""
    stack, views = config.deepstack, config.views_per_image
    settings = {
        "image": config.image,
        "vision": config.vision,
        "project": config.projector,
        "decoder": config.decoder,
        "schedule": config.schedule,
        "dtype": jnp.dtype(config.train.compute_dtype),
        "newline": config.newline,
        "attend": attend,
        **more,
    }
    if stack.into == "vision":
        return DeepStackV(**settings, vision_schedule=config.vision_schedule, views=views)
    if stack.pool > 1:
        return PooledDeepStack(**settings, pool=stack.pool)
    if stack.high_res == "view":
        return HighResDeepStack(**settings, views=views, cells=config.layout.grids[0][0])
    return DeepStack(**settings)
