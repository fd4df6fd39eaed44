"""The flax module that a configuration describes: tower and decoder of its families, in the variant that it asks for."""

from typing import Any

import jax.numpy as jnp

from deepstack_jax.config import Config
from deepstack_jax.families.base import decoder_of, tower_of
from deepstack_jax.model.attention import AttentionFn, dot_product
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.model.layers import PLAIN, Rounding
from deepstack_jax.model.variants import AddedDeepStack, DeepStackV, HighResDeepStack, JoinedDeepStack, PooledDeepStack


def build_model(
    config: Config,
    attend: AttentionFn = dot_product,
    tower_attend: AttentionFn = dot_product,
    *,
    keep_inputs: bool = False,
    rounding: Rounding = PLAIN,
    **more: Any,
) -> DeepStack:
    """The model that a run's configuration describes.

    Args:
      attend, tower_attend: attention of the decoder and of the tower.
      keep_inputs: also give back the input of every decoder layer.
      rounding: of the products with the kernels of the decoder's layers.
      more: further fields of DeepStack, such as `crop_shards`.
    """
    stack, views, dtype = config.deepstack, config.layout.max_views, jnp.dtype(config.train.compute_dtype)
    tower, shards = tower_of(config), more.get("crop_shards", (1, 1))
    tapped = stack.tapped(config.vision)
    settings = {
        "vision_tower": tower.build(config, attend=tower_attend, dtype=dtype, crop_shards=shards, tapped=tapped),
        "layers": decoder_of(config).build(config, attend=attend, dtype=dtype, keep_inputs=keep_inputs, rounding=rounding),
        "image": config.image,
        "vision": config.vision,
        "project": config.projector,
        "decoder": config.decoder,
        "dtype": dtype,
        "newline": config.image.newline,
        "taps": len(tapped),
        **more,
    }
    if stack.into == "vision":
        schedule = stack.tower_schedule(config.vision, config.layout.groups)
        return DeepStackV(**settings, vision_schedule=schedule, views=views)
    if stack.into in ("input", "channels"):
        return {"input": AddedDeepStack, "channels": JoinedDeepStack}[stack.into](**settings)
    if stack.pool > 1:
        return PooledDeepStack(**settings, pool=stack.pool)
    if stack.high_res == "view":
        return HighResDeepStack(**settings, views=views, cells=config.layout.grids[0][0])
    return DeepStack(**settings)
