"""What a configuration computes, in a line for each of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepstack_jax.config.schema import Config, DeepStackConfig


def parts_in_words(config: Config) -> dict[str, str]:
    """Name of a part -> what it is."""
    image, vision, decoder, stack = config.image, config.vision, config.decoder, config.deepstack
    return {
        "vision": f"{vision.architecture}, {vision.layers} + {vision.post_layers} layers of {vision.width}, {image.size} px",
        "decoder": f"{decoder.architecture}, {decoder.layers} layers of {decoder.width}, vocabulary {decoder.vocab_size:,}",
        "image": f"{image.mode}, {image.num_crops} crops" if stack.stack_of_views != "none" else image.mode,
        "deepstack": _injection(stack),
    }


def _injection(stack: DeepStackConfig) -> str:
    views = f"{stack.stack_of_views} into {stack.into}, {stack.sampling}" if stack.stack_of_views != "none" else ""
    taps = ", ".join(f"{state} into layer {layer}" for state, layer in stack.taps)
    return "; ".join(filter(None, (views, taps and f"taps of hidden states {taps}"))) or "nothing injected"


def as_repr(name: str, parts: dict[str, str]) -> str:
    """How an object with such parts shows itself: a line each."""
    return "\n".join([f"{name}(", *(f"  {part}: {words}" for part, words in parts.items()), ")"])
