"""MLPs between vision tower and decoder: LLaVA-1.5's `mlp2x_gelu`, shared by global view and crops, and mergers of taps."""

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deepstack_jax.config import ProjectorConfig
from deepstack_jax.model.layers import ACTIVATIONS, layer_norm, linear


class Projector(nn.Module):
    """linear, exact (erf) GELU, linear; vision width E to decoder width D."""

    config: ProjectorConfig
    width: int  # D
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B D"]:
        x = linear(self.width, ("vision_embed", "embed"), bias=True, dtype=self.dtype, name="fc1")(x)
        for number in range(2, self.config.layers + 1):
            x = ACTIVATIONS["gelu"](x)
            x = linear(self.width, ("vision_mlp", "embed"), bias=True, dtype=self.dtype, name=f"fc{number}")(x)
        return x


class Merger(nn.Module):
    """layer norm, linear, exact (erf) GELU, linear: one hidden state of the tower, which no norm has been over, to width D.

    That of Qwen3-VL (`deepstack_merger_list`) where no patches are joined; theirs joins 2 x 2 before its norm.
    """

    width: int  # D
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B D"]:
        inner = x.shape[-1]
        x = layer_norm(1e-6, self.dtype, "norm")(x)
        x = linear(inner, ("vision_embed", "vision_mlp"), bias=True, dtype=self.dtype, name="fc1")(x)
        return linear(self.width, ("vision_mlp", "embed"), bias=True, dtype=self.dtype, name="fc2")(ACTIVATIONS["gelu"](x))
